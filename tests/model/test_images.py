"""Reading and cutting pictures, good ones and bad ones."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from infimm_fast import InfiMMHDImageProcessor
from infimm_fast.errors import ConfigurationError, ImageInputError
from infimm_fast.images import load_image
from infimm_fast.models.infimm_hd.tiling import choose_grid, tile_count, tile_places


@pytest.mark.parametrize(
    "size, grid",
    (
        ((448, 448), (1, 1)),
        ((1, 1), (1, 1)),
        ((671, 672), (1, 2)),  # 1.498 and 1.5: halves go up
        ((1120, 1119), (3, 2)),  # 2.5 and 2.498: not to the even neighbour, as Python's round does
        ((4000, 200), (3, 1)),
        ((768, 1024), (2, 2)),
    ),
)
def test_grid(size, grid):
    assert choose_grid(*size, tile_size=448) == grid


def test_grid_limits():
    assert choose_grid(4000, 4000, 448, max_grid=5) == (5, 5)
    assert choose_grid(10, 10, 448, min_grid=2) == (2, 2)


def test_tiles_of_a_picture():
    assert [tile_count(1, 1), tile_count(1, 1, True), tile_count(2, 3)] == [1, 2, 7]
    assert tile_places([(1, 2), (1, 1)]) == [(0, 0), (0, 1), None, (0, 0)]
    assert tile_places([(1, 1)], always_thumbnail=True) == [(0, 0), None]


def test_sub_images_are_row_major_and_the_thumbnail_is_last():
    """Four quadrants of one colour each: every tile must be its quadrant, the thumbnail all of them."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    picture = Image.new("RGB", (200, 200))
    for index, colour in enumerate(colours):
        picture.paste(colour, (index % 2 * 100, index // 2 * 100, index % 2 * 100 + 100, index // 2 * 100 + 100))
    processor = InfiMMHDImageProcessor(tile_size=100)
    tiles, grid = processor.cut(picture)
    assert grid == (2, 2) and len(tiles) == 5
    for tile, colour in zip(tiles, colours, strict=False):
        assert tile.getpixel((50, 50)) == colour
    assert [tiles[4].getpixel(place) for place in ((20, 20), (80, 20), (20, 80), (80, 80))] == colours


def test_values_are_normalised_with_clips_statistics():
    processor = InfiMMHDImageProcessor(tile_size=28)
    values = processor(Image.new("RGB", (28, 28), (255, 0, 128)))["pixel_values"]
    assert values.shape == (1, 3, 28, 28) and values.dtype == torch.float32
    expected = [(1 - 0.48145466) / 0.26862954, (0 - 0.4578275) / 0.26130258, (128 / 255 - 0.40821073) / 0.27577711]
    assert values[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_packed_output_of_nested_images():
    processor = InfiMMHDImageProcessor(tile_size=28)
    wide, small = Image.new("RGB", (56, 28)), Image.new("RGB", (28, 28))
    batch = processor([[wide, small], [], [small]])
    assert batch["image_counts"].tolist() == [2, 0, 1]
    assert batch["image_grids"].tolist() == [[1, 2], [1, 1], [1, 1]]
    assert len(batch["pixel_values"]) == 5


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_modes_are_converted():
    gradient = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    grey = Image.fromarray(gradient)
    assert np.array_equal(np.asarray(load_image(grey))[..., 1], gradient)
    deep = Image.fromarray(gradient.astype(np.uint16) * 256)
    assert deep.mode.startswith("I;16")
    assert np.array_equal(np.asarray(load_image(deep))[..., 0], gradient)
    assert np.array_equal(np.asarray(load_image(png(deep)))[..., 2], gradient)
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert load_image(palette).getpixel((0, 0)) == (10, 200, 30)
    half_clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert load_image(half_clear).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("LA", (4, 4), (0, 255))).getpixel((0, 0)) == (0, 0, 0)
    assert load_image(Image.new("CMYK", (4, 4), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("1", (4, 4), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.fromarray(np.full((4, 4), 200.0, np.float32))).getpixel((0, 0)) == (200, 200, 200)


def test_sources(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels, data = np.asarray(picture), png(picture)
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    channels_first = pixels.transpose(2, 0, 1)
    for source in (
        picture,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        data,
        io.BytesIO(data),
        text,
        f"data:image/png;base64,{text}",
        pixels,
        channels_first,
        torch.from_numpy(channels_first.copy()),
        torch.from_numpy(channels_first.copy()) / 255,
        pixels.astype(np.uint16) * 256,
    ):
        assert np.array_equal(np.asarray(load_image(source)), pixels), type(source)


def test_exif_orientation_is_applied():
    picture = Image.new("RGB", (10, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    stream = io.BytesIO()
    picture.save(stream, "JPEG", exif=exif)
    assert load_image(stream.getvalue()).size == (20, 10)


def zero_sized_png():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bomb_png(side):
    """A small file that would decode to side * side pixels."""
    stream = io.BytesIO()
    Image.new("1", (side, side)).save(stream, "PNG")
    return stream.getvalue()


def test_bad_pictures(tmp_path):
    good = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    cases = {
        "damaged": good[: len(good) // 2],
        "not a picture": tmp_path / "text.jpg",
        "not a picture in": tmp_path / "empty.png",
        "larger than the limit": bomb_png(11_000),
        "too many pixels": bomb_png(16_000),
        "200 times as long": Image.new("RGB", (1, 10_000)),
        "is no file": str(tmp_path / "missing.png"),
        "of type int": 7,
        "is no picture": np.zeros((2, 3, 4, 5), np.uint8),
        "finite values": np.full((4, 4, 3), np.nan, np.float32),
        "dtype int64": np.zeros((4, 4, 3), np.int64),
        "H, W": np.zeros((0, 4, 3), np.uint8),
        "is empty|cannot be read|not a picture": zero_sized_png(),
    }
    for message, source in cases.items():
        with pytest.raises(ImageInputError, match=message):
            load_image(source)
    with pytest.raises(ImageInputError, match="empty"):
        load_image(Image.new("RGB", (0, 5)))


def test_bad_settings():
    with pytest.raises(ConfigurationError, match="min_grid"):
        InfiMMHDImageProcessor(min_grid=3, max_grid=2)
    with pytest.raises(ImageInputError, match="no picture"):
        InfiMMHDImageProcessor()([])
    with pytest.raises(ConfigurationError, match="not accepted"):
        InfiMMHDImageProcessor()(Image.new("RGB", (8, 8)), return_tensors="np")
