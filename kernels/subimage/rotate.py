"""Rotary position embedding in Triton: of a query tile in registers, and of a whole tensor as a pass of its own.

Queries are rotated where they are loaded. Keys are rotated once by the pass: inside the attention kernel every query
tile would rotate all keys again, and keys that go through registers cannot be copied to shared memory asynchronously.
The backward runs on rotated copies and turns the gradients back in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infimm_fast.kernels.common.launch import common_alignment, device_guard, rows_are_wide, unit_strides
from infimm_fast.kernels.common.tiles import UNSPECIALISED, head_start, piece_start, piece_width, row_offsets
from infimm_fast.kernels.subimage.options import Options

ROTATE_ROWS = 64


@triton.jit
def rotate_piece(
    block, ptr, o_row, rows_left, angle_row, cos_ptr, sin_ptr,
    D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotate ``[rows, WIDTH]``; the partners, which may lie in another piece, are loaded again."""
    o_d = START + tl.arange(0, WIDTH)[None, :]
    if INTERLEAVED:
        o_partner = o_d ^ 1
        sign = tl.where(o_d % 2 == 0, -1.0, 1.0)
    else:
        o_partner = tl.where(o_d < D // 2, o_d + D // 2, o_d - D // 2)
        sign = tl.where(o_d < D // 2, -1.0, 1.0)
    index = tl.arange(0, o_row.shape[0])[:, None]
    # Row r of the tile turns by row (angle_row + r) of the tables; negative ones are the prefix.
    m_turn = (index < rows_left) & (angle_row + index >= 0) & (o_d < D)
    b_partner = tl.load(ptr + o_row + o_partner, mask=m_turn, other=0.0).to(tl.float32)
    o_angle = (angle_row + index).to(tl.int64) * D + o_d
    b_cos = tl.load(cos_ptr + o_angle, mask=m_turn, other=1.0).to(tl.float32)
    b_sin = tl.load(sin_ptr + o_angle, mask=m_turn, other=0.0).to(tl.float32)
    turned = block.to(tl.float32) * b_cos + sign * b_partner * b_sin
    return tl.where(m_turn, turned.to(block.dtype), block)


@triton.jit
def rotate_tile(tile, ptr, o_row, rows_left, angle_row, cos_ptr, sin_ptr, T: tl.constexpr):
    """Rotate a tile that was loaded from `ptr`; rounded back to its dtype."""
    result = ()
    for i in tl.static_range(len(T.COVER)):
        turned = rotate_piece(
            tile[i], ptr, o_row, rows_left, angle_row, cos_ptr, sin_ptr, T.D, START=piece_start(T.COVER, i),
            WIDTH=piece_width(T.COVER, i), INTERLEAVED=T.INTERLEAVED,
        )  # fmt: skip
        result += (turned,)
    return result


@triton.jit(do_not_specialize=UNSPECIALISED)
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, num_tokens, num_heads, prefix,
    stride_xb, stride_xn, stride_xh, stride_ob, stride_on, stride_oh,
    out_ptr,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS tokens of one head, pair by pair, so that `out_ptr` may be `x_ptr`."""
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(num_tokens, ROWS)
    row = pid % num_blocks * ROWS
    head = pid // num_blocks % num_heads
    batch = pid // num_blocks // num_heads
    x_ptr = head_start(x_ptr, batch, head, row, stride_xb, stride_xn, stride_xh, ALIGN)
    out_ptr = head_start(out_ptr, batch, head, row, stride_ob, stride_on, stride_oh, ALIGN)
    pair = tl.arange(0, HALF)[None, :]
    o_first = pair * 2 if INTERLEAVED else pair
    o_second = pair * 2 + 1 if INTERLEAVED else pair + D // 2
    index = tl.arange(0, ROWS)[:, None]
    m_pair = (row + index < num_tokens) & (pair < D // 2)
    m_turn = m_pair & (row + index >= prefix)

    # Every block below is [ROWS, HALF].
    o_x = row_offsets(ROWS, stride_xn, ALIGN, WIDE)
    b_first = tl.load(x_ptr + o_x + o_first, mask=m_pair, other=0.0)
    b_second = tl.load(x_ptr + o_x + o_second, mask=m_pair, other=0.0)
    o_angle = (row + index - prefix).to(tl.int64) * D
    cos_first = tl.load(cos_ptr + o_angle + o_first, mask=m_turn, other=1.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + o_angle + o_second, mask=m_turn, other=1.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + o_angle + o_first, mask=m_turn, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + o_angle + o_second, mask=m_turn, other=0.0).to(tl.float32)

    first = b_first.to(tl.float32)
    second = b_second.to(tl.float32)
    if TRANSPOSE:
        out_first = first * cos_first + second * sin_second
        out_second = second * cos_second - first * sin_first
    else:
        out_first = first * cos_first - second * sin_first
        out_second = second * cos_second + first * sin_second
    o_out = row_offsets(ROWS, stride_on, ALIGN, WIDE)
    out_first = tl.where(m_turn, out_first.to(b_first.dtype), b_first)
    out_second = tl.where(m_turn, out_second.to(b_first.dtype), b_second)
    tl.store(out_ptr + o_out + o_first, out_first, mask=m_pair)
    tl.store(out_ptr + o_out + o_second, out_second, mask=m_pair)


def contiguous_tables(options: Options) -> Options:
    """Return `options` with contiguous RoPE tables, if there are any."""
    if options.rope_cos is None or options.rope_sin is None:
        return options
    return options._replace(rope_cos=options.rope_cos.contiguous(), rope_sin=options.rope_sin.contiguous())


def rotated(x: torch.Tensor, options: Options) -> torch.Tensor:
    """Return queries or keys turned by their angles, contiguous; without RoPE `x` itself."""
    if options.rope_cos is None:
        return x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_rotate(x, options, out=out)
    return out


def launch_rotate(x: torch.Tensor, options: Options, *, out: torch.Tensor, transpose: bool = False) -> None:
    """Write the rotation of `x` (or its transpose, the rotation's backward) into `out`, which may be `x` itself.

    Args:
        x: ``[B, N, H, D]``, last axis contiguous.
        options: with contiguous RoPE tables.
        out: like `x`.
        transpose: apply the transposed rotation.
    """
    batch, tokens, heads, head_dim = x.shape
    align = common_alignment(x, out)
    grid = (triton.cdiv(tokens, ROTATE_ROWS) * batch * heads,)
    with device_guard(x):
        rotate_kernel[grid](
            x, options.rope_cos, options.rope_sin, tokens, heads, options.rope_prefix,
            *unit_strides(align, x, out), out,
            D=head_dim, HALF=triton.next_power_of_2(head_dim // 2), ROWS=ROTATE_ROWS, ALIGN=align,
            WIDE=rows_are_wide(ROTATE_ROWS, x, out), INTERLEAVED=options.rope_interleaved, TRANSPOSE=transpose,
            num_warps=4,
        )  # fmt: skip
