"""What both kernels are made of: where rows lie, tanh of the gate, and the arithmetic of one step of rows.

A row is one token; a tile of rows is a tuple of blocks on a cover of the channels, as in `common/tiles.py`. Channels
past C are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from infimm_fast.kernels.common.tiles import piece_start, piece_width


@triton.jit
def locate_rows(first, last, rows_per_batch, keep_ptr, BLOCK_M: tl.constexpr):
    """Return (row, whether it exists, keep) of BLOCK_M rows; keep is fp32, and 0 for a row that does not exist."""
    row = first + tl.arange(0, BLOCK_M)
    m_row = row < last
    keep = tl.where(m_row, 1.0, 0.0)
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + row // rows_per_batch, mask=m_row, other=0).to(tl.float32)
    return row, m_row, keep


@triton.jit
def input_offsets(row, rows_per_batch, stride_b, stride_n, ALIGN: tl.constexpr):
    """Return the offsets ``[rows, 1]`` of rows of a tensor ``[B, N, C]``; strides are in units of ALIGN elements."""
    batch = (row // rows_per_batch).to(tl.int64)
    token = (row % rows_per_batch).to(tl.int64)
    return ((batch * stride_b + token * stride_n) * ALIGN)[:, None]


@triton.jit
def output_offsets(row, C: tl.constexpr):
    """Return the offsets ``[rows, 1]`` of rows of a contiguous tensor."""
    return row.to(tl.int64)[:, None] * C


@triton.jit
def load_channels(ptr, T: tl.constexpr, STRIDE: tl.constexpr):
    """Load one vector as a tile with one row, fp32; a stride of 0 repeats its first element."""
    tile = ()
    for i in tl.static_range(len(T.COVER)):
        o_c = piece_start(T.COVER, i) + tl.arange(0, piece_width(T.COVER, i))[None, :]
        tile += (tl.load(ptr + o_c * STRIDE, mask=o_c < T.D, other=0.0).to(tl.float32),)
    return tile


@triton.jit
def tanh(x):
    """Hyperbolic tangent in fp32, to a few units in the last place.

    Close to 0, where ``1 - 2 / (exp(2x) + 1)`` cancels, Lambert's continued fraction ``x / (1 + x^2 / (3 + x^2 / (5 +
    x^2 / (7 + x^2 / 9))))``: its relative error is below 1e-8 up to 5/8.
    """
    square = x * x
    fraction = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + square * 15.0))
    size = tl.abs(x)
    tail = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, fraction, tl.where(x < 0, -tail, tail))


@triton.jit
def load_slope(gate_ptr, T: tl.constexpr):
    """Return ``tanh(gate)`` as a tile with one row, fp32."""
    gate = load_channels(gate_ptr, T, T.GATE_STRIDE)
    slope = ()
    for i in tl.static_range(len(T.COVER)):
        slope += (tanh(gate[i]),)
    return slope


@triton.jit
def normalise(tile, eps, T: tl.constexpr):
    """Return every row with mean 0 and variance 1, fp32, and the factor ``[rows]`` that gave it variance 1."""
    total = tl.sum(tile[0].to(tl.float32), axis=1)
    for i in tl.static_range(1, len(T.COVER)):
        total += tl.sum(tile[i].to(tl.float32), axis=1)
    mean = total / T.D
    square = mean * 0.0
    centred = ()
    for i in tl.static_range(len(T.COVER)):
        block = tile[i].to(tl.float32) - mean[:, None]
        if piece_start(T.COVER, i) + piece_width(T.COVER, i) > T.D:
            o_c = piece_start(T.COVER, i) + tl.arange(0, piece_width(T.COVER, i))[None, :]
            block = tl.where(o_c < T.D, block, 0.0)
        square += tl.sum(block * block, axis=1)
        centred += (block,)
    rstd = 1.0 / tl.sqrt(square / T.D + eps)
    normal = ()
    for i in tl.static_range(len(T.COVER)):
        normal += (centred[i] * rstd[:, None],)
    return normal, rstd


@triton.jit
def add_gated(x, y, slope, keep):
    """Return ``x + keep * slope * y`` in the dtype of x; rows that are not kept are x to the bit."""
    out = ()
    for i in tl.static_range(len(x)):
        wide = x[i].to(tl.float32)
        moved = wide + keep[:, None] * slope[i] * y[i].to(tl.float32)
        out += (tl.where(keep[:, None] != 0, moved, wide).to(x[i].dtype),)
    return out


@triton.jit
def apply_affine(normal, weight, bias):
    """Return ``normal * weight + bias``."""
    result = ()
    for i in tl.static_range(len(normal)):
        result += (normal[i] * weight[i] + bias[i],)
    return result


@triton.jit
def add_norm_gradient(grad, grad_normed, normal, rstd, weight, T: tl.constexpr):
    """Return `grad` plus the gradient that reaches the LayerNorm's input, fp32."""
    mean_grad = rstd * 0.0
    mean_product = rstd * 0.0
    for i in tl.static_range(len(T.COVER)):
        scaled = grad_normed[i].to(tl.float32) * weight[i]
        mean_grad += tl.sum(scaled, axis=1) / T.D
        mean_product += tl.sum(scaled * normal[i], axis=1) / T.D
    result = ()
    for i in tl.static_range(len(T.COVER)):
        scaled = grad_normed[i].to(tl.float32) * weight[i]
        through = scaled - mean_grad[:, None] - normal[i] * mean_product[:, None]
        result += (grad[i].to(tl.float32) + through * rstd[:, None],)
    return result


@triton.jit
def keep_rows(grad, keep):
    """Return ``keep * grad`` in fp32, 0 in rows that are not kept."""
    result = ()
    for i in tl.static_range(len(grad)):
        result += (tl.where(keep[:, None] != 0, keep[:, None] * grad[i].to(tl.float32), 0.0),)
    return result


@triton.jit
def multiply(a, b):
    """Return ``a * b``."""
    result = ()
    for i in tl.static_range(len(a)):
        result += (a[i] * b[i],)
    return result


@triton.jit
def scale_by_derivative(dgate, slope):
    """Return `dgate` times the derivative of tanh, ``1 - slope^2``."""
    result = ()
    for i in tl.static_range(len(dgate)):
        result += (dgate[i] * (1.0 - slope[i] * slope[i]),)
    return result


@triton.jit
def add_products(acc, a, b):
    """Return ``acc + a * b``."""
    result = ()
    for i in tl.static_range(len(acc)):
        result += (acc[i] + a[i].to(tl.float32) * b[i].to(tl.float32),)
    return result


@triton.jit
def add_tiles(acc, tile):
    """Return ``acc + tile``."""
    result = ()
    for i in tl.static_range(len(acc)):
        result += (acc[i] + tile[i].to(tl.float32),)
    return result


@triton.jit
def store_partial(ptr, kind: tl.constexpr, acc, T: tl.constexpr):
    """Store the sum over the rows of `acc` as this program's row of ``[kinds, programs, C]``."""
    ptr += (tl.num_programs(0) * kind + tl.program_id(0)).to(tl.int64) * T.D
    for i in tl.static_range(len(T.COVER)):
        o_c = piece_start(T.COVER, i) + tl.arange(0, piece_width(T.COVER, i))
        tl.store(ptr + o_c, tl.sum(acc[i], axis=0), mask=o_c < T.D)
