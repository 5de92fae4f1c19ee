"""Dense attention masks in which each token sees adjacent keys, as intervals; and back.

Transformers hands its attention functions dense masks ``[B, 1, T, S]``, `interval_attention` reads one interval of
keys for each token. Whether a mask has that form is known only from its values, so that finding out makes the host wait
for the device: once for each mask tensor, and never where values cannot be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from infimm_fast.kernels.interval.reference import interval_mask


@dataclass(frozen=True)
class MaskIntervals:
    """What a dense mask says.

    Attributes:
        kv_range: int64 ``[B, T, 2]`` as `intervals_of_mask` returns it; None if some token's keys are not adjacent.
        averages: some token's keys are all hidden, but by finite numbers. Softmax over equal large numbers is uniform,
            so that such a token receives the mean of all values, where one hidden by False or -inf receives 0.
    """

    kv_range: torch.Tensor | None
    averages: bool = False


def intervals_of_mask(mask: torch.Tensor) -> torch.Tensor | None:
    """Return the keys that each query token sees as half-open intervals, if they are adjacent; waits for the device.

    A mask and its intervals, for 5 tokens and 6 keys::

        ■ ■ ■ ⬚ ⬚ ⬚   (0, 3)
        ⬚ ⬚ ■ ■ ⬚ ⬚   (2, 4)
        ■ ■ ■ ■ ■ ■   (0, 6)
        ⬚ ⬚ ⬚ ⬚ ⬚ ⬚   (0, 0): sees nothing
        ■ ⬚ ⬚ ■ ⬚ ⬚   a hole: the mask as a whole has no intervals

    Args:
        mask: ``[B, 1, T, S]``; bool, True where a key is seen, or floating, added to the scores: 0 where a key is seen,
            -inf or the dtype's smallest number (at least half of it) where it is hidden. B and T may be 1 to broadcast.

    Returns:
        int64 ``[B, T, 2]``, indices into the row's own S keys, (0, 0) for a token that sees nothing; or None if some
        token's keys are not adjacent, or the mask has another shape, other values, or differs between heads.
        `pack_intervals` makes them indices into the packed keys of all rows.
    """
    return _analyse(mask).kv_range


def mask_of_intervals(kv_range: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Return the dense mask of some intervals, the inverse of `intervals_of_mask`.

    Args:
        kv_range: int ``[B, T, 2]``, half-open, indices into a row's own keys; empty where ``start >= end``.
        num_keys: S, keys of a row.

    Returns:
        bool ``[B, 1, T, S]``, True where a key is seen.
    """
    return interval_mask(kv_range, num_keys)[:, None]


def pack_intervals(kv_range: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Turn intervals of each row's own keys into intervals of the packed keys of all rows, ``b * S + key``.

    Args:
        kv_range: int ``[B, T, 2]``; clamped to ``[0, S]``, so that no token reaches another row's keys.
        num_keys: S, keys of a row.

    Returns:
        ``[B, T, 2]`` for `infimm_fast.kernels.interval_attention`, in the dtype given.
    """
    first = torch.arange(kv_range.shape[0], device=kv_range.device, dtype=kv_range.dtype) * num_keys
    return kv_range.clamp(0, num_keys) + first[:, None, None]


# Mask tensor -> (its version, which every change in place raises, and what it says). An entry goes with its tensor, and
# another tensor never finds it, even at the same address.
_known_masks = WeakTensorKeyDictionary()


def read_mask(mask: torch.Tensor) -> MaskIntervals:
    """Say what a mask tensor holds; all attention layers that get the same unchanged tensor share one answer.

    Args:
        mask: like that of `intervals_of_mask`, where `infimm_fast.kernels.common.launch.can_read` allows it.
    """
    if mask.is_inference():
        return _analyse(mask)  # such tensors do not count their changes
    version, known = _known_masks.get(mask, (None, None))
    if known is None or version != mask._version:
        known = _analyse(mask)
        _known_masks[mask] = (mask._version, known)
    return known


@torch.no_grad()
def _analyse(mask: torch.Tensor) -> MaskIntervals:
    if mask.dim() != 4 or mask.shape[1] != 1:
        return MaskIntervals(None)
    mask = mask[:, 0]  # [B, T, S]
    if mask.shape[2] == 0:
        return MaskIntervals(torch.zeros((*mask.shape[:2], 2), dtype=torch.int64, device=mask.device))
    if mask.dtype == torch.bool:
        visible = mask
        understood, averages = mask.new_ones(()), mask.new_zeros(())
    elif mask.is_floating_point():
        visible = mask == 0
        understood = (visible | (mask <= torch.finfo(mask.dtype).min / 2)).all()
        averages = (~visible.any(-1) & ~torch.isneginf(mask).all(-1)).any()
    else:
        return MaskIntervals(None)
    start = visible.view(torch.uint8).argmax(-1)  # the first of equal maxima
    kv_range = torch.stack((start, start + visible.sum(-1)), dim=-1)
    # If a token's keys are adjacent, their first and their number give the mask back.
    adjacent = (interval_mask(kv_range, mask.shape[2]) == visible).all()
    is_interval, has_averages = torch.stack((adjacent & understood, averages)).tolist()  # the one wait
    return MaskIntervals(kv_range if is_interval else None, has_averages)
