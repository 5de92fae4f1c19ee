"""The pass in front of every attention's backward: ``delta = sum(out * dout)`` of each query."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from infimm_fast.kernels.common.launch import unit_strides
from infimm_fast.kernels.common.tiles import UNSPECIALISED, load_rows_at, locate

DELTA_ROWS = 64


class Tiling(NamedTuple):
    """The constants of the kernel, as the attentions have them; BLOCK_M is `DELTA_ROWS`."""

    D: int
    COVER: tuple[int, ...]
    ALIGN: int
    WIDE: bool
    PACKED: bool = False
    BLOCK_M: int = DELTA_ROWS


@triton.jit(do_not_specialize=UNSPECIALISED)
def delta_kernel(
    out_ptr, grad_ptr, lengths_ptr, num_tokens, max_tokens, num_heads,
    stride_ob, stride_on, stride_oh, stride_gb, stride_gn, stride_gh,
    delta_ptr,
    T: tl.constexpr,
):  # fmt: skip
    """``delta = sum over channels of out * dout`` in fp32."""
    block, batch, head, first, length, stored = locate(
        tl.program_id(0), tl.cdiv(max_tokens, T.BLOCK_M), num_heads, num_tokens, lengths_ptr, T.PACKED
    )
    row = block * T.BLOCK_M
    out = load_rows_at(out_ptr, batch, head, first + row, stride_ob, stride_on, stride_oh, length - row, ROWS=T.BLOCK_M, T=T)
    grad = load_rows_at(
        grad_ptr, batch, head, first + row, stride_gb, stride_gn, stride_gh, length - row, ROWS=T.BLOCK_M, T=T
    )
    delta = tl.full([T.BLOCK_M], 0.0, tl.float32)
    for i in tl.static_range(len(T.COVER)):
        delta += tl.sum(out[i].to(tl.float32) * grad[i].to(tl.float32), axis=1)
    delta_ptr += (batch.to(tl.int64) * num_heads + head) * num_tokens + first
    index = row + tl.arange(0, T.BLOCK_M)
    tl.store(delta_ptr + index, delta, mask=index < stored)


def launch_delta(
    out: torch.Tensor,
    grad: torch.Tensor,
    tiling: Tiling,
    *,
    sequences: int,
    max_tokens: int,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return delta, fp32 ``[B, H, N]``.

    Args:
        out: the forward's output, ``[B, N, H, D]``, last axis contiguous.
        grad: its gradient, likewise.
        tiling: constants.
        sequences: as many as there are, packed or one a tile.
        max_tokens: upper bound of a sequence's length.
        lengths: as `locate` reads them, or None if all are N.
    """
    batch, tokens, heads, _ = out.shape
    delta = torch.empty((batch, heads, tokens), dtype=torch.float32, device=out.device)
    delta_kernel[(triton.cdiv(max_tokens, DELTA_ROWS) * heads * sequences,)](
        out, grad, lengths, tokens, max_tokens, heads, *unit_strides(tiling.ALIGN, out, grad), delta, T=tiling,
        num_warps=4,
    )  # fmt: skip
    return delta
