"""The public function: semantics, checks and the choice of backend."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch

from infimm_fast.kernels.common.checks import SUPPORTED_DTYPES, KernelArgumentError, check_same_kind, check_shape
from infimm_fast.kernels.common.launch import calls_operator, can_read, settle_backend, triton_obstacle
from infimm_fast.kernels.interval import ops
from infimm_fast.kernels.interval.reference import interval_attention_reference

_INDICES = (torch.int32, torch.int64)


@overload
def interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_range: torch.Tensor, *, scale: float | None = None,
    validate: bool = False, return_lse: Literal[False] = False, backend: str = "auto",
) -> torch.Tensor: ...  # fmt: skip


@overload
def interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_range: torch.Tensor, *, scale: float | None = None,
    validate: bool = False, return_lse: Literal[True], backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_range: torch.Tensor,
    *,
    scale: float | None = None,
    validate: bool = False,
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
        q: queries ``[B, T, Hq, D]``, fp16, bf16 or fp32 (fp64 not in Triton); any strides. Tensors are read in place if
            their last axis is contiguous.
        k: keys ``[S, Hkv, D]``, Hq a multiple of Hkv; any token stride.
        v: values, like `k`.
        kv_range: int32 or int64 ``[B, T, 2]``, half-open ``[start, end)``, absolute indices into S, clamped to ``[0, S]``.
            ``start >= end`` is an empty interval: output exactly 0, log-sum-exp -inf, gradients 0.
        scale: multiplies the scores, positive; default ``D ** -0.5``.
        validate: check that all bounds lie in ``[0, S]``. The host waits for the device; skipped under `torch.compile`,
            `torch.export` and graph capture, where it cannot.
        return_lse: also return the log-sum-exp of the scaled scores (natural log, fp32, ``[B, Hq, T]``); not
            differentiable.
        backend: ``"triton"`` for the fused kernel (CUDA; CPU under ``TRITON_INTERPRET=1``), ``"sdpa"`` for PyTorch's
            fused attention, ``"reference"`` for the plain statement, ``"auto"`` for Triton where it can run and SDPA
            elsewhere. SDPA has one dense mask ``[B * T, S]``, so that every row pays for all rows' pictures; on a CPU,
            outside tracing, it reads the intervals and needs none.

    Returns:
        ``[B, T, Hq, D]`` in the dtype of `q`, or the pair of it and the log-sum-exp. Triton's is contiguous, so that
        ``reshape(B, T, Hq * D)`` is free.

    Raises:
        KernelArgumentError: an argument does not fit the others, or the backend does not take it.
        BackendUnavailableError: ``"triton"`` was asked for and cannot run here.

    Source: the gated cross-attention of Flamingo (arXiv 2204.14198, section 3.1.2) as InfiMM-HD uses it
    (arXiv 2403.01487, section 3); FlashAttention-2 (arXiv 2307.08691) for the tiling, online softmax and backward.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    _check(q, k, v, kv_range, scale)
    if validate and can_read(kv_range):
        _check_bounds(kv_range, k.shape[0])
    chosen = settle_backend(backend, q, lambda: triton_obstacle(q))
    if calls_operator(chosen):
        out, lse = torch.ops.infimm_fast.interval_attention(q, k, v, kv_range, scale, chosen)
        return (out, lse) if return_lse else out
    if chosen == "reference":
        out, lse = interval_attention_reference(q, k, v, kv_range, scale)
        return (out, lse.detach().float()) if return_lse else out
    out = ops.composite_forward(q, k, v, kv_range, scale)
    if not return_lse:
        return out
    with torch.no_grad():
        return out, ops.composite_lse(q, k, kv_range, scale)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_range: torch.Tensor, scale: float) -> None:
    # At first in one expression: a decoding step on a CPU waits for every call that is made before its work begins.
    q_shape, k_shape, dtype, device = q.shape, k.shape, q.dtype, q.device
    fits = len(q_shape) == 4 and len(k_shape) == 3 and q_shape[3] == k_shape[2] and v.shape == k_shape
    fits = fits and kv_range.shape == (q_shape[0], q_shape[1], 2) and kv_range.dtype in _INDICES
    fits = fits and dtype in SUPPORTED_DTYPES and dtype == k.dtype == v.dtype
    if not (fits and device == k.device == v.device == kv_range.device):
        _check_tensors(q, k, v, kv_range)
    heads, kv_heads = q_shape[2], k_shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise KernelArgumentError(f"q has {heads} heads and k has {kv_heads}; the first must be a multiple")
    if not 0.0 < scale < math.inf:
        raise KernelArgumentError(f"scale={scale} is not accepted; it must be a positive number")


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_range: torch.Tensor) -> None:
    """Raise what says which tensor does not fit."""
    if q.dim() != 4:
        check_shape("q", q, (None, None, None, None), "[B, T, Hq, D]")
    if k.dim() != 3 or k.shape[2] != q.shape[3]:
        check_shape("k", k, (None, None, q.shape[3]), "[S, Hkv, D]")
    check_shape("v", v, k.shape, "[S, Hkv, D] of k")
    check_shape("kv_range", kv_range, (q.shape[0], q.shape[1], 2), "[B, T, 2]")
    check_same_kind("q", q, k=k, v=v)
    if kv_range.dtype not in _INDICES or kv_range.device != q.device:
        raise KernelArgumentError(
            f"kv_range is {kv_range.dtype} on {kv_range.device}; accepted are int32, int64 on {q.device}"
        )


def _check_bounds(kv_range: torch.Tensor, num_keys: int) -> None:
    if kv_range.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.stack(kv_range.aminmax()).tolist())
    if low < 0 or high > num_keys:
        raise KernelArgumentError(f"kv_range holds bounds from {low} to {high}; accepted are 0 to {num_keys}, the size of k")
