"""Which tiles each kernel uses: a pure function over a frozen table, keyed by kernel, architecture, dtype and head dim.

Every row was chosen by the offline gate (`tools/compile_gate.py`): the preferred shape that compiles
without spills in the forward and fits the shared memory, both with a peeled token and with a masked tail. None has been
timed yet; a row that has says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from infimm_fast.kernels.common.configs import Row, architecture_of, cover_of
from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.subimage.options import Options

HEAD_DIMS = (64, 72, 80, 88, 96, 104, 112, 128)
KERNELS = ("forward", "backward_kv", "backward_q")
# Forwards over at most this many tokens (windows of 8 x 8 patches, small crops) use the narrow rows.
SHORT = 64


class Tiling(NamedTuple):
    """What is compiled into an attention kernel; COVER, BLOCK_M and BLOCK_N are those of `LaunchConfig`.

    Attributes:
        D: head dim.
        PEEL: 1 if the first token is taken out of the tiles, else 0.
        MASKED: blocks of the loop are masked, since the last one can be incomplete or a mask runs through them.
        ALIGN: elements in a unit of the strides.
        WIDE: offsets inside a tile can pass 2^31.
        PACKED: tokens are sequences end to end.
        CAUSAL: a token sees no later one.
        INTERLEAVED: see `reference.rotate_pairs`; where queries are rotated.
    """

    D: int
    COVER: tuple[int, ...]
    BLOCK_M: int
    BLOCK_N: int
    PEEL: int
    MASKED: bool
    ALIGN: int
    WIDE: bool
    PACKED: bool = False
    CAUSAL: bool = False
    INTERLEAVED: bool = False


def tiling_of(
    config: LaunchConfig, options: Options, max_tokens: int, looped: int, *, head_dim: int, align: int, wide: bool
) -> Tiling:
    """Return the constants of one kernel.

    Args:
        config: tiles.
        options: the operator's.
        max_tokens: of the longest sequence.
        looped: tokens of a block of the kernel's loop.
        head_dim: D.
        align: see `Tiling`, and so is `wide`.
        wide: see `align`.
    """
    incomplete = options.lengths is not None or (max_tokens - config.peel) % looped != 0
    return Tiling(
        D=head_dim,
        COVER=config.cover,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PEEL=int(config.peel),
        MASKED=options.is_causal or incomplete,
        ALIGN=align,
        WIDE=wide,
        PACKED=options.packed,
        CAUSAL=options.is_causal,
    )


# (head dim up to, BLOCK_M, BLOCK_N, warps, stages, register cap) by kernel and architecture. None is measured; the
# words say what the compiled code shows, at the triton version of the gate's report.
_ROWS_16: dict[tuple[str, int], tuple[Row, ...]] = {
    # 160 to 255 registers: one program of 8 warps; the usual 4 warps for D = 64 spill.
    # Beyond 96, 128 rows spill and 64 rows with 4 warps fit twice.
    ("forward", 80): (Row(96, 128, 64, 8, 2), Row(128, 64, 64, 4, 2)),
    # 64-row tiles spill beyond 96 when masked; 32 keys and a third stage (64 KB of 99) do not.
    ("forward", 89): (Row(96, 128, 64, 8, 2), Row(128, 128, 32, 8, 3)),
    # Up to 80 a cap at 128 registers spills nothing, and two programs share a multiprocessor; a wider accumulator
    # leaves room for one, so the shared memory goes into a third stage.
    ("forward", 90): (Row(80, 128, 64, 8, 2, 128), Row(128, 128, 64, 8, 3)),
    # Accumulators lie in tensor memory: 111 registers at 64. A cap spills from 72 on, a third stage at 88 and 96.
    ("forward", 100): (Row(64, 128, 64, 8, 2, 128), Row(96, 128, 64, 8, 2), Row(128, 128, 64, 8, 3)),
    # 128 x 64 spills with a cover's second piece of 16, and beyond 96.
    ("forward", 120): (
        Row(64, 128, 64, 8, 2),
        Row(80, 64, 64, 4, 2),
        Row(96, 128, 64, 8, 2),
        Row(128, 128, 32, 8, 3),
    ),
    # dk and dv are two accumulators of BLOCK_N rows; 64 queries a step spill beyond 64, 128 keys at 96.
    ("backward_kv", 80): (
        Row(64, 64, 128, 8, 2),
        Row(80, 32, 128, 8, 2),
        Row(96, 32, 64, 8, 2),
        Row(128, 32, 128, 8, 2),
    ),
    # 128 keys spill at 64 (masked) and at 88 (peeled).
    ("backward_kv", 89): (
        Row(64, 32, 64, 4, 2),
        Row(80, 32, 128, 8, 2),
        Row(96, 32, 64, 8, 2),
        Row(128, 32, 128, 8, 2),
    ),
    # 64 queries a step spill 18 to 36 beyond 96.
    ("backward_kv", 90): (Row(96, 64, 128, 8, 2), Row(128, 32, 128, 8, 2)),
    # 136 KB of shared memory at 96.
    ("backward_kv", 100): (Row(96, 64, 128, 8, 2), Row(128, 32, 128, 8, 2)),
    # As on 89, but 128 keys spill beyond 96 and 64 do not. At 88 the masked variant spills 4, the least of all shapes.
    ("backward_kv", 120): (
        Row(64, 32, 64, 4, 2),
        Row(80, 32, 128, 8, 2),
        Row(88, 16, 64, 8, 2),
        Row(96, 32, 64, 8, 2),
        Row(128, 64, 64, 8, 2),
    ),
    # 64 keys a step spill beyond 80.
    ("backward_q", 80): (Row(80, 128, 64, 8, 2), Row(128, 128, 32, 8, 2)),
    # 64 keys a step spill a little from 72 on.
    ("backward_q", 89): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 2)),
    # 122 to 210 registers, no spill.
    ("backward_q", 90): (Row(128, 128, 64, 8, 2),),
    # 90 to 164 registers up to 96; 64 keys a step spill at 128.
    ("backward_q", 100): (Row(96, 128, 64, 8, 2), Row(128, 128, 32, 8, 2)),
    # 64 keys a step spill from 72 on.
    ("backward_q", 120): (Row(64, 128, 64, 8, 2), Row(128, 128, 32, 8, 2)),
}
# fp32 keeps its precision, so its products run on plain arithmetic units and their operands fill the registers: larger
# tiles spill, up to by the hundred. The forward's cap acts as a floor: left alone, the assembler aims at 64 and spills.
# In dq pipelined loads spill at 80 on sm_80, others at 96.
_ROWS_32 = {
    "forward": (Row(128, 32, 16, 8, 2, 128),),
    "backward_kv": (Row(128, 16, 32, 4, 2),),
    "backward_q": (Row(80, 32, 16, 4, 1), Row(128, 32, 16, 4, 2)),
}
# One tile for a window; 4 warps, since half of 128 rows would be empty.
_ROW_SHORT = Row(128, 64, 32, 4, 2)


def choose_config(
    kernel: str,
    head_dim: int,
    dtype: torch.dtype,
    max_len: int,
    capability: int,
    *,
    peel: bool = True,
    rope: bool = False,
) -> LaunchConfig:
    """Return the launch configuration of one kernel.

    Args:
        kernel: "forward", "backward_kv" (dk and dv) or "backward_q" (dq).
        head_dim: D, at most 128.
        dtype: float16, bfloat16 or float32.
        max_len: tokens of the longest sequence; only its bucket and its remainder decide, never the number itself.
        capability: compute capability, 90 for a Hopper.
        peel: allow the first token to be peeled off. Callers forbid it where tiles have different lengths.
        rope: the kernel rotates queries, which would spill under a register cap and can serialise a cover's products.
    """
    architecture = architecture_of(capability)
    bits = 32 if dtype == torch.float32 else 16
    if bits == 32:
        rows = _ROWS_32[kernel]
    elif kernel == "forward" and max_len <= SHORT:
        rows = (_ROW_SHORT,)
    else:
        rows = _ROWS_16[kernel, architecture]
    row = next(row for row in rows if head_dim <= row.head_dim)
    # Above 96 the cover of three pieces saves an eighth of the products at best, and its last one, 16 wide, runs at
    # half rate or less: padded. Below, the cover saves a quarter (88, 96) or more (72, 80).
    # Rotated queries lie in registers; on 90 and beside a second piece of 32, triton 3.7 then waits for every matrix
    # instruction, whatever the shape.
    padded = max(16, 1 << (head_dim - 1).bit_length())
    widest = 80 if rope and bits == 16 and architecture == 90 else 96
    cover = cover_of(head_dim) if 64 < head_dim <= widest else (padded,)
    blocks = (row.block_n, row.block_m) if kernel != "backward_kv" else (row.block_m, row.block_n)
    return LaunchConfig(
        block_m=row.block_m,
        block_n=row.block_n,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        cover=cover,
        peel=peel and max_len % blocks[0] == 1,
        max_registers=None if rope else row.max_registers,
    )
