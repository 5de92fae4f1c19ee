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
from PIL import Image, ImageOps, UnidentifiedImageError

from infimm_fast.errors import ImageInputError

MAX_PIXELS = 100_000_000
MAX_ASPECT_RATIO = 200


def load_image(source: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return a picture as 8-bit RGB.

    Grey, palette, CMYK and 16-bit pictures are converted, transparency is laid over white, the EXIF orientation is
    applied, and the first frame of an animation is taken.

    Args:
        source: a PIL image; a path; the bytes of a file, or a binary file object; a base64 string (with or without a
            ``data:`` prefix); a NumPy array or torch tensor, ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` with 1, 3 or 4
            channels, uint8, uint16, or floating point in [0, 1].
        max_pixels: larger pictures are refused before they are decoded.

    Returns:
        A PIL image in mode RGB.

    Raises:
        ImageInputError: the source cannot be read or decoded, is too large, empty, or more than 200 times as long as
            wide.
    """
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, (str, os.PathLike, bytes, bytearray)) or hasattr(source, "read"):
        image = _open(source)
    else:
        image = _from_array(source)
    _check_size(image.size, max_pixels)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        raise ImageInputError(f"the picture is damaged and cannot be decoded: {error}") from error


def _open(source: Any) -> Image.Image:
    """Open a file, its bytes or its base64 text; nothing is decoded yet."""
    label = "the picture"
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if Path(text).is_file():
            label = f"{text!r}"
        elif isinstance(source, str) and (decoded := _decode_base64(source)) is not None:
            source = decoded
        else:
            raise ImageInputError(f"{_shorten(text)!r} is no file, nor base64 data of a picture")
    if isinstance(source, (bytes, bytearray)):
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
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageInputError(f"{label} cannot be read: {error}") from error


def _decode_base64(text: str) -> bytes | None:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True) or None
    except (binascii.Error, ValueError):
        return None


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def _from_array(source: Any) -> Image.Image:
    """Wrap a NumPy array or torch tensor in either channel order."""
    if hasattr(source, "detach"):
        source = source.detach().cpu().numpy()
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
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow clips these modes to 255; 16-bit pictures are scaled instead.
        array = np.asarray(image, dtype=np.float64)
        if image.mode != "F":
            array = array / 256
        image = Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
