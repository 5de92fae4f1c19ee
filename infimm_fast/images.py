"""Reading pictures of any kind into 8-bit RGB, with one clear error for what is not a usable picture."""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from infimm_fast.errors import ImageInputError

MAX_PIXELS = 100_000_000
MAX_ASPECT_RATIO = 200

# Colour space in a profile -> Pillow's mode of the pictures that it describes.
_PROFILE_MODES = {"RGB ": "RGB", "CMYK": "CMYK", "GRAY": "L"}


def load_image(source: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return a picture as 8-bit RGB.

    Grey, palette, CMYK and 16-bit pictures are converted, transparency is laid over white, colour profiles and the EXIF
    orientation are applied, and the first frame of an animation is taken.

    Args:
        source: a PIL image; a path; the bytes of a file, or a binary file object; a base64 string (with or without a
            ``data:`` prefix and line breaks); a NumPy array or torch tensor, ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``
            with 1, 3 or 4 channels, uint8, uint16, or floating point in [0, 1].
        max_pixels: larger pictures are refused before they are decoded.

    Returns:
        A PIL image in mode RGB.

    Raises:
        ImageInputError: the source cannot be read or decoded, is too large, empty, or more than 200 times as long as
            wide.
    """
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(source, "read"):
        image = _open(source)
    else:
        image = _from_array(source)
    _check_size(image.size, max_pixels)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise errors of a dozen kinds
        raise ImageInputError(f"the picture is damaged and cannot be decoded: {error}") from error


def _open(source: Any) -> Image.Image:
    """Open a file, its bytes or its base64 text; nothing is decoded yet."""
    label = "the picture"
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if _is_file(text):
            label = f"{text!r}"
        elif isinstance(source, str) and (decoded := _decode_base64(source)) is not None:
            source = decoded
        else:
            raise ImageInputError(f"{_shorten(text)!r} is no file, nor base64 data of a picture")
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    try:
        with warnings.catch_warnings():
            # Pillow only warns between its own limit and twice that; `_check_size` decides for us.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(source)
    except Image.DecompressionBombError as error:
        raise ImageInputError(f"{label} has too many pixels to be decoded safely: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageInputError(f"{label} is not a picture in a known format") from error
    except Exception as error:  # Pillow's decoders raise errors of a dozen kinds
        raise ImageInputError(f"{label} cannot be read: {error}") from error


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name, as base64 text is
        return False


def _decode_base64(text: str) -> bytes | None:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True) or None
    except (binascii.Error, ValueError):
        return None


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def _from_array(source: Any) -> Image.Image:
    """Wrap a NumPy array or torch tensor in either channel order."""
    if hasattr(source, "detach"):
        source = _tensor_to_array(source)
    if not isinstance(source, np.ndarray):
        raise ImageInputError(
            f"a picture of type {type(source).__name__} is not accepted; pass a PIL image, path, bytes, array or tensor"
        )
    array = source
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ImageInputError(
            f"an array of shape {list(source.shape)} is no picture; expected [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 "
            "channels"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ImageInputError("a floating-point picture must have finite values in [0, 1]")
        array = np.rint(array * 255)
    elif array.dtype == np.uint16:
        array = array >> 8
    elif array.dtype != np.uint8:
        raise ImageInputError(f"a picture of dtype {array.dtype} is not accepted; pass uint8, uint16 or floating point")
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))


def _tensor_to_array(tensor: Any) -> np.ndarray:
    try:
        tensor = tensor.detach().cpu()
        # NumPy has no bfloat16.
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (TypeError, RuntimeError) as error:
        raise ImageInputError(f"a tensor of {tensor.dtype} on {tensor.device} is no picture: {error}") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageInputError(f"a picture of {width} x {height} pixels is empty")
    if width * height > max_pixels:
        raise ImageInputError(f"a picture of {width} x {height} pixels is larger than the limit of {max_pixels} pixels")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ImageInputError(
            f"a picture of {width} x {height} pixels is more than {MAX_ASPECT_RATIO} times as long as it is wide"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow clips these modes to 255; 16-bit pictures are scaled instead.
        array = np.asarray(image, dtype=np.float64)
        if image.mode != "F":
            array = array / 256
        image = Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer).convert("RGB")
    elif image.mode not in _PROFILE_MODES.values():
        image = image.convert("RGB")
    return (_to_srgb(image, profile) if profile else image).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Apply a colour profile; one that is damaged or does not fit is ignored with a warning, as browsers do."""
    try:
        parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(parsed):
            return image
        if _PROFILE_MODES.get(parsed.profile.xcolor_space) == image.mode:
            converted = ImageCms.profileToProfile(image, parsed, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None  # only in-place conversion returns nothing
            return converted
        reason = f"it is one for {parsed.profile.xcolor_space.strip()} pictures, the picture is {image.mode}"
    except (OSError, ImageCms.PyCMSError) as error:
        reason = f"it is damaged: {error}"
    warnings.warn(f"the colour profile of a picture is ignored: {reason}", stacklevel=4)
    return image
