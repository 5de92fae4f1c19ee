"""The pass in front of every attention's backward: ``delta = sum(out * dout)`` of each query."""

from __future__ import annotations

import triton
import triton.language as tl

from infimm_fast.kernels.common.tiles import UNSPECIALISED, head_start, load_tile, locate, row_offsets

DELTA_ROWS = 64


@triton.jit(do_not_specialize=UNSPECIALISED)
def delta_kernel(
    out_ptr, grad_ptr, lengths_ptr, num_tokens, max_tokens, num_heads,
    stride_ob, stride_on, stride_oh, stride_gb, stride_gn, stride_gh,
    delta_ptr,
    D: tl.constexpr, COVER: tl.constexpr, BLOCK_M: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """``delta = sum over channels of out * dout`` in fp32."""
    block, batch, head, first, length, stored = locate(
        tl.program_id(0), tl.cdiv(max_tokens, BLOCK_M), num_heads, num_tokens, lengths_ptr, PACKED
    )
    row = block * BLOCK_M
    out_ptr = head_start(out_ptr, batch, head, first + row, stride_ob, stride_on, stride_oh, ALIGN)
    grad_ptr = head_start(grad_ptr, batch, head, first + row, stride_gb, stride_gn, stride_gh, ALIGN)
    out = load_tile(out_ptr, row_offsets(BLOCK_M, stride_on, ALIGN, WIDE), length - row, D, COVER, True)
    grad = load_tile(grad_ptr, row_offsets(BLOCK_M, stride_gn, ALIGN, WIDE), length - row, D, COVER, True)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(len(COVER)):
        delta += tl.sum(out[i].to(tl.float32) * grad[i].to(tl.float32), axis=1)
    delta_ptr += (batch.to(tl.int64) * num_heads + head) * num_tokens + first
    index = row + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + index, delta, mask=index < stored)
