"""Position embeddings: learned grids resized, axial RoPE tables, and the sinusoid of a sub-image's place."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Stands for a thumbnail where tiles have (row, column) in a tensor.
THUMBNAIL = (-1, -1)


def resize_position_embedding(embedding: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Resize a learned position embedding of a square patch grid, bicubic, class token kept.

    Args:
        embedding: ``[1, 1 + g * g, C]``.
        grid_size: the new side of the grid.

    Returns:
        ``[1, 1 + grid_size**2, C]`` in float32 (float64 stays); `embedding` itself if the grid is that size already.

    Source: EVA-CLIP (arXiv 2303.15389), without the round trip through fp16 of the authors' function.
    """
    old = math.isqrt(embedding.shape[1] - 1)
    if old == grid_size:
        return embedding
    wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    grid = wide[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    return torch.cat((wide[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def resize_patch_embedding(weight: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Resize the convolution kernels of a patch embedding, bicubic.

    Args:
        weight: ``[C, 3, p, p]``.
        patch_size: the new side of a patch.

    Returns:
        ``[C, 3, patch_size, patch_size]`` in float32 (float64 stays); `weight` itself if it is that size already.
    """
    if weight.shape[-1] == patch_size:
        return weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return F.interpolate(wide, size=(patch_size, patch_size), mode="bicubic", align_corners=False)


def axial_rope(
    head_dim: int, grid_size: int, reference_grid: int, theta: float = 10000.0, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the axial rotary embedding of a square patch grid.

    The first half of a head's channels turns with the patch's row, the second with its column; neighbouring channels are
    a pair and share an angle. Positions run over ``[0, reference_grid)`` whatever the grid, so that a finer grid
    interpolates.

    Args:
        head_dim: channels of a head, a multiple of 4.
        grid_size: patches along a side.
        reference_grid: patches along a side during pre-training.
        theta: base of the frequencies.
        device: where the tables are made.

    Returns:
        ``(cos, sin)``, each float32 ``[grid_size**2, head_dim]``, patches row-major.

    Source: EVA-02 (arXiv 2303.11331).
    """
    axis_dim = head_dim // 2
    frequencies = theta ** (-torch.arange(0, axis_dim, 2, device=device).float() / axis_dim)
    positions = torch.arange(grid_size, device=device).float() / grid_size * reference_grid
    angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=-1)  # [g, head_dim / 2]
    rows = angles[:, None].expand(grid_size, grid_size, axis_dim)
    columns = angles[None].expand(grid_size, grid_size, axis_dim)
    table = torch.cat((rows, columns), dim=-1).reshape(grid_size**2, head_dim)
    return table.cos(), table.sin()


def subimage_position_embedding(
    places: list[tuple[int, int] | None], dim: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return `tile_position_embedding` of every tile, float32 ``[len(places), dim]``.

    Args:
        places: (row, column) of each tile, or None for a thumbnail.
        dim: width, a multiple of 4.
        device: where the result is made.
    """
    return tile_position_embedding(encode_places(places, device), dim)


def encode_places(places: list[tuple[int, int] | None], device: torch.device | None = None) -> torch.Tensor:
    """Return places as numbers, int64 ``[len(places), 2]``, `THUMBNAIL` for None."""
    return torch.tensor([place or THUMBNAIL for place in places], dtype=torch.int64, device=device).view(-1, 2)


def tile_position_embedding(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """2D sinusoidal embedding POS(row, column) of every tile; a thumbnail has the zero vector.

    ``POS[2i] = sin(row / 10000^(4i / dim))``, ``POS[2i + 1] = cos(...)`` for the first half of the channels, the same with
    the column for the second half.

    Args:
        positions: int ``[tiles, 2]``, (row, column) of each tile, `THUMBNAIL` for a thumbnail.
        dim: width, a multiple of 4.

    Returns:
        float32 ``[tiles, dim]``.

    Source: Wang & Liu 2021 (arXiv 1908.11415), as InfiMM-HD uses it (arXiv 2403.01487, section 3).
    """
    frequencies = 10000.0 ** (-torch.arange(0, dim // 2, 2, device=positions.device).float() * 2 / dim)  # [dim / 4]
    angles = positions.float()[..., None] * frequencies  # [tiles, 2, dim / 4]
    embedding = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # [tiles, dim]
    return embedding * (positions[:, :1] >= 0)
