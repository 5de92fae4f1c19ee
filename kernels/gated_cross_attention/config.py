"""Which tiles each kernel uses: a pure function over a frozen table, keyed by kernel, architecture, dtype and head dim.

None of the rows has been timed. Those for 16 bits are large shapes that compile without spills, at head dims of 64 to
128, and fit the shared memory; the number of splits is arithmetic.
"""

from __future__ import annotations

import torch

from infimm_fast.kernels.common.configs import Row, architecture_of, cover_of
from infimm_fast.kernels.common.launch import LaunchConfig

KERNELS = ("forward", "decode", "backward_kv", "backward_q")
# Up to this many text tokens the keys are split over programs.
DECODE_TOKENS = 8
# Splits, unmeasured. About four programs for each multiprocessor of a large GPU hide the latency of small tiles; however
# many rows there are, a row longer than the others is cut into at least eight; a split has at least four blocks of
# keys, or combining costs more than it saves; and the combining program holds all splits of a row in registers.
TARGET_PROGRAMS = 512
MIN_SPLITS = 8
MIN_BLOCKS_PER_SPLIT = 4
MAX_SPLITS = 64

# (head dim up to, BLOCK_M, BLOCK_N, warps, stages) by kernel and architecture. None is measured; the words say what the
# compiled code shows with triton 3.7.
_ROWS_16: dict[tuple[str, int], tuple[Row, ...]] = {
    # 64 keys a step spill at 88 and leave no register free beyond 96; 32 and a third stage do.
    ("forward", 80): (Row(80, 128, 64, 8, 2), Row(128, 128, 32, 8, 3)),
    # 64 keys a step spill with a cover's second piece.
    ("forward", 89): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 3)),
    # 181 registers at 64 and 219 padded to 128: no spill.
    ("forward", 90): (Row(128, 128, 64, 8, 2),),
    ("forward", 100): (Row(128, 128, 64, 8, 2),),
    # As on 89.
    ("forward", 120): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 3)),
    # dk and dv are two accumulators of BLOCK_N rows, and the intervals of every step's rows are read anew.
    ("backward_kv", 80): (Row(64, 64, 64, 4, 2), Row(128, 32, 64, 8, 2)),
    # 32 queries a step spill 6 at 88 and 96.
    ("backward_kv", 89): (Row(80, 32, 64, 8, 2), Row(96, 16, 64, 4, 2), Row(128, 32, 64, 8, 2)),
    # 64 queries a step spill from 64 on, 128 keys where 128 channels are padded.
    ("backward_kv", 90): (Row(96, 32, 128, 8, 2), Row(120, 32, 64, 8, 2), Row(128, 32, 128, 8, 2)),
    # 128 keys spill beyond 96.
    ("backward_kv", 100): (Row(96, 32, 128, 8, 2), Row(128, 32, 64, 8, 2)),
    # 32 queries a step spill from 72 to 88, and 16 with 8 warps at 72 and 80.
    ("backward_kv", 120): (Row(64, 32, 64, 8, 2), Row(80, 16, 64, 4, 2), Row(96, 16, 64, 8, 2), Row(128, 32, 64, 8, 2)),
    # 64 keys a step spill at 72.
    ("backward_q", 80): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 2)),
    ("backward_q", 89): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 2)),
    # 179 registers at 64, 229 at 112: no spill.
    ("backward_q", 90): (Row(128, 128, 64, 8, 2),),
    ("backward_q", 100): (Row(128, 128, 64, 8, 2),),
    ("backward_q", 120): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 2)),
}
# fp32 keeps its precision, so its products run on plain arithmetic units and their operands fill the registers.
_ROWS_32 = {
    "forward": Row(128, 32, 16, 8, 2),
    "decode": Row(128, 16, 32, 4, 2),
    "backward_kv": Row(128, 16, 32, 4, 2),
    "backward_q": Row(128, 32, 16, 4, 2),
}
# Decode reads every key once and computes little: 64 keys a step keep loads in flight.
_ROW_DECODE = Row(128, 64, 64, 4, 2)
# A prompt shorter than half a tile.
_ROW_SHORT = Row(128, 64, 32, 4, 2)


def choose_config(kernel: str, head_dim: int, dtype: torch.dtype, rows: int, capability: int) -> LaunchConfig:
    """Return the launch configuration of one kernel.

    Args:
        kernel: "forward", "decode" (the forward for at most `DECODE_TOKENS` tokens), "backward_kv" (dk and dv) or
            "backward_q" (dq).
        head_dim: D, at most 128.
        dtype: float16, bfloat16 or float32.
        rows: queries that read one KV head in one batch row, tokens times the heads of a group. Only its bucket decides.
        capability: compute capability, 90 for a Hopper.
    """
    architecture = architecture_of(capability)
    if dtype == torch.float32:
        row = _ROWS_32[kernel]
    elif kernel == "decode":
        row = _ROW_DECODE
    elif kernel == "forward" and rows <= _ROW_SHORT.block_m:
        row = _ROW_SHORT
    else:
        row = next(row for row in _ROWS_16[kernel, architecture] if head_dim <= row.head_dim)
    # As in sub-image attention: a cover saves a quarter of the products or more up to 96, little above.
    padded = max(16, 1 << (head_dim - 1).bit_length())
    # The smallest tile that holds a step's queries; tensor cores want 16.
    needed = max(16, 1 << (rows - 1).bit_length())
    return LaunchConfig(
        block_m=min(row.block_m, needed) if kernel == "decode" else row.block_m,
        block_n=row.block_n,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        cover=cover_of(head_dim) if 64 < head_dim <= 96 else (padded,),
        max_registers=row.max_registers,
    )


def choose_splits(programs: int, num_keys: int, block_n: int) -> int:
    """Return into how many splits, a power of two, every decode tile's keys are cut.

    Args:
        programs: programs without splits.
        num_keys: S; the host does not know how much of it a row sees.
        block_n: keys of a step.
    """
    wanted = max(MIN_SPLITS, -(-TARGET_PROGRAMS // programs))
    possible = max(1, num_keys // (MIN_BLOCKS_PER_SPLIT * block_n))
    return 1 << (min(wanted, possible, MAX_SPLITS).bit_length() - 1)
