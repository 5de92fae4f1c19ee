"""How a picture becomes sub-images: the grid, the number of tiles and their places. Plain Python, shared by all parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def choose_grid(height: int, width: int, tile_size: int, min_grid: int = 1, max_grid: int = 3) -> tuple[int, int]:
    """Return (rows, columns): the nearest multiples of the tile size, halves rounded up, clamped to the limits.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        tile_size: side of a sub-image, in pixels.
        min_grid: fewest sub-images along a side.
        max_grid: most sub-images along a side.

    Source: InfiMM-HD's dynamic resolution (arXiv 2403.01487, section 3).
    """

    def count(side: int) -> int:
        return min(max((2 * side + tile_size) // (2 * tile_size), min_grid), max_grid)

    return count(height), count(width)


def has_thumbnail(rows: int, columns: int, always_thumbnail: bool = False) -> bool:
    """Whether a thumbnail of the whole picture follows its sub-images."""
    return always_thumbnail or rows * columns > 1


def tile_count(rows: int, columns: int, always_thumbnail: bool = False) -> int:
    """Tiles of one picture: its sub-images and its thumbnail, if it has one."""
    return rows * columns + has_thumbnail(rows, columns, always_thumbnail)


def tile_places(grids: Iterable[Sequence[int]], always_thumbnail: bool = False) -> list[tuple[int, int] | None]:
    """Return the place of every tile of all pictures in packed order: (row, column), or None for a thumbnail."""
    places: list[tuple[int, int] | None] = []
    for rows, columns in grids:
        places += [(row, column) for row in range(rows) for column in range(columns)]
        if has_thumbnail(rows, columns, always_thumbnail):
            places.append(None)
    return places
