"""Pictures of any size to a packed batch of sub-images and thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from infimm_fast.errors import ConfigurationError, ImageInputError
from infimm_fast.images import MAX_PIXELS, load_image
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig, check_choice
from infimm_fast.models.infimm_hd.tiling import choose_grid, has_thumbnail


class InfiMMHDImageProcessor(BaseImageProcessor):
    """Cuts each picture into sub-images by its own grid; the results of all pictures lie end to end.

    Args:
        tile_size: side of a tile in pixels.
        min_grid: fewest sub-images along a side.
        max_grid: most sub-images along a side; inference may go beyond the 3 of training.
        always_thumbnail: make a thumbnail for pictures of a single sub-image too.
        fit: "stretch" resizes a picture to its grid of tiles; "crop" scales the shorter side to one tile and takes the
            middle, as CLIP does, for ``max_grid=1`` only.
        image_mean: mean of each channel in [0, 1], CLIP's by default.
        image_std: standard deviation of each channel.
        max_pixels: larger pictures are refused.

    Source: InfiMM-HD (arXiv 2403.01487, section 3).
    """

    model_input_names = ("pixel_values", "image_grids", "image_counts")

    def __init__(
        self,
        tile_size: int = 448,
        min_grid: int = 1,
        max_grid: int = 3,
        always_thumbnail: bool = False,
        fit: str = "stretch",
        image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN),
        image_std: Sequence[float] = tuple(OPENAI_CLIP_STD),
        max_pixels: int = MAX_PIXELS,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if tile_size < 1 or not 1 <= min_grid <= max_grid:
            raise ConfigurationError(
                f"tile_size={tile_size}, min_grid={min_grid}, max_grid={max_grid} do not fit; expected a tile of at least "
                "1 pixel and 1 <= min_grid <= max_grid"
            )
        check_choice("fit", fit, ("stretch",) if max_grid > 1 else ("stretch", "crop"))
        self.tile_size = tile_size
        self.min_grid = min_grid
        self.max_grid = max_grid
        self.always_thumbnail = always_thumbnail
        self.fit = fit
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.max_pixels = max_pixels

    @classmethod
    def from_config(cls, config: InfiMMHDConfig) -> InfiMMHDImageProcessor:
        """Return the image processor that fits a model's configuration."""
        return cls(
            tile_size=config.vision_config.image_size,
            max_grid=config.max_grid,
            always_thumbnail=config.always_thumbnail,
            fit=config.image_fit,
        )

    def cut(self, image: Any) -> tuple[list[Image.Image], tuple[int, int]]:
        """Cut one picture.

        Args:
            image: anything `infimm_fast.images.load_image` takes.

        Returns:
            The tiles (sub-images row by row, then the thumbnail if there is one) and the grid (rows, columns).

        Raises:
            ImageInputError: the picture cannot be used.
        """
        image = load_image(image, self.max_pixels)
        size = self.tile_size
        if self.fit == "crop":
            left, top = ((side - min(image.size)) / 2 for side in image.size)
            box = (left, top, image.width - left, image.height - top)
            return [image.resize((size, size), Image.Resampling.BICUBIC, box)], (1, 1)
        rows, columns = choose_grid(image.height, image.width, size, self.min_grid, self.max_grid)
        resized = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
        tiles = [
            resized.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
            for row in range(rows)
            for column in range(columns)
        ]
        if has_thumbnail(rows, columns, self.always_thumbnail):
            tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
        return tiles, (rows, columns)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Cut, scale and normalise pictures.

        Args:
            images: a picture, a list of pictures (one row), or a list of lists of pictures (one list for each row; a row
                without pictures is an empty list).
            return_tensors: "pt"; other values are refused.
            **kwargs: nothing else is accepted.

        Returns:
            ``pixel_values`` float32 ``[tiles, 3, tile_size, tile_size]``, ``image_grids`` int64 ``[images, 2]`` and
            ``image_counts`` int64 ``[rows]``.

        Raises:
            ImageInputError: a picture cannot be used, or there is none.
        """
        if return_tensors not in (None, "pt") or kwargs:
            raise ConfigurationError(
                f"return_tensors={return_tensors!r} with {sorted(kwargs)} is not accepted; use 'pt' alone"
            )
        rows = nest_images(images)
        cut = [self.cut(image) for row in rows for image in row]
        if not cut:
            raise ImageInputError("there is no picture to process")
        pixels = np.stack([np.asarray(tile) for tiles, _ in cut for tile in tiles])  # [tiles, S, S, 3]
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div_(255)
        mean, std = (torch.tensor(stat).view(3, 1, 1) for stat in (self.image_mean, self.image_std))
        return BatchFeature(
            {
                "pixel_values": values.sub_(mean).div_(std).contiguous(),
                "image_grids": torch.tensor([grid for _, grid in cut]),
                "image_counts": torch.tensor([len(row) for row in rows]),
            }
        )


def nest_images(images: Any) -> list[list[Any]]:
    """Return pictures as one list for each row: a picture or a flat list of pictures is one row."""
    if not isinstance(images, (list, tuple)):
        return [[images]]
    if any(isinstance(image, (list, tuple)) for image in images):
        return [list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
    return [list(images)]
