"""Packed visual tokens, and which of them each text token sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

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
