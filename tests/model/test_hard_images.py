"""Pictures as the world has them: each becomes an RGB picture, or one typed error."""

import base64
import io
import struct
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from infimm_fast import InfiMMHDImageProcessor, preset
from infimm_fast.errors import ImageInputError
from infimm_fast.images import load_image


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(*size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind, tolerance", (("TIFF", 0), ("JPEG", 3)))
def test_cmyk(kind, tolerance):
    """Ink: cyan takes the red away, black everything."""
    image = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 32, 64))
    loaded = load_image(encode(image, kind))
    assert loaded.mode == "RGB"
    for place, colour in (((50, 30), (0, 255, 255)), ((10, 30), (0, 0, 0))):
        assert np.abs(np.subtract(loaded.getpixel(place), colour)).max() <= tolerance


def corners(image):
    array = np.asarray(image).astype(int)
    return [array[y, x].tolist() for y in (4, -5) for x in (4, -5)]


@pytest.mark.parametrize("kind", ("PNG", "TIFF", "WEBP"))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(orientation, kind):
    """A viewer turns the stored picture back into the original; so do we."""
    original = Image.new("RGB", (30, 20), "white")
    original.paste((255, 0, 0), (0, 0, 10, 10))
    original.paste((0, 0, 255), (20, 10, 30, 20))
    stored = {
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }.get(orientation, lambda image: image)(original)
    exif = stored.getexif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    loaded = load_image(encode(stored, kind, exif=exif, **options))
    assert loaded.size == original.size and corners(loaded) == corners(original)


@pytest.mark.parametrize("kind", ("GIF", "PNG", "WEBP", "TIFF"))
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    loaded = load_image(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert loaded.size == (20, 10) and loaded.getcolors() == [(200, (255, 0, 0))]


def matrix_profile(primaries, space=b"RGB "):
    """An ICC version 2 profile of a display: XYZ of red, green and blue, gamma 2.2, nothing else."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = b"a display\0"
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(79 + (-len(text)) % 4),
        b"cprt": b"text" + bytes(4) + b"none" + bytes(4),
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249),
        **{name: b"XYZ " + bytes(4) + fixed(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", offset + len(body), len(value))
        body += value
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, b"mntr", space, b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + body


# sRGB's primaries under D50.
RED, GREEN, BLUE = (0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7139)


def test_colour_profiles_are_applied():
    """In a profile with red and green exchanged, a stored red is a green light."""
    profile = matrix_profile((GREEN, RED, BLUE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in (Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGBA", (8, 8), (255, 0, 0, 255))):
            loaded = load_image(encode(image, "PNG", icc_profile=profile))
            assert np.abs(np.subtract(loaded.getpixel((4, 4)), (0, 255, 0))).max() <= 3
        ordinary = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        pixels = noise(16, 16)
        assert np.array_equal(load_image(encode(Image.fromarray(pixels), "PNG", icc_profile=ordinary)), pixels)


@pytest.mark.parametrize(
    "profile, message",
    ((b"no profile at all", "damaged"), (matrix_profile((RED, GREEN, BLUE), b"CMYK"), "CMYK pictures, the picture is RGB")),
    ids=("damaged", "other"),
)
def test_unusable_colour_profiles_are_ignored_with_a_warning(profile, message):
    pixels = noise(16, 16)
    data = encode(Image.fromarray(pixels), "TIFF", icc_profile=profile)
    with pytest.warns(UserWarning, match=message):
        assert np.array_equal(load_image(data), pixels)


@pytest.mark.parametrize("name", ("tiny", "tiny-zephyr"))
def test_48_megapixels(name):
    rows = np.linspace(0, 255, 6000, dtype=np.uint8)
    picture = Image.fromarray(np.broadcast_to(rows[:, None], (6000, 8000)))
    data = encode(picture, "JPEG")
    processor = InfiMMHDImageProcessor.from_config(preset(name))
    started = time.monotonic()
    tiles, grid = processor.cut(data)
    assert time.monotonic() - started < 10
    assert grid == (processor.max_grid,) * 2
    column = np.asarray(tiles[-1])[:, 0, 0].astype(int)  # the whole height, in the thumbnail or the only tile
    assert column[0] < 5 and column[-1] > 250 and (np.diff(column) >= 0).all()


@pytest.mark.parametrize("size", ((1, 10_000), (10_000, 1)))
@pytest.mark.parametrize("name", ("tiny", "tiny-zephyr"))
def test_a_line_is_no_picture(size, name):
    processor = InfiMMHDImageProcessor.from_config(preset(name))
    with pytest.raises(ImageInputError, match="more than 200 times as long as it is wide"):
        processor(Image.new("RGB", size))
    assert len(processor(Image.new("RGB", (10, 2000)))["pixel_values"]) >= 1


def test_bytes_and_base64_of_any_length():
    """Longer than a file name may be, with and without line breaks."""
    pixels = noise(60, 80)
    data = encode(Image.fromarray(pixels), "PNG")
    text, broken = base64.b64encode(data).decode(), base64.encodebytes(data).decode()
    assert len(text) > 5000 and "\n" in broken
    for source in (data, bytearray(data), memoryview(data), text, broken, f"data:image/png;base64,{text}"):
        assert np.array_equal(load_image(source), pixels)
    with pytest.raises(ImageInputError, match="no file, nor base64"):
        load_image(text[:-1])


DTYPES = (torch.uint8, torch.float32, torch.float16, torch.float64)


@pytest.mark.parametrize("channels_first", (False, True))
@pytest.mark.parametrize(
    "kind, dtype", (*(("torch", dtype) for dtype in (*DTYPES, torch.bfloat16)), *(("numpy", dtype) for dtype in DTYPES))
)
def test_arrays_in_either_channel_order(kind, dtype, channels_first):
    pixels = noise(12, 20)
    tensor = torch.from_numpy(pixels.copy())
    tensor = tensor if dtype == torch.uint8 else (tensor.double() / 255).to(dtype)
    tensor = tensor.permute(2, 0, 1) if channels_first else tensor
    loaded = np.asarray(load_image(tensor if kind == "torch" else tensor.numpy())).astype(int)
    assert np.abs(loaded - pixels).max() <= (1 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize(
    "tensor", (torch.empty(3, 8, 8, device="meta"), torch.ones(3, 8).to_sparse()), ids=("no data", "sparse")
)
def test_tensors_without_pixels(tensor):
    with pytest.raises(ImageInputError, match="is no picture"):
        load_image(tensor)


KINDS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "DDS", "AVIF")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_give_a_picture_or_the_typed_error(kind):
    """A hundred files of each kind with bytes changed or missing, always the same ones."""
    if kind not in Image.SAVE and not (Image.init() and kind in Image.SAVE):
        pytest.skip(f"this Pillow does not write {kind}")
    generator = np.random.default_rng(0)
    image = Image.fromarray(noise(40, 50))
    exif = image.getexif()
    exif[0x0112] = 6
    good = encode(image, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    outcomes = set()
    for index in range(100):
        data = bytearray(good)
        for _ in range(generator.integers(1, 6)):
            data[generator.integers(0, len(data) if index % 2 else min(len(data), 400))] = generator.integers(0, 256)
        data = data[: generator.integers(0, len(data))] if index % 5 == 0 else data
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes.add(load_image(bytes(data)).mode)
        except ImageInputError:
            outcomes.add("typed error")
    assert "typed error" in outcomes and outcomes <= {"RGB", "typed error"}
