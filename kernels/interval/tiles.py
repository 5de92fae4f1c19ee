"""Pieces that this op's kernels share: which rows a program owns, and what each of them sees.

A row is one query: token ``row // GROUP`` of one batch row, read by query head ``row % GROUP`` of a KV head's group. All
queries that read the same keys lie in the same tiles that way, whether they are tokens or heads of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from infimm_fast.kernels.common.tiles import (
    LN_2,
    LOG2_E,
    attend_scores,
    block_at,
    load_block,
    scale_tile,
    scores_of,
    zero_tile,
)


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
def attend_block(q, acc, m, total, keys, values, start, count, first_key, last_key, scale_log2, T: tl.constexpr):
    """One step of the online softmax over BLOCK_N keys; each row sees those of its own interval."""
    k = load_block(keys, last_key - first_key, T, True)  # [BLOCK_N, D]
    key = first_key + tl.arange(0, T.BLOCK_N)
    visible = sees(key[None, :], start[:, None], count[:, None])
    scores = tl.where(visible, scores_of(q, k), float("-inf"))  # [BLOCK_M, BLOCK_N]
    return attend_scores(acc, m, total, scores, values, last_key - first_key, scale_log2, T=T, MASKED=True, EMPTY_ROWS=True)


@triton.jit
def attend_keys(q, keys, values, start, count, first_key, last_key, scale, T: tl.constexpr):
    """Return the output ``[BLOCK_M, D]`` and log-sum-exp of queries over the keys ``[first_key, last_key)`` of one head.

    keys and values begin at the head's key 0. Each query sees the keys of its own interval only; one that sees none has
    output 0 and log-sum-exp -inf.
    """
    scale_log2 = scale * LOG2_E
    m = tl.full([T.BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([T.BLOCK_M], 0.0, tl.float32)
    acc = zero_tile(T.BLOCK_M, T)
    for key in range(first_key, last_key, T.BLOCK_N):
        acc, m, total = attend_block(
            q, acc, m, total, block_at(keys, key), block_at(values, key), start, count, first_key=key, last_key=last_key,
            scale_log2=scale_log2, T=T,
        )  # fmt: skip
    # A row that has seen nothing has a maximum of -inf and an accumulator of 0.
    total = tl.where(total > 0, total, 1.0)
    return scale_tile(acc, (1.0 / total)[:, None]), (m + tl.log2(total)) * LN_2
