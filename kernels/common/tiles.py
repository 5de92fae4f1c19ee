"""Pieces that the Triton kernels share: where a program's rows lie, and tiles of rows on a cover of the head dim.

A tile is a tuple of blocks ``[rows, width]``, one for each power of two in COVER; the widths add up to at least D, and
channels past D read as 0. A padded head dim is the cover with one piece. Strides are counted in units of ALIGN
elements.

A kernel's constants travel as one NamedTuple, T, which each op defines in its ``config.py``; what is here needs D and
COVER of it. Sizes and strides are no part of it: Triton specialises a tuple's integers whatever `do_not_specialize` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Parameters of the kernels for which Triton compiles no special versions: a new length or layout compiles nothing. Names
# that a kernel does not have are ignored. Alignment is known otherwise, see `common_alignment`.
_SIZES = (
    "num_batches", "num_tokens", "max_tokens", "num_heads", "num_kv_heads", "num_keys", "num_rows", "num_units",
    "num_splits", "max_splits", "pool", "group_size", "rope_prefix", "prefix", "rows_per_batch", "rows_per_program",
)  # fmt: skip
UNSPECIALISED = [*_SIZES, *(f"stride_{tensor}{axis}" for tensor in "qkvgonxyr" for axis in "bnhte")]


@triton.constexpr_function
def piece_width(cover, index):
    """Return the width of one piece of the cover."""
    return cover[index]


@triton.constexpr_function
def piece_start(cover, index):
    """Return the first channel of one piece of the cover."""
    return sum(cover[:index])


@triton.jit
def locate(pid, num_blocks, num_heads, num_tokens, lengths_ptr, PACKED: tl.constexpr):
    """Return (block, batch, head, first row, valid length, stored rows) of a program.

    Blocks of one head are neighbours, so that they share the head's keys and values in L2. Rows between the valid
    length and the stored rows are padding. PACKED: lengths_ptr holds cumulative offsets, the batch index is 0.
    """
    block = pid % num_blocks
    head = (pid // num_blocks) % num_heads
    batch = pid // num_blocks // num_heads
    first = (batch * 0).to(tl.int64)
    length = num_tokens
    stored = num_tokens
    if PACKED:
        first = tl.load(lengths_ptr + batch).to(tl.int64)
        length = (tl.load(lengths_ptr + batch + 1).to(tl.int64) - first).to(tl.int32)
        stored = length
        batch = batch * 0
    elif lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), num_tokens).to(tl.int32)
    return block, batch, head, first, length, stored


@triton.jit
def head_start(ptr, batch, head, row, stride_b, stride_n, stride_h, ALIGN: tl.constexpr):
    """Return the pointer to one row of one head; 64-bit, since a batch stride can pass 2^31 elements."""
    offset = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_n
    return ptr + offset * ALIGN


@triton.jit
def row_offsets(ROWS: tl.constexpr, stride_n, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """Return the offsets ``[ROWS, 1]`` of consecutive rows."""
    offs = tl.arange(0, ROWS)
    if WIDE:
        offs = offs.to(tl.int64)
    return offs[:, None] * (stride_n * ALIGN)


@triton.jit
def load_piece(ptr, o_row, rows_left, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Load ``[rows, WIDTH]`` from channel START on; masks appear only where something can be outside."""
    o_d = START + tl.arange(0, WIDTH)[None, :]
    p_block = ptr + o_row + o_d
    if MASKED:
        m_row = tl.arange(0, o_row.shape[0])[:, None] < rows_left
        return tl.load(p_block, mask=m_row & (o_d < D), other=0.0)
    elif START + WIDTH > D:
        return tl.load(p_block, mask=o_d < D, other=0.0)
    else:
        return tl.load(p_block)


