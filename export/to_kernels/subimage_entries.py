"""Sub-image attention with the shortest parameter lists, for callers that are no Python: contiguous tensors in, one out.

The launchers' kernels take every stride as an argument. These entries derive the strides from head counts and head dims
that are compiled in; what remains are the inputs' pointers, the lengths that vary, as int32, and the output's pointer.
TensorRT passes a plugin's kernel exactly that. Flags and floats are constants.

A compiler that takes an entry into a package (`to_aoti`) copies its source and that of all it calls, each under its own
name, and writes the constants down. So nothing is imported under another name, the constants come one by one, and what
makes a NamedTuple of them imports its class itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from infimm_fast.kernels.subimage.forward import forward_kernel

# Contiguous rows of a head dim that is a multiple of 8 start at multiples of 8 elements.
ALIGN = tl.constexpr(8)


@triton.constexpr_function
def subimage_tiling(head_dim, cover, block_m, block_n, peel, masked, causal, align):
    """Return the constants of sub-image attention."""
    from infimm_fast.kernels.subimage.config import Tiling

    return Tiling(head_dim, tuple(cover), block_m, block_n, peel, masked, ALIGN=align, WIDE=False, CAUSAL=causal)


@triton.jit(do_not_specialize=["num_tokens"])
def subimage_attention_packed_entry(
    qkv_ptr, num_tokens, out_ptr,
    H: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, COVER: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PEEL: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """``qkv [B, N, 3, H, D] -> out [B, N, H, D]``."""
    attend_tiles(
        qkv_ptr, qkv_ptr + H * D, qkv_ptr + 2 * H * D, num_tokens, out_ptr, TOKEN_STRIDE=3 * H * D, H=H, SCALE=SCALE,
        T=subimage_tiling(D, COVER, BLOCK_M, BLOCK_N, PEEL, MASKED, CAUSAL, ALIGN),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def subimage_attention_entry(
    q_ptr, k_ptr, v_ptr, num_tokens, out_ptr,
    H: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, COVER: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PEEL: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """``q, k, v [B, N, H, D] -> out [B, N, H, D]``."""
    attend_tiles(
        q_ptr, k_ptr, v_ptr, num_tokens, out_ptr, TOKEN_STRIDE=H * D, H=H, SCALE=SCALE,
        T=subimage_tiling(D, COVER, BLOCK_M, BLOCK_N, PEEL, MASKED, CAUSAL, ALIGN),
    )  # fmt: skip


@triton.jit
def attend_tiles(
    q_ptr, k_ptr, v_ptr, num_tokens, out_ptr,
    TOKEN_STRIDE: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Run the op's kernel on tensors whose tokens are TOKEN_STRIDE elements apart and whose tiles are contiguous."""
    # Added to nothing, the constants become values of the type that the kernel computes with.
    nothing = num_tokens * 0
    stride_n = nothing + TOKEN_STRIDE // ALIGN
    stride_h = nothing + T.D // ALIGN
    stride_b = num_tokens * (TOKEN_STRIDE // ALIGN)
    forward_kernel(
        q_ptr, k_ptr, v_ptr, cos_ptr=None, sin_ptr=None, lengths_ptr=None, scale=SCALE, num_tokens=num_tokens,
        max_tokens=num_tokens, num_heads=nothing + H, rope_prefix=0,
        stride_qb=stride_b, stride_qn=stride_n, stride_qh=stride_h,
        stride_kb=stride_b, stride_kn=stride_n, stride_kh=stride_h,
        stride_vb=stride_b, stride_vn=stride_n, stride_vh=stride_h, out_ptr=out_ptr, lse_ptr=None, T=T,
    )  # fmt: skip
