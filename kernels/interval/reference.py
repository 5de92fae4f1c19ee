"""The maths of interval cross-attention in plain PyTorch: the oracle that every backend is compared with."""

from __future__ import annotations

import torch


def interval_mask(kv_range: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Return the boolean mask ``[..., num_keys]`` of the half-open intervals ``kv_range [..., 2]``."""
    index = torch.arange(num_keys, device=kv_range.device)
    return (index >= kv_range[..., :1]) & (index < kv_range[..., 1:])


def interval_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_range: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, with the row's scores and mask in memory; softmax in at least float32.

    Each row reads the visual tokens between its smallest start and its largest end, as a model that keeps one tensor of
    images for each row would.

    Args:
        q: ``[B, T, Hq, D]``.
        k: ``[S, Hkv, D]``.
        v: ``[S, Hkv, D]``.
        kv_range: ``[B, T, 2]``, half-open, absolute indices into S.
        scale: multiplies the scores.

    Returns:
        The output ``[B, T, Hq, D]`` in the dtype of `q` and the log-sum-exp of the scaled scores ``[B, Hq, T]``. A token
        with an empty interval has output 0 and log-sum-exp -inf.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[1]
    kv_range = kv_range.clamp(0, k.shape[0])
    outputs, lses = [], []
    # Read once for all rows, since the host waits for the device.
    for row_q, row_range, bounds in zip(q, kv_range, kv_range.tolist(), strict=True):
        visible = [(start, end) for start, end in bounds if start < end]
        first = min((start for start, _ in visible), default=0)
        last = max((end for _, end in visible), default=0)
        row_k = k[first:last].repeat_interleave(group, dim=1)  # [L, Hq, D]
        row_v = v[first:last].repeat_interleave(group, dim=1)
        mask = interval_mask(row_range - first, last - first)  # [T, L]
        scores = torch.einsum("thd,lhd->htl", row_q, row_k).to(wide) * scale  # [Hq, T, L]
        scores = scores.masked_fill(~mask, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)  # [Hq, T]
        empty = ~mask.any(-1)
        scores = scores.masked_fill(empty[:, None], 0.0)
        probabilities = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0).to(q.dtype)
        outputs.append(torch.einsum("htl,lhd->thd", probabilities, row_v))
        lses.append(lse)
    return torch.stack(outputs), torch.stack(lses)
