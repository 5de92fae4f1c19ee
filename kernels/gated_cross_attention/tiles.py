"""Pieces that this op's kernels share: which rows a program owns, and what each of them sees.

A row is one query: token ``row // GROUP`` of one batch row, read by query head ``row % GROUP`` of a KV head's group. All
queries that read the same keys lie in the same tiles that way, whether they are tokens or heads of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from infimm_fast.kernels.common.tiles import piece_start, piece_width


@triton.jit
def row_index(first, num_rows, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """Return (token, head within the group, whether the row exists), each ``[BLOCK_M]``."""
    row = first + tl.arange(0, BLOCK_M)
    return row // GROUP, row % GROUP, row < num_rows


@triton.jit
def query_offsets(token, member, stride_n, stride_h, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """Return the offsets ``[rows, 1]`` of rows from the first one of their batch row and group."""
    if WIDE:
        token = token.to(tl.int64)
    return ((token * stride_n + member * stride_h) * ALIGN)[:, None]


@triton.jit
def load_intervals(range_ptr, batch, token, inside, num_keys, stride_rb, stride_rt, stride_re):
    """Return the first visible key and the number of visible keys of each row, clamped to the stored keys.

    Both are int32 ``[rows]``; a row with an empty interval or outside the tensor has 0 keys.
    """
    p_start = range_ptr + batch.to(tl.int64) * stride_rb + token.to(tl.int64) * stride_rt
    start = tl.load(p_start, mask=inside, other=0)
    end = tl.load(p_start + stride_re, mask=inside, other=0)
    start = tl.minimum(tl.maximum(start, 0), num_keys).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0), num_keys).to(tl.int32)
    return start, tl.maximum(end - start, 0)


@triton.jit
def hull_of(start, count, num_keys):
    """Return the smallest range that holds every non-empty interval; its end is before its start if there is none."""
    low = tl.min(tl.where(count > 0, start, num_keys), axis=0)
    high = tl.max(tl.where(count > 0, start + count, 0), axis=0)
    return low, high


@triton.jit
def sees(key, start, count):
    """Return whether each key lies in each interval; below its start the unsigned distance is larger than any count."""
    return (key - start).to(tl.uint32) < count.to(tl.uint32)


@triton.jit
def load_rows(ptr, o_row, m_row, D: tl.constexpr, COVER: tl.constexpr):
    """Load the rows at offsets `o_row` ``[rows, 1]``; those where `m_row` ``[rows]`` is false read as 0."""
    tile = ()
    for i in tl.static_range(len(COVER)):
        o_d = piece_start(COVER, i) + tl.arange(0, piece_width(COVER, i))[None, :]
        tile += (tl.load(ptr + o_row + o_d, mask=m_row[:, None] & (o_d < D), other=0.0),)
    return tile


@triton.jit
def store_rows(ptr, tile, o_row, m_row, D: tl.constexpr, COVER: tl.constexpr):
    """Store the rows where `m_row` is true, in the dtype behind `ptr`."""
    for i in tl.static_range(len(COVER)):
        o_d = piece_start(COVER, i) + tl.arange(0, piece_width(COVER, i))[None, :]
        tl.store(ptr + o_row + o_d, tile[i].to(ptr.dtype.element_ty), mask=m_row[:, None] & (o_d < D))
