"""How many rows a program handles and with how many warps: pure functions over a frozen table, keyed by the width.

None of the rows has been timed. They keep a step of a program in its registers, and its accesses 16 bytes wide where the
width is a multiple of 8; the words say what the compiled code shows with triton 3.7.
"""

from __future__ import annotations

from typing import NamedTuple

from infimm_fast.kernels.common.checks import KernelArgumentError
from infimm_fast.kernels.common.configs import cover_of
from infimm_fast.kernels.common.launch import LaunchConfig

MAX_CHANNELS = 8192
# Of a multiprocessor, from compute capability 8.0 on (CUDA programming guide, technical specifications).
REGISTERS = 65536
# Programs of a launch, unmeasured. A forward program computes tanh(gate) once for all its rows: some thousand programs
# balance themselves over the multiprocessors and share it well. A backward program writes fp32 partial sums of C
# channels, which is only cheap next to its rows if it has many of them.
MAX_PROGRAMS = {"forward": 2048, "backward": 256}
# (width up to, rows of a step, warps): 16 to 24 elements of a row for each thread. Nothing spills up to 5120 channels. A
# LayerNorm's backward holds three fp32 sums beside its row: from 6144 on it spills in fp32 on compute capability 12.0 (33
# instructions), at 8192 everywhere (at most 58 in 16 bits and 195 in fp32).
_ROWS = ((512, 4, 4), (1024, 2, 4), (2048, 1, 4), (6144, 1, 8), (MAX_CHANNELS, 1, 16))


class Tiling(NamedTuple):
    """What is compiled into a kernel; COVER and BLOCK_M are those of `LaunchConfig`.

    Attributes:
        D: channels, C elsewhere.
        GATE_STRIDE: 1 for a gate for each channel, 0 for one gate.
        ALIGN: elements in a unit of the strides.
    """

    D: int
    COVER: tuple[int, ...]
    BLOCK_M: int
    GATE_STRIDE: int
    ALIGN: int


def choose_config(channels: int) -> LaunchConfig:
    """Return the launch configuration of both kernels: `block_m` rows of a step on a cover of all their channels.

    Nothing is cut along a second axis, so `block_n` is 1.

    Args:
        channels: C, at most `MAX_CHANNELS`.

    Raises:
        KernelArgumentError: a row does not fit the registers.
    """
    obstacle = width_obstacle(channels)
    if obstacle is not None:
        raise KernelArgumentError(obstacle)
    rows, warps = next(row[1:] for row in _ROWS if channels <= row[0])
    return LaunchConfig(
        block_m=rows,
        block_n=1,
        num_warps=warps,
        num_stages=1,
        cover=row_cover(channels, rows, warps),
        # All that one program may have. Without a cap the assembler aims at more programs and spills for them.
        max_registers=min(255, REGISTERS // (32 * warps)),
    )


def row_cover(channels: int, rows: int, warps: int) -> tuple[int, ...]:
    """Return the cover of a row whose narrowest piece gives every thread 8 elements, 16 bytes in 16 bits.

    Args:
        channels: C.
        rows: of a step.
        warps: of a program.
    """
    unit = max(16, 8 * 32 * warps // rows)
    return tuple(piece * unit // 16 for piece in cover_of(-(-channels // unit) * 16))


def width_obstacle(channels: int) -> str | None:
    """Return why the kernels do not take rows of so many channels, or None."""
    if channels > MAX_CHANNELS:
        return f"the kernel holds a row in registers and takes up to {MAX_CHANNELS} channels, not {channels}"
    return None


def rows_of_programs(kernel: str, rows: int, block_m: int) -> tuple[int, int]:
    """Return (programs, rows of each program, a multiple of `block_m`); they depend on shapes only.

    Args:
        kernel: "forward" or "backward".
        rows: of the whole tensor.
        block_m: rows of a step.
    """
    steps = -(-rows // block_m)
    share = -(-steps // MAX_PROGRAMS[kernel]) * block_m
    return -(-rows // share), share
