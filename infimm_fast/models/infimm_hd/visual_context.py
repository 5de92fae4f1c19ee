"""Packed visual tokens, and which of them each text token sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from infimm_fast.errors import CheckpointError, ImageCountError

KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class VisualContext:
    """The pictures of a batch, encoded once: reused by every decoding step, beam and further question.

    Attributes:
        features: visual tokens of all pictures end to end, ``[S, C]``.
        image_offsets: int64 ``[images + 1]``; picture i is ``features[image_offsets[i]:image_offsets[i + 1]]``.
        row_images: int64 ``[rows, 2]``; the pictures of a row, in the order of its ``<image>`` tokens, are the half-open
            range ``row_images[row]``. Rows may share pictures.
        key_values: keys and values of each gated block, ``[S, heads, head_dim]`` each; None if every step is to project
            them anew.
    """

    features: torch.Tensor
    image_offsets: torch.Tensor
    row_images: torch.Tensor
    key_values: tuple[KeyValue, ...] | None = None

    @property
    def images_per_row(self) -> torch.Tensor:
        """int64 ``[rows]``."""
        return self.row_images[:, 1] - self.row_images[:, 0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the visual tokens and of all keys and values."""
        pairs = self.key_values or ()
        return self.features.nbytes + sum(key.nbytes + value.nbytes for key, value in pairs)

    def _map_tokens(self, change: Callable[[torch.Tensor], torch.Tensor]) -> VisualContext:
        """Apply a function to every tensor that has one row for each visual token."""
        pairs = self.key_values
        key_values = None if pairs is None else tuple((change(key), change(value)) for key, value in pairs)
        return replace(self, features=change(self.features), key_values=key_values)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> VisualContext:
        """Return the context on another device, or with its tokens, keys and values in another dtype."""
        moved = self._map_tokens(lambda tensor: tensor.to(device=device, dtype=dtype))
        return replace(moved, image_offsets=self.image_offsets.to(device), row_images=self.row_images.to(device))

    def select_rows(self, rows: torch.Tensor) -> VisualContext:
        """Return a context whose row i is row ``rows[i]`` of this one; pictures are shared, not copied.

        Args:
            rows: int64 ``[new_rows]``.
        """
        return replace(self, row_images=self.row_images[rows.to(self.row_images.device)])

    def limit_images(self, counts: torch.Tensor) -> VisualContext:
        """Return a context whose rows keep only their first ``counts[row]`` pictures (int64 ``[rows]``)."""
        end = self.row_images[:, 0] + torch.minimum(counts, self.images_per_row)
        return replace(self, row_images=torch.stack((self.row_images[:, 0], end), dim=1))

    @classmethod
    def concatenate(cls, contexts: Sequence[VisualContext]) -> VisualContext:
        """Return one context with the rows of several, in order; pictures are copied.

        Raises:
            ImageCountError: there is none, or only some of them have keys and values.
        """
        if not contexts or len({context.key_values is None for context in contexts}) > 1:
            raise ImageCountError(f"{len(contexts)} contexts cannot be joined: all or none must have keys and values")
        pairs = None
        if contexts[0].key_values is not None:
            blocks = zip(*(context.key_values or () for context in contexts), strict=True)
            pairs = tuple(
                (torch.cat([key for key, _ in block]), torch.cat([value for _, value in block])) for block in blocks
            )
        offsets, rows, tokens, images = [contexts[0].image_offsets[:1]], [], 0, 0
        for context in contexts:
            offsets.append(context.image_offsets[1:] + tokens)
            rows.append(context.row_images + images)
            tokens, images = tokens + len(context.features), images + len(context.image_offsets) - 1
        return cls(torch.cat([context.features for context in contexts]), torch.cat(offsets), torch.cat(rows), pairs)

    def repack(self, pictures: Sequence[Sequence[int]] | None = None) -> VisualContext:
        """Return a context of its own for a choice of pictures: copied, unused ones dropped, each row's ones in order.

        Rows that shared a picture have a copy each afterwards; compare `nbytes` to see what that costs.

        Args:
            pictures: pictures of each row; None for the rows as they are.
        """
        if pictures is None:
            pictures = [list(range(first, last)) for first, last in self.row_images.tolist()]
        bounds = self.image_offsets.tolist()
        chosen = [picture for row in pictures for picture in row]
        index = torch.cat([torch.arange(bounds[picture], bounds[picture + 1]) for picture in chosen] or [torch.arange(0)])
        index = index.to(self.features.device)
        sizes = torch.tensor([0, *(bounds[picture + 1] - bounds[picture] for picture in chosen)])
        counts = torch.tensor([len(row) for row in pictures])
        repacked = self._map_tokens(lambda tensor: tensor[index])
        return replace(
            repacked,
            image_offsets=sizes.cumsum(0).to(self.image_offsets.device),
            row_images=consecutive_ranges(counts).to(self.row_images.device),
        )

    def append(self, later: VisualContext) -> VisualContext:
        """Return a context whose rows have their own pictures and then those of `later`, as in a further turn of a chat.

        A row's pictures must lie in order, so this repacks, which copies everything.

        Args:
            later: a context of the same number of rows.

        Raises:
            ImageCountError: the numbers of rows differ.
        """
        rows = len(self.row_images)
        if len(later.row_images) != rows:
            raise ImageCountError(f"there are {rows} rows, but {len(later.row_images)} to append")
        joined = VisualContext.concatenate((self, later))
        ranges = [list(range(first, last)) for first, last in joined.row_images.tolist()]
        return joined.repack([ranges[row] + ranges[rows + row] for row in range(rows)])

    def save(self, file: str | Path) -> None:
        """Write the context to a safetensors file; nothing is left of it if that fails.

        Raises:
            OSError: the file cannot be written.
        """
        tensors = {"features": self.features, "image_offsets": self.image_offsets, "row_images": self.row_images}
        for index, (key, value) in enumerate(self.key_values or ()):
            tensors |= {f"key_values.{index}.key": key, f"key_values.{index}.value": value}
        file = Path(file)
        partial = file.with_name(f".{file.name}.partial")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            partial.rename(file)
        except SafetensorError as error:
            raise OSError(f"{file} cannot be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | Path, device: torch.device | str = "cpu") -> VisualContext:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is not such a context.
        """
        try:
            tensors = load_file(file, device=str(device))
            blocks = sum(name.endswith(".key") for name in tensors)
            pairs = tuple((tensors[f"key_values.{i}.key"], tensors[f"key_values.{i}.value"]) for i in range(blocks))
            return cls(tensors["features"], tensors["image_offsets"], tensors["row_images"], pairs or None)
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(f"{file} is not a saved VisualContext: {error}") from error

    def kv_range(self, images_so_far: torch.Tensor, only_immediate: bool) -> torch.Tensor:
        """Return the interval of visual tokens that each text token attends to.

        Args:
            images_so_far: int64 ``[rows, T]``, ``<image>`` tokens of the row up to and including each token. Counts beyond
                the row's pictures mean its last picture.
            only_immediate: True for the latest picture, False for all pictures so far.

        Returns:
            int64 ``[rows, T, 2]``, half-open; (0, 0) for text before the first picture.
        """
        first = self.row_images[:, :1]
        count = torch.minimum(images_so_far, self.images_per_row[:, None])
        last = first + count
        begin = last - 1 if only_immediate else first.expand_as(last)
        interval = torch.stack((self.image_offsets[begin.clamp(min=0)], self.image_offsets[last]), dim=-1)
        return interval * (count > 0)[..., None]


def consecutive_ranges(counts: torch.Tensor) -> torch.Tensor:
    """Return the half-open ranges, int64 ``[rows, 2]``, of items that lie row after row, ``counts[row]`` of them each."""
    ends = counts.cumsum(0)
    return torch.stack((ends - counts, ends), dim=1)


def count_images(is_image_token: torch.Tensor, images_seen: torch.Tensor | None = None) -> torch.Tensor:
    """Return how many ``<image>`` tokens stand at or before each token.

    Args:
        is_image_token: bool ``[rows, T]``.
        images_seen: int64 ``[rows]``, those before the first of these tokens; None for none.

    Returns:
        int64 ``[rows, T]``.
    """
    count = is_image_token.long().cumsum(dim=1)
    return count if images_seen is None else count + images_seen[:, None]
