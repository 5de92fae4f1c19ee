"""The public function: semantics, checks and the choice of backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from infimm_fast.kernels.common.checks import KernelArgumentError, check_choice, check_same_kind, check_shape
from infimm_fast.kernels.gated_cross_attention.reference import gated_cross_attention_reference, interval_mask

BACKENDS = ("auto", "sdpa", "reference")


def gated_cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_range: torch.Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention from text tokens to packed visual tokens; each text token sees one contiguous interval of them.

    The visual tokens of all pictures of all rows lie end to end, without padding::

        S:        | picture 0 | picture 1      | picture 2 |
        row 0, t0 |           |                |           |   kv_range (0, 0): nothing seen, output exactly 0
        row 0, t1 |###########|                |           |   kv_range (0, 4)
        row 0, t2 |           |################|           |   kv_range (4, 9): "immediate" mode
        row 1, t0 |           |                |###########|   kv_range (9, 12)

    Args:
        q: queries ``[B, T, Hq, D]``.
        k: keys ``[S, Hkv, D]``, Hq a multiple of Hkv; any token stride.
        v: values, like `k`.
        kv_range: int32 or int64 ``[B, T, 2]``, half-open ``[start, end)``, absolute indices into S, clamped to ``[0, S]``.
            ``start >= end`` is an empty interval: output exactly 0, log-sum-exp -inf, gradients 0.
        scale: multiplies the scores; default ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores (natural log, fp32, ``[B, Hq, T]``). It is not
            differentiable, and only the reference backend computes it.
        backend: ``"sdpa"`` for PyTorch's fused attention over one dense mask ``[B * T, S]`` (no device sync, but every row
            pays for all rows' pictures), ``"reference"`` for the plain statement, ``"auto"`` for the best one available.

    Returns:
        ``[B, T, Hq, D]`` in the dtype of `q`, or the pair of it and the log-sum-exp.

    Raises:
        KernelArgumentError: shapes, dtypes or devices do not fit together, or the backend is not known.

    Source: the gated cross-attention of Flamingo (arXiv 2204.14198, section 3.1.2) as InfiMM-HD uses it
    (arXiv 2403.01487, section 3).
    """
    check_choice("backend", backend, BACKENDS)
    check_shape("q", q, (None, None, None, None), "[B, T, Hq, D]")
    check_shape("k", k, (None, None, q.shape[3]), "[S, Hkv, D]")
    check_shape("v", v, tuple(k.shape), "[S, Hkv, D] of k")
    check_shape("kv_range", kv_range, (q.shape[0], q.shape[1], 2), "[B, T, 2]")
    check_same_kind("q", q, k=k, v=v)
    if kv_range.dtype not in (torch.int32, torch.int64):
        raise KernelArgumentError(f"kv_range has dtype {kv_range.dtype}; accepted are int32, int64")
    if k.shape[1] == 0 or q.shape[2] % k.shape[1]:
        raise KernelArgumentError(f"q has {q.shape[2]} heads and k has {k.shape[1]}; the first must be a multiple")
    if return_lse and backend == "sdpa":
        raise KernelArgumentError(
            "backend='sdpa' has no log-sum-exp to return; accepted with return_lse are reference, auto"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference" or return_lse:
        out, lse = gated_cross_attention_reference(q, k, v, kv_range, scale)
        return (out, lse.detach()) if return_lse else out
    return _sdpa(q, k, v, kv_range, scale)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_range: torch.Tensor, scale: float) -> torch.Tensor:
    """Fold batch and text into one query axis; no fully masked row ever reaches the softmax."""
    batch, length, heads, head_dim = q.shape
    if k.shape[0] == 0:
        return torch.zeros_like(q)
    kv_range = kv_range.clamp(0, k.shape[0]).reshape(batch * length, 2)
    nonempty = kv_range[:, 0] < kv_range[:, 1]
    # A token that sees nothing is shown key 0, and its result is dropped: softmax over no key would be NaN.
    start = torch.where(nonempty, kv_range[:, 0], 0)
    end = torch.where(nonempty, kv_range[:, 1], 1)
    mask = interval_mask(torch.stack((start, end), dim=-1), k.shape[0])  # [B * T, S]
    out = F.scaled_dot_product_attention(
        q.reshape(1, batch * length, heads, head_dim).transpose(1, 2),
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask[None, None],
        scale=scale,
        enable_gqa=heads != k.shape[1],
    )
    out = out.transpose(1, 2).reshape(batch, length, heads, head_dim)
    return out.masked_fill(~nonempty.view(batch, length, 1, 1), 0.0)
