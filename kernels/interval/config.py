"""Which tiles each kernel uses: a pure function over a frozen table, keyed by kernel, architecture, dtype and head dim.

None of the rows has been timed. Those for 16 bits are large shapes that compile without spills, at head dims of 64 to
128, and fit the shared memory; the number of splits is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from infimm_fast.kernels.common.configs import Row, architecture_of, cover_of
from infimm_fast.kernels.common.launch import LaunchConfig

KERNELS = ("forward", "decode", "backward_kv", "backward_q")
# Up to this many text tokens the keys are split over programs.
DECODE_TOKENS = 8
# Batch rows that decode plans together. Comparing all pairs takes some microseconds at 256 and grows with the square.
PLAN_ROWS = 256
# Rows of a tile that batch rows with equal intervals fill. 64 of them then read K and V twice, the second time from L2.
# A row on its own wastes the rest of the tile: arithmetic for 32 rows stays at a quarter of what a Hopper can do while
# K and V arrive, for 64 it would not be far below.
FOLD_ROWS = 32
# Splits, unmeasured. About four programs for each multiprocessor of a large GPU hide the latency of small tiles at batch
# 1; several times as many even out what a large batch leaves for the last ones.
TARGET_PROGRAMS = 512
TARGET_POOL = 4096
# A split has at least four blocks of keys, or combining costs more than it saves; eight where batch rows are folded,
# since the results of a full tile of 32 rows, written and read back, are as large as a block's keys and values.
MIN_BLOCKS_PER_SPLIT = 4
MIN_BLOCKS_PER_UNIT = 8
# However uneven the rows are, a long one is cut into at least eight. The combining program holds all splits of a row in
# registers, and the workspace holds them for all queries: at most 4096 rows of all heads, until there are only eight.
MIN_SPLITS = 8
MAX_SPLITS = 64
PARTIAL_ROWS = 4096

# (head dim up to, BLOCK_M, BLOCK_N, warps, stages, register cap) by kernel and architecture. None is measured; the words
# say what the compiled code shows with triton 3.7.
_ROWS_16: dict[tuple[str, int], tuple[Row, ...]] = {
    # 64 keys a step spill at 88 and leave no register free beyond 96; 32 and a third stage do.
    ("forward", 80): (Row(80, 128, 64, 8, 2), Row(128, 128, 32, 8, 3)),
    # 64 keys a step spill with a cover's second piece.
    ("forward", 89): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 3)),
    # 181 registers at 64 and 249 at 128: no spill.
    ("forward", 90): (Row(128, 128, 64, 8, 2),),
    ("forward", 100): (Row(128, 128, 64, 8, 2),),
    # As on 89.
    ("forward", 120): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 3)),
    # Decode reads every key once and computes little: 16 KB of keys and values a step keep loads in flight. BLOCK_M is the
    # most it takes. 64 keys spill beyond 64 on sm_89 or sm_100, and from 64 on on
    # sm_120, where the assembler also aims at 168 registers beyond 96 and spills 2 unless it is told not to.
    **{("decode", arch): (Row(64, 64, 64, 4, 2), Row(128, 64, 32, 4, 3)) for arch in (80, 89, 90)},
    # With two stages the assembler aims at 96 registers for one row and spills.
    ("decode", 100): (Row(64, 64, 64, 4, 3), Row(128, 64, 32, 4, 3)),
    ("decode", 120): (Row(96, 64, 32, 4, 3), Row(128, 64, 32, 4, 3, 255)),
    # dk and dv are two accumulators of BLOCK_N rows, and the intervals of every step's rows are read anew.
    # 64 queries a step spill at 64, 32 from 72 to 96 unless loads are not pipelined (up to 80).
    ("backward_kv", 80): (Row(64, 32, 128, 8, 2), Row(80, 32, 64, 8, 1), Row(96, 16, 64, 8, 2), Row(128, 32, 64, 8, 2)),
    # 32 queries a step spill 6 at 88 and 96.
    ("backward_kv", 89): (Row(80, 32, 64, 8, 2), Row(96, 16, 64, 4, 2), Row(128, 32, 64, 8, 2)),
    # 64 queries a step spill from 64 on, 128 keys beyond 96.
    ("backward_kv", 90): (Row(96, 32, 128, 8, 2), Row(128, 32, 64, 8, 2)),
    # 128 keys spill beyond 96.
    ("backward_kv", 100): (Row(96, 32, 128, 8, 2), Row(128, 32, 64, 8, 2)),
    # 32 queries a step spill from 72 to 88, and 16 with 8 warps at 72 and 80.
    ("backward_kv", 120): (Row(64, 32, 64, 8, 2), Row(80, 16, 64, 4, 2), Row(96, 16, 64, 8, 2), Row(128, 32, 64, 8, 2)),
    # 64 keys a step spill at 72.
    ("backward_q", 80): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 2)),
    ("backward_q", 89): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 2)),
    # 179 registers at 64, 242 at 128: no spill.
    ("backward_q", 90): (Row(128, 128, 64, 8, 2),),
    ("backward_q", 100): (Row(128, 128, 64, 8, 2),),
    ("backward_q", 120): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 2)),
}
# fp32 keeps its precision, so its products run on plain arithmetic units and their operands fill the registers. Decode's
# cap acts as a floor: left alone, the assembler aims at 64 and spills. dk and dv spill with 4 warps or pipelined loads.
_ROWS_32 = {
    "forward": Row(128, 32, 16, 8, 2),
    "decode": Row(128, 16, 16, 8, 2, 128),
    "backward_kv": Row(128, 16, 32, 8, 1),
    "backward_q": Row(128, 32, 16, 4, 2),
}
# A prompt shorter than half a tile.
_ROW_SHORT = Row(128, 64, 32, 4, 2)


class Tiling(NamedTuple):
    """What is compiled into a kernel that multiplies matrices; COVER, BLOCK_M and BLOCK_N are those of `LaunchConfig`.

    Attributes:
        D: head dim.
        GROUP: query heads of a KV head.
        ALIGN: elements in a unit of the strides.
        WIDE: offsets inside a tile, or inside a batch row of queries, can pass 2^31.
    """

    D: int
    COVER: tuple[int, ...]
    BLOCK_M: int
    BLOCK_N: int
    GROUP: int
    ALIGN: int
    WIDE: bool


def tiling_of(config: LaunchConfig, *, head_dim: int, group: int, align: int, wide: bool) -> Tiling:
    """Return the constants of one kernel; see `Tiling`."""
    return Tiling(head_dim, config.cover, config.block_m, config.block_n, group, align, wide)


@dataclass(frozen=True)
class Split:
    """How decode's keys are split; everything here is known to the host, the rest is worked out on the device.

    Args:
        splits: into how many the keys of a tile are cut at most (with a batch of 1: always); a power of two.
        units: programs for each KV head and chunk of `PLAN_ROWS` batch rows; at least as many as the plan can need.
        pool: units among which a chunk's work is divided before every tile's share is rounded up.
    """

    splits: int
    units: int
    pool: int


def choose_config(
    kernel: str, head_dim: int, dtype: torch.dtype, rows: int, capability: int, *, batch: int = 1
) -> LaunchConfig:
    """Return the launch configuration of one kernel.

    Args:
        kernel: "forward", "decode" (the forward for at most `DECODE_TOKENS` tokens), "backward_kv" (dk and dv) or
            "backward_q" (dq).
        head_dim: D, at most 128.
        dtype: float16, bfloat16 or float32.
        rows: queries that read one KV head in one batch row, tokens times the heads of a group. Only its bucket decides.
        capability: compute capability, 90 for a Hopper.
        batch: batch rows, of which decode can fold several into one tile.
    """
    architecture = architecture_of(capability)
    if dtype == torch.float32:
        row = _ROWS_32[kernel]
    elif kernel == "forward" and rows <= _ROW_SHORT.block_m:
        row = _ROW_SHORT
    else:
        row = next(row for row in _ROWS_16[kernel, architecture] if head_dim <= row.head_dim)
    # As in sub-image attention: a cover saves a quarter of the products or more up to 96, little above.
    padded = max(16, 1 << (head_dim - 1).bit_length())
    # The smallest tile that holds a step's queries; tensor cores want 16.
    needed = max(16, 1 << (max(rows, min(rows * batch, FOLD_ROWS)) - 1).bit_length())
    return LaunchConfig(
        block_m=min(row.block_m, needed) if kernel == "decode" else row.block_m,
        block_n=row.block_n,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        cover=cover_of(head_dim) if 64 < head_dim <= 96 else (padded,),
        max_registers=row.max_registers,
    )


def choose_split(batch: int, tokens: int, group: int, kv_heads: int, num_keys: int, config: LaunchConfig) -> Split | None:
    """Return how the keys of a step of decoding are split; None if one program for each tile is enough.

    Args:
        batch: B.
        tokens: T.
        group: query heads of a KV head.
        kv_heads: Hkv.
        num_keys: S; the host does not know how much of it a row sees.
        config: tiles.
    """
    tiles = -(-tokens * group // config.block_m)
    if batch == 1:
        wanted = max(MIN_SPLITS, -(-TARGET_PROGRAMS // (tiles * kv_heads)))
        shortest = MIN_BLOCKS_PER_SPLIT * config.block_n
    else:
        wanted = max(MIN_SPLITS, PARTIAL_ROWS // (batch * tokens))
        shortest = MIN_BLOCKS_PER_UNIT * config.block_n
    possible = min(wanted, MAX_SPLITS, num_keys // shortest)
    if tokens > DECODE_TOKENS or possible < 2:
        return None
    splits = 1 << (possible.bit_length() - 1)
    chunks = -(-batch // PLAN_ROWS)
    pool = -(-TARGET_POOL // (kv_heads * chunks))
    most = min(batch, PLAN_ROWS) * tiles
    return Split(splits, units=splits * most if batch == 1 else min(splits * most, pool + most), pool=pool)
