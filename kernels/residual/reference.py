"""The maths of the gated residual in plain PyTorch: the oracle that every backend is compared with."""

from __future__ import annotations

import torch


def row_factors(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor | None:
    """Return `keep` ``[B]`` in at least float32 with as many axes as `x`, so that it broadcasts; None stays None."""
    if keep is None:
        return None
    wide = torch.promote_types(x.dtype, torch.float32)
    return keep.detach().to(wide).view(-1, *[1] * (x.dim() - 1))


def gated_sum(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Return ``x + keep * tanh(gate) * y``, computed in at least float32 and rounded once to the dtype of `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    slope, factor = torch.tanh(gate.to(wide)), row_factors(x, keep)
    wide_x, wide_y = x.to(wide), y.to(wide)
    if factor is None:
        return (wide_x + slope * wide_y).to(x.dtype)
    # Selected before and after: whatever y holds in a row that is not kept, neither result nor gradients see it.
    wide_y = torch.where(factor != 0, wide_y, 0.0)
    return torch.where(factor != 0, wide_x + factor * slope * wide_y, wide_x).to(x.dtype)


def gated_residual_reference(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    keep: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``out = x + keep * tanh(gate) * y`` and its LayerNorm, each computed in at least float32 and rounded once.

    Args:
        x: ``[B, ..., C]``.
        y: like `x`.
        gate: ``[C]`` or ``[1]``.
        keep: ``[B]``, or None for all ones.
        norm_weight: ``[C]``, or None for no LayerNorm.
        norm_bias: ``[C]``, or None for no LayerNorm.
        norm_eps: added to the variance.

    Returns:
        ``out`` and ``normed`` (or None), in the dtype of `x`. ``normed`` is computed from ``out`` as it is stored.
    """
    out = gated_sum(x, y, gate, keep)
    if norm_weight is None or norm_bias is None:
        return out, None
    stored = out.to(torch.promote_types(x.dtype, torch.float32))
    centred = stored - stored.mean(-1, keepdim=True)
    normal = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm_eps)
    return out, (normal * norm_weight.to(stored.dtype) + norm_bias.to(stored.dtype)).to(x.dtype)
