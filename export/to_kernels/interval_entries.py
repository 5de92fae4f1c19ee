"""Interval attention with the shortest parameter list, for callers that are no Python: contiguous tensors in, one out.

See `subimage_entries`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from infimm_fast.kernels.interval.forward import forward_kernel

# Contiguous rows of a head dim that is a multiple of 8 start at multiples of 8 elements.
ALIGN = tl.constexpr(8)


@triton.constexpr_function
def interval_tiling(head_dim, cover, block_m, block_n, group, align):
    """Return the constants of interval attention."""
    from infimm_fast.kernels.interval.config import Tiling

    return Tiling(head_dim, tuple(cover), block_m, block_n, group, ALIGN=align, WIDE=False)


@triton.jit(do_not_specialize=["num_tokens", "num_keys"])
def interval_attention_entry(
    q_ptr, k_ptr, v_ptr, range_ptr, num_tokens, num_keys, out_ptr,
    H: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, COVER: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``q [B, T, H, D], k, v [S, H / GROUP, D], kv_range [B, T, 2] -> out [B, T, H, D]``."""
    nothing = num_tokens * 0
    stride_qn = nothing + H * D // ALIGN
    stride_kn = nothing + H // GROUP * D // ALIGN
    stride_h = nothing + D // ALIGN
    forward_kernel(
        q_ptr, k_ptr, v_ptr, range_ptr, scale=SCALE, num_tokens=num_tokens, num_kv_heads=nothing + H // GROUP,
        num_keys=num_keys, stride_qb=num_tokens * (H * D // ALIGN), stride_qn=stride_qn, stride_qh=stride_h,
        stride_kn=stride_kn, stride_kh=stride_h, stride_vn=stride_kn, stride_vh=stride_h,
        stride_rb=num_tokens * 2, stride_rt=nothing + 2, stride_re=1, out_ptr=out_ptr, lse_ptr=None,
        T=interval_tiling(D, COVER, BLOCK_M, BLOCK_N, GROUP, ALIGN),
    )  # fmt: skip