@triton.jit
def load_tile(ptr, o_row, rows_left, T: tl.constexpr, MASKED: tl.constexpr):
    """Load consecutive rows from `ptr`; with MASKED those at or past `rows_left` read as 0."""
    tile = ()
    for i in tl.static_range(len(T.COVER)):
        tile += (load_piece(ptr, o_row, rows_left, T.D, piece_start(T.COVER, i), piece_width(T.COVER, i), MASKED),)
    return tile


@triton.jit
def walk(
    x_ptr, y_ptr, batch, head, first, stride_xb, stride_xn, stride_xh, stride_yb, stride_yn, stride_yh,
    ROWS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return one head's rows of two tensors from `first` on, for `block_at` to take ROWS of them.

    Each is its start, its stride, and the offsets of ROWS rows.
    """
    x_start = head_start(x_ptr, batch, head, first, stride_xb, stride_xn, stride_xh, T.ALIGN)
    y_start = head_start(y_ptr, batch, head, first, stride_yb, stride_yn, stride_yh, T.ALIGN)
    x_step = stride_xn.to(tl.int64) * T.ALIGN
    y_step = stride_yn.to(tl.int64) * T.ALIGN
    x_rows = row_offsets(ROWS, stride_xn, T.ALIGN, T.WIDE)  # [ROWS, 1]
    y_rows = row_offsets(ROWS, stride_yn, T.ALIGN, T.WIDE)
    return (x_start, x_step, x_rows), (y_start, y_step, y_rows)


@triton.jit
def block_at(rows, index):
    """Return the block that begins with row `index`: its start and its offsets."""
    start, stride, o_row = rows
    return start + index * stride, o_row


@triton.jit
def load_block(block, rows_left, T: tl.constexpr, MASKED: tl.constexpr):
    """Load a block; with MASKED rows at or past `rows_left` read as 0."""
    start, o_row = block
    return load_tile(start, o_row, rows_left, T, MASKED)


@triton.jit
def load_first(rows, rows_left, T: tl.constexpr):
    """Load the first row alone; 0 if there is none."""
    start, _, _ = rows
    return load_tile(start, row_offsets(1, 0, 1, False), rows_left, T, True)


@triton.jit
def load_rows_at(
    ptr, batch, head, row, stride_b, stride_n, stride_h, rows_left, ROWS: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Load ROWS rows of one head from `row` on; those at or past `rows_left` read as 0."""
    start = head_start(ptr, batch, head, row, stride_b, stride_n, stride_h, T.ALIGN)
    return load_tile(start, row_offsets(ROWS, stride_n, T.ALIGN, T.WIDE), rows_left, T, True)


@triton.jit
def load_statistics(lse_ptr, delta_ptr, index, seen):
    """Return the base-2 log-sum-exp and delta of queries; +inf and 0 where `seen` is false, so that nothing has a share."""
    lse = tl.load(lse_ptr + index, mask=seen, other=float("inf"))
    return lse * LOG2_E, tl.load(delta_ptr + index, mask=seen, other=0.0)


@triton.jit
def store_piece(ptr, block, o_row, rows_left, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Store ``[rows, WIDTH]`` at channel START, in the dtype behind `ptr`."""
    o_d = START + tl.arange(0, WIDTH)[None, :]
    m_row = tl.arange(0, o_row.shape[0])[:, None] < rows_left
    tl.store(ptr + o_row + o_d, block.to(ptr.dtype.element_ty), mask=m_row & (o_d < D))


@triton.jit
def store_tile(ptr, tile, o_row, rows_left, valid_left, T: tl.constexpr):
    """Store the first `rows_left` rows; those at or past `valid_left` become 0."""
    m_valid = tl.arange(0, o_row.shape[0])[:, None] < valid_left
    for i in tl.static_range(len(T.COVER)):
        block = tl.where(m_valid, tile[i], 0.0)
        store_piece(ptr, block, o_row, rows_left, T.D, piece_start(T.COVER, i), piece_width(T.COVER, i))


@triton.jit
def load_rows(ptr, o_row, m_row, T: tl.constexpr):
    """Load the rows at offsets `o_row` ``[rows, 1]``; those where `m_row` ``[rows]`` is false read as 0."""
    tile = ()
    for i in tl.static_range(len(T.COVER)):
        o_d = piece_start(T.COVER, i) + tl.arange(0, piece_width(T.COVER, i))[None, :]
        tile += (tl.load(ptr + o_row + o_d, mask=m_row[:, None] & (o_d < T.D), other=0.0),)
    return tile


@triton.jit
def store_rows(ptr, tile, o_row, m_row, T: tl.constexpr):
    """Store the rows where `m_row` is true, in the dtype behind `ptr`."""
    for i in tl.static_range(len(T.COVER)):
        o_d = piece_start(T.COVER, i) + tl.arange(0, piece_width(T.COVER, i))[None, :]
        tl.store(ptr + o_row + o_d, tile[i].to(ptr.dtype.element_ty), mask=m_row[:, None] & (o_d < T.D))


@triton.jit
def zero_tile(ROWS: tl.constexpr, T: tl.constexpr):
    """Return an fp32 accumulator of zeros."""
    tile = ()
    for i in tl.static_range(len(T.COVER)):
        tile += (tl.zeros([ROWS, piece_width(T.COVER, i)], tl.float32),)
    return tile


@triton.jit
def scores_of(a, b):
    """Return ``a @ b^T`` in fp32, ``[rows of a, rows of b]``."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision="ieee")
    return total


@triton.jit
def add_product(acc, weights, tile):
    """Return ``acc + weights @ tile``; the weights are rounded to the tile's dtype."""
    result = ()
    for i in tl.static_range(len(tile)):
        result += (tl.dot(weights.to(tile[i].dtype), tile[i], acc[i], input_precision="ieee"),)
    return result


@triton.jit
def attend_scores(
    acc, m, total, scores, values, keys_left, scale_log2,
    T: tl.constexpr, MASKED: tl.constexpr, EMPTY_ROWS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax in base 2: ``[rows, keys]`` of scores, -inf where hidden, and the values' block.

    acc is the sum of the values seen so far, weighted relative to the maximum m; total is the sum of the weights. With
    EMPTY_ROWS a row may have seen nothing yet; values at or past keys_left are read as 0 if MASKED.
    """
    m_new = tl.maximum(m, tl.max(scores, axis=1) * scale_log2)
    m_finite = m_new
    if EMPTY_ROWS:
        # -inf minus -inf would be NaN.
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores * scale_log2 - m_finite[:, None])
    alpha = tl.exp2(m - m_finite)
    v = load_block(values, keys_left, T, MASKED)
    acc = add_product(scale_tile(acc, alpha[:, None]), p, v)
    return acc, m_new, total * alpha + tl.sum(p, axis=1)


@triton.jit
def row_products(tile, row):
    """Return the dot product of every row of `tile` with the only row of `row`, fp32 ``[rows]``; no tensor cores."""
    total = tl.sum(tile[0].to(tl.float32) * row[0].to(tl.float32), axis=1)
    for i in tl.static_range(1, len(tile)):
        total += tl.sum(tile[i].to(tl.float32) * row[i].to(tl.float32), axis=1)
    return total


@triton.jit
def outer_product(weights, row):
    """Return ``weights [rows]`` times the only row of `row`, fp32."""
    result = ()
    for i in tl.static_range(len(row)):
        result += (weights[:, None] * row[i].to(tl.float32),)
    return result


@triton.jit
def add_weighted_rows(acc, weights, tile):
    """Return ``acc + weights [rows] @ tile`` as a tile with one row, without tensor cores."""
    result = ()
    for i in tl.static_range(len(tile)):
        result += (acc[i] + tl.sum(weights[:, None] * tile[i].to(tl.float32), axis=0)[None, :],)
    return result


@triton.jit
def scale_tile(tile, factor):
    """Return `tile` times `factor`, a number or ``[rows, 1]``."""
    result = ()
    for i in tl.static_range(len(tile)):
        result += (tile[i] * factor,)
    return result
