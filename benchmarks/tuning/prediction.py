"""How long a kernel should take, from its machine code: bounds by the units of a multiprocessor, and what lies between.

The model. A program executes the instructions around its hot loop once, and the loop as many times as its tiles ask for.
A multiprocessor needs for all warps of all its programs at least

- tensor: cycles of matrix instructions: multiplications / 2048 (16 bits, Hopper), or the operands that come from shared
  memory / 128 bytes, which binds instructions with less than 64 columns;
- issue: instructions / 4, one in a cycle for each scheduler;
- mufu: exponentials and the like, 32 for each instruction of a warp / 16.

Programs are dealt out whole, so the busiest multiprocessor has ceil(programs / 132) of them; each bound is in milliseconds
at 1.755 GHz. If the units worked at the same time all the time, a kernel would take the largest bound ("perfect overlap"),
if never, their sum ("no overlap"). Programs that share a multiprocessor overlap each other, a program hardly overlaps
itself; so these units are predicted to take the largest bound plus the rest of the sum divided by the programs that share
one. Loads are asynchronous: the predicted time is at least what all accesses to device memory take from the L2 cache at 5.8
TB/s (what FlashAttention-3 draws at its published 740 TFLOP/s, head dim 128 and 128 rows), and what the bytes that must
move take at 3.0 TB/s.

Checked once against published figures for non-causal attention with 1024 tokens on this card (head dim 64 and 128: Triton
382 and 372 TFLOP/s, on FlashAttention-3's chart), it gives 398 for both with tiles of 128 x 64 and 8 warps.

Left out: latency of loads and barriers, bank conflicts, clocks under load, what masked lanes of an access do not read.
`mma.sync` counts as if it ran at the rate of `wgmma`. So a prediction ranks candidates that differ in their code; it is no
measurement, and a difference of some percent means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from infimm_fast.benchmarks.machine_code import Mix

WARP = 32


@dataclass(frozen=True)
class Machine:
    """Rates of one generation; nominal ones, from the vendor's data sheet.

    Attributes:
        multiprocessors: of the card.
        clock_ghz: under load.
        mufu: exponentials in one cycle.
        schedulers: warps that can issue an instruction in one cycle.
        registers: of a multiprocessor.
        shared: bytes of its shared memory, of which each program takes `reserved` besides its own.
        reserved: see `shared`.
        warps: that it can hold.
        tflops: matrix products that a good library reaches, in 10^12 operations per second.
        bytes_per_s: of device memory, reached by a good copy.
        cache_bytes_per_s: of the L2 cache, reached by a good attention kernel.
    """

    multiprocessors: int
    clock_ghz: float
    mufu: int
    schedulers: int
    registers: int
    shared: int
    reserved: int
    warps: int
    tflops: float
    bytes_per_s: float
    cache_bytes_per_s: float


MACHINES = {
    90: Machine(
        multiprocessors=132,
        clock_ghz=1.755,
        mufu=16,
        schedulers=4,
        registers=65536,
        shared=228 * 1024,
        reserved=1024,
        warps=64,
        tflops=800.0,
        bytes_per_s=3.0e12,
        cache_bytes_per_s=5.8e12,
    )
}


@dataclass(frozen=True)
class Work:
    """Programs of a grid that do the same.

    Attributes:
        programs: how many.
        steps: times that each passes its loop.
        around: what it executes once.
        loop: what it executes in each step.
    """

    programs: int
    steps: int
    around: Mix
    loop: Mix


@dataclass(frozen=True)
class Prediction:
    """Bounds and the predicted time in milliseconds; see the module's text."""

    tensor_ms: float
    issue_ms: float
    mufu_ms: float
    cache_ms: float
    memory_ms: float
    ms: float

    @property
    def perfect_overlap_ms(self) -> float:
        """The largest bound of a multiprocessor's units."""
        return max(self.tensor_ms, self.issue_ms, self.mufu_ms)

    @property
    def no_overlap_ms(self) -> float:
        """The sum of those bounds."""
        return self.tensor_ms + self.issue_ms + self.mufu_ms


def resident_programs(machine: Machine, registers: int, shared: int, warps: int) -> int:
    """Return how many programs share a multiprocessor.

    Args:
        machine: its limits.
        registers: of a thread.
        shared: of a program, bytes.
        warps: of a program.
    """
    # Registers are handed out to a warp in units of 256, and each scheduler has a quarter of them.
    of_warp = -(-registers * WARP // 256) * 256
    by_registers = machine.registers // machine.schedulers // of_warp * machine.schedulers // warps
    return min(by_registers, machine.shared // (shared + machine.reserved), machine.warps // warps)


def predict(machine: Machine, works: Sequence[Work], warps: int, resident: int, moved_bytes: int) -> Prediction:
    """Predict the time of one launch.

    Args:
        machine: where it runs.
        works: all programs of the grid.
        warps: of a program.
        resident: programs that share a multiprocessor.
        moved_bytes: fewest bytes of device memory that the launch must read and write.
    """
    programs = sum(work.programs for work in works)
    share = math.ceil(programs / machine.multiprocessors) / programs

    def total(count: str) -> float:
        """Sum of one kind of count over all programs, for each of their warps."""
        return sum(work.programs * (getattr(work.around, count) + work.steps * getattr(work.loop, count)) for work in works)

    def bound(count: str, rate: float) -> float:
        """Milliseconds of the busiest multiprocessor, which handles `rate` warps' instructions in a cycle."""
        return total(count) * warps * share / rate / (machine.clock_ghz * 1e6)

    tensor = bound("matrix_cycles", 1)
    issue = bound("instructions", machine.schedulers)
    mufu = bound("mufu", machine.mufu / WARP)
    cache = total("global_bytes") * WARP * warps / machine.cache_bytes_per_s * 1e3
    memory = moved_bytes / machine.bytes_per_s * 1e3
    most = max(tensor, issue, mufu)
    overlapping = max(1, min(resident, math.ceil(programs / machine.multiprocessors)))
    ms = max(memory, cache, most + (tensor + issue + mufu - most) / overlapping)
    return Prediction(tensor, issue, mufu, cache, memory, ms)
