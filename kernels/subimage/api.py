"""The public functions: semantics, checks and the choice of backend."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch

from infimm_fast.kernels.common.checks import KernelArgumentError, check_same_kind, check_shape
from infimm_fast.kernels.common.launch import calls_operator, settle_backend, triton_obstacle
from infimm_fast.kernels.subimage import ops
from infimm_fast.kernels.subimage.options import Options
from infimm_fast.kernels.subimage.reference import subimage_attention_reference

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@overload
def subimage_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None, rope_prefix: int = 0, rope_interleaved: bool = True,
    seqlens: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None, max_seqlen: int | None = None,
    is_causal: bool = False, return_lse: Literal[False] = False, backend: str = "auto",
) -> torch.Tensor: ...  # fmt: skip


@overload
def subimage_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None, rope_prefix: int = 0, rope_interleaved: bool = True,
    seqlens: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None, max_seqlen: int | None = None,
    is_causal: bool = False, return_lse: Literal[True], backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def subimage_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None,
    rope_prefix: int = 0,
    rope_interleaved: bool = True,
    seqlens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Result:
    """Self-attention inside every tile of a batch of tiles; no score matrix in memory.

    With `seqlens` (here 3 and 5), or the same tokens end to end with ``cu_seqlens = [0, 3, 8]`` and no padding::

        tile 0   k0 k1 k2 -- --        tile 1   k0 k1 k2 k3 k4
            q0   #  #  #                   q0   #  #  #  #  #
            q1   #  #  #                   ..
            q2   #  #  #                   q4   #  #  #  #  #
            --   output 0, log-sum-exp -inf, gradients 0

    Args:
        q: queries ``[B, N, H, D]`` (tiles, tokens, heads, head dim), fp16, bf16 or fp32 (fp64 not in Triton); any
            strides. They are read in place if the last axis is contiguous.
        k: keys, like `q`.
        v: values, like `q`.
        scale: multiplies the scores, positive; default ``D ** -0.5``.
        rope_cos: cosines ``[N - rope_prefix, D]`` of the tower's rotary position embedding, or None for no RoPE. A
            constant: it gets no gradient from Triton.
        rope_sin: sines, like `rope_cos`.
        rope_prefix: leading tokens that RoPE leaves alone (1 for a class token); 0 with `cu_seqlens`, where a class
            token has an angle of 0 in the tables instead.
        rope_interleaved: RoPE pairs are channels ``(2i, 2i + 1)`` as in EVA02; False pairs ``(i, i + D / 2)`` as Qwen.
        seqlens: int32 or int64 ``[B]``, valid tokens of each tile, clamped to ``[0, N]``. What is stored in the others
            does not matter.
        cu_seqlens: int32 or int64 ``[sequences + 1]``, non-decreasing: B is 1, and sequence i holds the tokens from
            ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``. Tokens outside every sequence are padding. The values are not
            checked.
        max_seqlen: with `cu_seqlens`, an upper bound of the sequences' lengths; default N, which is correct but
            launches more programs than needed. Ignored without `cu_seqlens`.
        is_causal: a token sees no later token of its tile.
        return_lse: also return the log-sum-exp of the scaled scores (natural log, fp32, ``[B, H, N]``); not
            differentiable.
        backend: ``"triton"`` for the fused kernel (CUDA; CPU under ``TRITON_INTERPRET=1``), ``"sdpa"`` for PyTorch's
            fused attention, ``"reference"`` for the plain statement with the score matrix in memory, ``"auto"`` for
            Triton where it can run and SDPA elsewhere.

    Returns:
        ``[B, N, H, D]`` in the dtype of `q`, or the pair of it and the log-sum-exp. Triton's is contiguous, so that
        ``reshape(B, N, H * D)`` is free.

    Raises:
        KernelArgumentError: an argument does not fit the others, or the backend does not take it.
        BackendUnavailableError: ``"triton"`` was asked for and cannot run here.

    Source: ViT self-attention (arXiv 2010.11929); EVA-CLIP's towers (arXiv 2303.15389); FlashAttention-2 (arXiv
    2307.08691) for the tiling, online softmax and backward.
    """
    check_shape("q", q, (None, None, None, None), "[B, N, H, D]")
    check_shape("k", k, tuple(q.shape), "[B, N, H, D] of q")
    check_shape("v", v, tuple(q.shape), "[B, N, H, D] of q")
    check_same_kind("q", q, k=k, v=v)
    options = Options(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale), rope_cos=rope_cos, rope_sin=rope_sin,
        rope_prefix=rope_prefix, rope_interleaved=rope_interleaved, seqlens=seqlens, cu_seqlens=cu_seqlens,
        max_seqlen=q.shape[1] if max_seqlen is None else max_seqlen, is_causal=is_causal, backend=backend,
    )  # fmt: skip
    options = _settle(q, options)
    if calls_operator(options.backend):
        out, lse = torch.ops.infimm_fast.subimage_attention(q, k, v, *options)
        return (out, lse) if return_lse else out
    return _composed(q, k, v, options, return_lse)


@overload
def subimage_attention_packed(
    qkv: torch.Tensor, *, scale: float | None = None, rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None, rope_prefix: int = 0, rope_interleaved: bool = True,
    seqlens: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None, max_seqlen: int | None = None,
    is_causal: bool = False, return_lse: Literal[False] = False, backend: str = "auto",
) -> torch.Tensor: ...  # fmt: skip


@overload
def subimage_attention_packed(
    qkv: torch.Tensor, *, scale: float | None = None, rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None, rope_prefix: int = 0, rope_interleaved: bool = True,
    seqlens: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None, max_seqlen: int | None = None,
    is_causal: bool = False, return_lse: Literal[True], backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def subimage_attention_packed(
    qkv: torch.Tensor,
    *,
    scale: float | None = None,
    rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None,
    rope_prefix: int = 0,
    rope_interleaved: bool = True,
    seqlens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Result:
    """`subimage_attention` of the output of one qkv projection; the gradient is one packed tensor, written once.

    Args:
        qkv: ``[B, N, 3, H, D]``.
        scale: see `subimage_attention`, like all that follow.
        rope_cos: see `subimage_attention`.
        rope_sin: see `subimage_attention`.
        rope_prefix: see `subimage_attention`.
        rope_interleaved: see `subimage_attention`.
        seqlens: see `subimage_attention`.
        cu_seqlens: see `subimage_attention`.
        max_seqlen: see `subimage_attention`.
        is_causal: see `subimage_attention`.
        return_lse: see `subimage_attention`.
        backend: see `subimage_attention`.

    Returns:
        See `subimage_attention`.

    Raises:
        KernelArgumentError: see `subimage_attention`.
        BackendUnavailableError: see `subimage_attention`.
    """
    check_shape("qkv", qkv, (None, None, 3, None, None), "[B, N, 3, H, D]")
    check_same_kind("qkv", qkv)
    q, k, v = qkv.unbind(2)
    options = Options(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale), rope_cos=rope_cos, rope_sin=rope_sin,
        rope_prefix=rope_prefix, rope_interleaved=rope_interleaved, seqlens=seqlens, cu_seqlens=cu_seqlens,
        max_seqlen=q.shape[1] if max_seqlen is None else max_seqlen, is_causal=is_causal, backend=backend,
    )  # fmt: skip
    options = _settle(q, options)
    if calls_operator(options.backend):
        out, lse = torch.ops.infimm_fast.subimage_attention_packed(qkv, *options)
        return (out, lse) if return_lse else out
    return _composed(q, k, v, options, return_lse)


def _settle(q: torch.Tensor, options: Options) -> Options:
    """Check what both functions share; return the options as the operators take them, with the backend chosen."""
    if not 0.0 < options.scale < math.inf:
        raise KernelArgumentError(f"scale={options.scale} is not accepted; it must be a positive number")
    _check_rope(q, options)
    _check_lengths(q, options)
    chosen = settle_backend(options.backend, q, lambda: triton_obstacle(q) or _rope_obstacle(options), stacklevel=4)
    return options._replace(max_seqlen=options.max_seqlen if options.packed else q.shape[1], backend=chosen)


def _check_rope(q: torch.Tensor, options: Options) -> None:
    cos, sin, prefix = options.rope_cos, options.rope_sin, options.rope_prefix
    if (cos is None) != (sin is None):
        raise KernelArgumentError("rope_cos and rope_sin go together; only one of them was given")
    if cos is None or sin is None:
        return
    if not 0 <= prefix <= q.shape[1]:
        raise KernelArgumentError(f"rope_prefix={prefix} is outside [0, N] = [0, {q.shape[1]}]")
    if prefix and options.packed:
        raise KernelArgumentError("rope_prefix must be 0 with cu_seqlens; give a prefix token cosine 1 and sine 0")
    if q.shape[3] % 2:
        raise KernelArgumentError(f"RoPE turns pairs of channels; the head dim {q.shape[3]} is odd")
    for name, table in (("rope_cos", cos), ("rope_sin", sin)):
        check_shape(name, table, (q.shape[1] - prefix, q.shape[3]), "[N - rope_prefix, D]")
        if table.device != q.device or not table.is_floating_point():
            raise KernelArgumentError(f"{name} is {table.dtype} on {table.device}; expected floating point on {q.device}")


def _check_lengths(q: torch.Tensor, options: Options) -> None:
    seqlens, cu_seqlens, max_seqlen = options.seqlens, options.cu_seqlens, options.max_seqlen
    if seqlens is not None and cu_seqlens is not None:
        raise KernelArgumentError("seqlens (padded tiles) and cu_seqlens (packed sequences) exclude each other")
    if seqlens is not None:
        check_shape("seqlens", seqlens, (q.shape[0],), "[B]")
    if cu_seqlens is not None:
        check_shape("cu_seqlens", cu_seqlens, (None,), "[sequences + 1]")
        if q.shape[0] != 1 or cu_seqlens.shape[0] < 2:
            raise KernelArgumentError(
                f"cu_seqlens has {cu_seqlens.shape[0]} entries and B is {q.shape[0]}; expected at least 2, and B = 1"
            )
        if max_seqlen < 1 <= q.shape[1]:
            raise KernelArgumentError(f"max_seqlen={max_seqlen} is not accepted; it must be at least 1")
    for name, lengths in (("seqlens", seqlens), ("cu_seqlens", cu_seqlens)):
        if lengths is not None and (lengths.dtype not in (torch.int32, torch.int64) or lengths.device != q.device):
            raise KernelArgumentError(
                f"{name} is {lengths.dtype} on {lengths.device}; expected int32 or int64 on {q.device}"
            )


def _rope_obstacle(options: Options) -> str | None:
    """Return why the kernel does not take these tables, or None."""
    tables = (options.rope_cos, options.rope_sin)
    if torch.is_grad_enabled() and any(table is not None and table.requires_grad for table in tables):
        return "the kernel takes RoPE tables as constants, and these require a gradient"
    return None


def _composed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, return_lse: bool) -> Result:
    """Backends made of ordinary, traceable PyTorch functions."""
    q, k, seqlens = ops.rotate(q, options), ops.rotate(k, options), options.seqlens
    if options.backend == "reference":
        q, k, v = ops.drop_padding(seqlens, q, k, v)
        out, lse = subimage_attention_reference(q, k, v, options.scale, seqlens, options.cu_seqlens, options.is_causal)
        (out,) = ops.drop_padding(seqlens, out)  # for the backward: whatever gradient arrives for padding stays there
        return (out, lse.detach()) if return_lse else out
    out = ops.composite_forward(q, k, v, options)
    if not return_lse:
        return out
    with torch.no_grad():
        q, k = ops.drop_padding(seqlens, q, k)
        return out, ops.composite_lse(q, k, options)
