"""Transparent twins of our operators: `triton_op`s, whose kernels a compiler sees and can take into a package.

The public operators are opaque to compilers, which makes them work everywhere and leaves a Python call in the package. A
twin does the same by launching the contiguous entries through `wrap_triton`. It only works on CUDA tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import triton_op, wrap_triton

from infimm_fast.export.to_kernels.sources import cross_attention_source, subimage_source
from infimm_fast.kernels.common.launch import capability
from infimm_fast.kernels.common.offline import KernelSource
from infimm_fast.kernels.subimage.ops import rotate
from infimm_fast.kernels.subimage.options import Options


def _launch(
    source: KernelSource, programs: Any, inputs: tuple[torch.Tensor, ...], scalars: tuple[Any, ...], out: Any
) -> None:
    """Launch an entry: inputs' pointers, scalars, the output's pointer, constants."""
    # Compilers know no cap on registers; it only helps occupancy.
    options = {name: value for name, value in source.options.items() if name != "maxnreg"}
    wrap_triton(source.kernel)[(programs,)](*inputs, *scalars, out, **source.constants, **options)


@triton_op("infimm_fast::subimage_attention_triton", mutates_args=())
def subimage_attention_triton(qkv: torch.Tensor, scale: float, is_causal: bool) -> torch.Tensor:
    """Sub-image attention of packed ``[B, N, 3, H, D]``, contiguous: ``[B, N, H, D]``."""
    batch, tokens, _, heads, head_dim = qkv.shape
    known = tokens if isinstance(tokens, int) else None
    sm = capability(qkv)
    source = subimage_source(heads, head_dim, qkv.dtype, known, sm, scale, packed=True, causal=is_causal)
    out = qkv.new_empty((batch, tokens, heads, head_dim))
    peel, block_m = source.constants["PEEL"], source.constants["BLOCK_M"]
    blocks = (tokens - peel + block_m - 1) // block_m + peel
    _launch(source, blocks * heads * batch, (qkv,), (tokens,), out)
    return out


@triton_op("infimm_fast::interval_attention_triton", mutates_args=())
def interval_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_range: torch.Tensor, scale: float
) -> torch.Tensor:
    """Gated cross-attention of contiguous tensors: q ``[B, T, Hq, D]``, k and v ``[S, Hkv, D]``, kv_range ``[B, T, 2]``."""
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    source = cross_attention_source(heads, kv_heads, head_dim, q.dtype, kv_range.dtype, capability(q), scale)
    out = torch.empty_like(q)
    block_m = source.constants["BLOCK_M"]
    tiles = (tokens * (heads // kv_heads) + block_m - 1) // block_m
    _launch(source, tiles * kv_heads * batch, (q, k, v, kv_range), (tokens, keys), out)
    return out


def _packed(qkv: torch.Tensor, *arguments: Any) -> tuple:
    options = Options(*arguments)
    if options.lengths is not None:
        raise NotImplementedError("packages take sub-image attention without seqlens and cu_seqlens")
    if options.rope_cos is not None:
        q, k, v = qkv.unbind(2)
        qkv = torch.stack((rotate(q, options), rotate(k, options), v), dim=2)
    out = subimage_attention_triton(qkv.contiguous(), options.scale, options.is_causal)
    return out, _no_lse(out)


def _separate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> tuple:
    return _packed(torch.stack((q, k, v), dim=2), *options)


def _cross(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_range: torch.Tensor, scale: float, backend: str) -> tuple:
    out = interval_attention_triton(*(x.contiguous() for x in (q, k, v, kv_range)), scale)
    return out, _no_lse(out)


def _no_lse(out: torch.Tensor) -> torch.Tensor:
    """Return a placeholder of the log-sum-exp's shape; inference does not read it, and the compiler drops it."""
    batch, tokens, heads, _ = out.shape
    return out.new_empty((batch, heads, tokens), dtype=torch.float32)


TWINS: dict[Any, Callable[..., Any]] = {
    torch.ops.infimm_fast.subimage_attention_packed.default: _packed,
    torch.ops.infimm_fast.subimage_attention.default: _separate,
    torch.ops.infimm_fast.interval_attention.default: _cross,
}
