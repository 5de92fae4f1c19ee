"""Kernels with the shortest parameter lists, for callers that are no Python: contiguous tensors in, one tensor out.

The launchers' kernels take every stride as an argument. These entries derive the strides from head counts and head dims
that are compiled in; what remains are the inputs' pointers, the lengths that vary, as int32, and the output's pointer.
TensorRT passes a plugin's kernel exactly that. Flags and floats are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from infimm_fast.kernels.interval.forward import forward_kernel as cross_attention_kernel
from infimm_fast.kernels.subimage.forward import forward_kernel as subimage_kernel

# Contiguous rows of a head dim that is a multiple of 8 start at multiples of 8 elements.
ALIGN = tl.constexpr(8)


@triton.jit(do_not_specialize=["num_tokens"])
def subimage_attention_packed_entry(
    qkv_ptr,
    num_tokens,
    out_ptr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    COVER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PEEL: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """``qkv [B, N, 3, H, D] -> out [B, N, H, D]``."""
    attend_tiles(
        qkv_ptr, qkv_ptr + H * D, qkv_ptr + 2 * H * D, num_tokens, out_ptr, 3 * H * D, H, SCALE, D, COVER, BLOCK_M,
        BLOCK_N, PEEL, MASKED, CAUSAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def subimage_attention_entry(
    q_ptr,
    k_ptr,
    v_ptr,
    num_tokens,
    out_ptr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    COVER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PEEL: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """``q, k, v [B, N, H, D] -> out [B, N, H, D]``."""
    attend_tiles(
        q_ptr, k_ptr, v_ptr, num_tokens, out_ptr, H * D, H, SCALE, D, COVER, BLOCK_M, BLOCK_N, PEEL, MASKED, CAUSAL
    )  # fmt: skip


@triton.jit
def attend_tiles(
    q_ptr,
    k_ptr,
    v_ptr,
    num_tokens,
    out_ptr,
    TOKEN_STRIDE: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    COVER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PEEL: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Run the op's kernel on tensors whose tokens are TOKEN_STRIDE elements apart and whose tiles are contiguous."""
    # Added to nothing, the constants become values of the type that the kernel computes with.
    nothing = num_tokens * 0
    stride_n = nothing + TOKEN_STRIDE // ALIGN
    stride_h = nothing + D // ALIGN
    stride_b = num_tokens * (TOKEN_STRIDE // ALIGN)
    subimage_kernel(
        q_ptr, k_ptr, v_ptr, None, None, None, SCALE, num_tokens, num_tokens, nothing + H, 0,
        stride_b, stride_n, stride_h, stride_b, stride_n, stride_h, stride_b, stride_n, stride_h, out_ptr, None,
        D, COVER, BLOCK_M, BLOCK_N, PEEL, MASKED, ALIGN, False, False, CAUSAL, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_keys"])
def interval_attention_entry(
    q_ptr,
    k_ptr,
    v_ptr,
    range_ptr,
    num_tokens,
    num_keys,
    out_ptr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    COVER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``q [B, T, H, D], k, v [S, H / GROUP, D], kv_range [B, T, 2] -> out [B, T, H, D]``."""
    nothing = num_tokens * 0
    kv_heads = nothing + H // GROUP
    stride_qn = nothing + H * D // ALIGN
    stride_kn = nothing + H // GROUP * D // ALIGN
    stride_h = nothing + D // ALIGN
    cross_attention_kernel(
        q_ptr, k_ptr, v_ptr, range_ptr, SCALE, num_tokens, kv_heads, num_keys,
        num_tokens * (H * D // ALIGN), stride_qn, stride_h, stride_kn, stride_h, stride_kn, stride_h,
        num_tokens * 2, nothing + 2, 1, out_ptr, None, D, COVER, BLOCK_M, BLOCK_N, GROUP, ALIGN, False,
    )  # fmt: skip
