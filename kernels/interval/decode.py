"""Decode: attention of a few text tokens, split over the keys, with batch rows that read the same keys folded together.

A decoder's step has one to a few queries for each batch row and reads thousands of keys for them: it is as fast as its
keys and values arrive. Three kernels, whose grids and workspace depend on shapes only, so that a captured CUDA graph
follows intervals that change in place:

1. The plan finds batch rows with equal hulls (of all their tokens' intervals): beams, samples, a picture that all rows
   share, wherever they lie in the batch. Each group of such rows is laid out row by row in tiles of BLOCK_M queries, and
   every tile's keys are cut into so many splits that the units (tile, split) are about equally long, whatever the rows'
   lengths are. Rows without keys get no unit.
2. One program for each unit and KV head finds its unit in the plan and writes a normalised partial result.
3. The partial results of each query are combined in a fixed order.

A batch of one needs no plan. Grouping compares all hulls with all others, which is cheap up to PLAN_ROWS = 256 batch
rows and asks nothing of the order; larger batches are planned in chunks of so many rows, and share nothing over chunks.
Grouping decides only which keys a tile walks over: each query still masks by its own interval.

HBM traffic of one InfiMM-HD block (12 heads of 64, 16 bits) at batch 64 with 10 sub-images each, by arithmetic; unmeasured:

- 64 different pictures: 64 x 10250 x 12 x 64 x 2 x 2 B = 2.0 GB, each key once; partial results add 0.1 %.
- one shared picture: 31.5 MB instead of 64 times as much. Its two tiles of 32 rows are neighbours in the grid, so the
  second one finds the keys in L2; partial results add 4 MB, which stay in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infimm_fast.kernels.common.launch import (
    LaunchConfig,
    common_alignment,
    device_guard,
    rows_are_wide,
    unit_strides,
)
from infimm_fast.kernels.common.tiles import LN_2, LOG2_E, UNSPECIALISED, load_rows, store_rows, walk
from infimm_fast.kernels.interval.config import (
    DECODE_TOKENS,
    MIN_BLOCKS_PER_UNIT,
    PLAN_ROWS,
    Split,
    tiling_of,
)
from infimm_fast.kernels.interval.options import Options
from infimm_fast.kernels.interval.tiles import attend_keys, hull_of, load_intervals

# The plan of one chunk: int32 ``[FIELDS, ROWS]``. A group is stored under its first batch row.
ENDS = tl.constexpr(0)  # by batch row: units of the groups up to and including the one it leads
ORDER = tl.constexpr(1)  # batch rows, the members of each group side by side
FIRST = tl.constexpr(2)  # by batch row: where its group begins in ORDER
SIZE = tl.constexpr(3)  # by batch row: members of its group
LOW = tl.constexpr(4)  # by batch row: its hull
HIGH = tl.constexpr(5)
SPLITS = tl.constexpr(6)  # by batch row: splits of its keys, 0 without keys
FIELDS = tl.constexpr(7)
# Batch rows that the plan compares all others with in one step.
COMPARED_ROWS = 16


@triton.jit
def hulls_of_rows(range_ptr, batch, exists, num_tokens, num_keys, stride_rb, stride_rt, stride_re, TOKENS: tl.constexpr):
    """Return the hulls of batch rows; one without keys has the hull (0, 0)."""
    token = tl.arange(0, TOKENS)[:, None]
    inside = exists[None, :] & (token < num_tokens)
    start, count = load_intervals(range_ptr, batch[None, :], token, inside, num_keys, stride_rb, stride_rt, stride_re)
    low, high = hull_of(start, count, num_keys)
    return tl.where(high > low, low, 0), tl.where(high > low, high, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def plan_kernel(
    range_ptr, num_batches, num_tokens, num_keys, group_size, pool, max_splits,
    stride_rb, stride_rt, stride_re,
    plan_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOKENS: tl.constexpr, MIN_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    COMPARED: tl.constexpr,
):  # fmt: skip
    """Plan one chunk of ROWS batch rows: at most ``pool`` units, and one more for each tile."""
    chunk = tl.program_id(0)
    num_rows = tl.minimum(num_batches - chunk * ROWS, ROWS)
    row = tl.arange(0, ROWS)
    batch = chunk * ROWS + row
    exists = row < num_rows
    low, high = hulls_of_rows(
        range_ptr, batch, exists, num_tokens, num_keys, stride_rb, stride_rt, stride_re, TOKENS=TOKENS,
    )  # fmt: skip
    # Sorted by hull, then by index: a row's rank, its place in its group, and the group's size are counts.
    rank = tl.zeros([ROWS], tl.int32)
    place = tl.zeros([ROWS], tl.int32)
    size = tl.zeros([ROWS], tl.int32)
    for first in range(0, num_rows, COMPARED):
        other = first + tl.arange(0, COMPARED)
        other_exists = other < num_rows
        other_low, other_high = hulls_of_rows(
            range_ptr, chunk * ROWS + other, other_exists, num_tokens, num_keys, stride_rb, stride_rt, stride_re,
            TOKENS=TOKENS,
        )  # fmt: skip
        same_low = low[:, None] == other_low[None, :]
        same = (high[:, None] == other_high[None, :]) & same_low
        less = (other_high[None, :] < high[:, None]) & same_low | (other_low[None, :] < low[:, None])
        same = same & other_exists[None, :]
        earlier = same & (other[None, :] < row[:, None])
        rank += tl.sum((earlier | (less & other_exists[None, :])).to(tl.int32), axis=1)
        place += tl.sum(earlier.to(tl.int32), axis=1)
        size += tl.sum(same.to(tl.int32), axis=1)

    # Tiles of the groups, each counted at its first row.
    tiles = tl.where(exists & (place == 0), tl.cdiv(size * num_tokens * group_size, BLOCK_M), 0)
    blocks = tl.cdiv(high - low, BLOCK_N)
    work = tl.sum(tiles.to(tl.int64) * blocks, axis=0)
    share = tl.maximum(tl.cdiv(work, pool), MIN_BLOCKS).to(tl.int32)
    splits = tl.minimum(tl.cdiv(blocks, share), max_splits)
    plan_ptr += chunk * FIELDS * ROWS
    tl.store(plan_ptr + ENDS * ROWS + row, tl.cumsum(tiles * splits, axis=0))
    tl.store(plan_ptr + ORDER * ROWS + rank, batch, mask=exists)
    tl.store(plan_ptr + FIRST * ROWS + row, rank - place)
    tl.store(plan_ptr + SIZE * ROWS + row, size)
    tl.store(plan_ptr + LOW * ROWS + row, low)
    tl.store(plan_ptr + HIGH * ROWS + row, high)
    tl.store(plan_ptr + SPLITS * ROWS + row, splits)


@triton.jit
def find_unit(plan_ptr, unit, rows_per_batch, BLOCK_M: tl.constexpr, ROWS: tl.constexpr):
    """Return (first member in ORDER, queries of the group, tile, split, splits, low, high) of a unit of a chunk.

    A unit that the plan does not use has no queries.
    """
    ends = tl.load(plan_ptr + ENDS * ROWS + tl.arange(0, ROWS))
    leader = tl.sum((ends <= unit).to(tl.int32), axis=0)
    used = leader < ROWS
    p_leader = plan_ptr + tl.minimum(leader, ROWS - 1)
    num_rows = tl.where(used, tl.load(p_leader + SIZE * ROWS), 0) * rows_per_batch
    splits = tl.load(p_leader + SPLITS * ROWS)
    # Tiles of one split are neighbours: they read the same keys.
    tiles = tl.maximum(tl.cdiv(num_rows, BLOCK_M), 1)
    local = unit - tl.load(p_leader + ENDS * ROWS) + tiles * splits
    first = tl.load(p_leader + FIRST * ROWS)
    low, high = tl.load(p_leader + LOW * ROWS), tl.load(p_leader + HIGH * ROWS)
    return first, num_rows, local % tiles, local // tiles, splits, low, high


@triton.jit(do_not_specialize=UNSPECIALISED)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, range_ptr, plan_ptr, scale, num_batches, num_tokens, num_kv_heads, num_keys, num_units, num_splits,
    stride_qb, stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_rb, stride_rt, stride_re,
    part_ptr, part_lse_ptr, T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One unit and KV head; without a plan, one batch row in `num_splits` splits. Writes ``[splits, B, T, Hq, D]``."""
    # Heads vary fastest. The heads of a token lie side by side, but tokens far apart: with all blocks' K and V out of one
    # projection, 12 heads of 128 bytes every 30 KB. One head reads whole sectors, yet only a sliver of each DRAM page;
    # programs that run at the same time read the rest of it.
    kv_head = tl.program_id(0) % num_kv_heads
    unit = tl.program_id(0) // num_kv_heads
    rows_per_batch = num_tokens * T.GROUP
    if plan_ptr is None:
        tiles = tl.cdiv(rows_per_batch, T.BLOCK_M)
        row = unit % tiles * T.BLOCK_M + tl.arange(0, T.BLOCK_M)
        split = unit // tiles
        splits = num_splits
        inside = row < rows_per_batch
        batch = row * 0
    else:
        plan_ptr += unit // num_units * FIELDS * ROWS
        first, num_rows, tile, split, splits, low, high = find_unit(
            plan_ptr, unit % num_units, rows_per_batch, T.BLOCK_M, ROWS
        )
        if num_rows == 0:
            return
        row = tile * T.BLOCK_M + tl.arange(0, T.BLOCK_M)
        inside = row < num_rows
        batch = tl.load(plan_ptr + ORDER * ROWS + first + row // rows_per_batch, mask=inside, other=0)  # [BLOCK_M]
    token = row % rows_per_batch // T.GROUP
    head = kv_head * T.GROUP + row % T.GROUP
    start, count = load_intervals(range_ptr, batch, token, inside, num_keys, stride_rb, stride_rt, stride_re)
    if plan_ptr is None:
        low, high = hull_of(start, count, num_keys)
    share = tl.cdiv(tl.cdiv(high - low, T.BLOCK_N), splits) * T.BLOCK_N
    first_key = low + split * share
    last_key = tl.minimum(first_key + share, high)

    o_query = batch.to(tl.int64) * stride_qb + token.to(tl.int64) * stride_qn + head.to(tl.int64) * stride_qh
    q = load_rows(q_ptr, (o_query * T.ALIGN)[:, None], count > 0, T)  # [BLOCK_M, D]
    keys, values = walk(
        k_ptr, v_ptr, unit * 0, kv_head, unit * 0, 0, stride_kn, stride_kh, stride_yb=0, stride_yn=stride_vn,
        stride_yh=stride_vh, ROWS=T.BLOCK_N, T=T,
    )  # fmt: skip
    part, part_lse = attend_keys(q, keys, values, start, count, first_key, last_key, scale, T=T)
    index = ((split.to(tl.int64) * num_batches + batch) * num_tokens + token) * (num_kv_heads * T.GROUP) + head
    store_rows(part_ptr, part, (index * T.D)[:, None], inside, T)
    tl.store(part_lse_ptr + index, part_lse, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def combine_kernel(
    part_ptr, part_lse_ptr, plan_ptr, num_rows, num_tokens, num_heads, out_ptr, lse_ptr,
    D: tl.constexpr, WIDTH: tl.constexpr, MAX_SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weigh the partial results of one token and head by their log-sum-exps."""
    row = tl.program_id(0).to(tl.int64)  # over [B, T, H]
    token = row // num_heads % num_tokens
    batch = row // num_heads // num_tokens
    splits = MAX_SPLITS
    if plan_ptr is not None:
        splits = tl.load(plan_ptr + (batch // ROWS * FIELDS + SPLITS) * ROWS + batch % ROWS)
    split = tl.arange(0, MAX_SPLITS)
    written = split < splits
    index = split.to(tl.int64) * num_rows + row
    o_d = tl.arange(0, WIDTH)
    part_lse = tl.load(part_lse_ptr + index, mask=written, other=float("-inf"))  # [MAX_SPLITS]
    m_part = written[:, None] & (o_d < D)[None, :]
    part = tl.load(part_ptr + index[:, None] * D + o_d[None, :], mask=m_part, other=0.0)  # [MAX_SPLITS, WIDTH]
    largest = tl.max(part_lse, axis=0)
    weights = tl.exp2((part_lse - tl.where(largest == float("-inf"), 0.0, largest)) * LOG2_E)
    total = tl.sum(weights, axis=0)
    total = tl.where(total > 0, total, 1.0)
    out = tl.sum(weights[:, None] * part, axis=0) / total
    tl.store(out_ptr + row * D + o_d, out.to(out_ptr.dtype.element_ty), mask=o_d < D)
    lse_row = (batch * num_heads + row % num_heads) * num_tokens + token  # over [B, H, T]
    tl.store(lse_ptr + lse_row, largest + tl.log2(total) * LN_2)


def launch_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_range: torch.Tensor,
    options: Options,
    *,
    out: torch.Tensor,
    lse: torch.Tensor,
    config: LaunchConfig,
    split: Split,
) -> None:
    """Fill the output and the log-sum-exp of at most `DECODE_TOKENS` tokens.

    Args:
        q: ``[B, T, Hq, D]``, not empty; channels contiguous, other strides as they come.
        k: ``[1, S, Hkv, D]``, likewise.
        v: like `k`.
        kv_range: int32 or int64 ``[B, T, 2]``, any strides.
        options: the operator's; `backend` does not matter.
        out: written, contiguous ``[B, T, Hq, D]``.
        lse: written, contiguous fp32 ``[B, Hq, T]``.
        config: tiles.
        split: how the keys are split.
    """
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    chunks = triton.cdiv(batch, PLAN_ROWS)
    align = common_alignment(q, k, v)
    strides = [*unit_strides(align, q), *unit_strides(align, k)[1:], *unit_strides(align, v)[1:]]
    part = torch.empty((split.splits, *out.shape), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(part.shape[:-1], dtype=torch.float32, device=q.device)
    wide = rows_are_wide(config.block_n, k, v)
    tiling = tiling_of(config, head_dim=head_dim, group=group, align=align, wide=wide)
    plan = None
    with device_guard(q):
        if batch > 1:
            plan = torch.empty((chunks, FIELDS.value, PLAN_ROWS), dtype=torch.int32, device=q.device)
            plan_kernel[(chunks,)](
                kv_range, batch, tokens, keys, group, split.pool, split.splits, *kv_range.stride(), plan,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, TOKENS=DECODE_TOKENS, MIN_BLOCKS=MIN_BLOCKS_PER_UNIT,
                ROWS=PLAN_ROWS, COMPARED=COMPARED_ROWS, num_warps=8,
            )  # fmt: skip
        decode_kernel[(chunks * split.units * kv_heads,)](
            q, k, v, kv_range, plan, options.scale, batch, tokens, kv_heads, keys, split.units, split.splits, *strides,
            *kv_range.stride(), part, part_lse, tiling, ROWS=PLAN_ROWS, **config.options(),
        )  # fmt: skip
        combine_kernel[(lse.numel(),)](
            part, part_lse, plan, lse.numel(), tokens, heads, out, lse,
            D=head_dim, WIDTH=triton.next_power_of_2(head_dim), MAX_SPLITS=split.splits, ROWS=PLAN_ROWS, num_warps=4,
        )  # fmt: skip
