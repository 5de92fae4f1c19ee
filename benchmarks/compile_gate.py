"""Compile every shipped kernel configuration for every GPU generation, without a GPU, and refuse what would run badly.

The real launchers run on meta tensors with the strides a model produces; each launch is recorded instead of executed and
compiled as Triton would at run time (`kernels/common/offline.py`). The compiled code is then read back: registers, shared
memory, spills (local memory instructions), widths of global accesses, warp-group matrix instructions and whether the hot
loop waits for each of them. Which launches, and what their code must hold, is written down for each op in
`compile_gate_ops.py`.

Run ``python -m infimm_fast.benchmarks.compile_gate --out benchmarks/results/compile_gate.json``.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from infimm_fast.benchmarks.compile_gate_ops import DTYPES, OPS, Job
from infimm_fast.benchmarks.machine_code import hot_loop, mix_of, read_kernel, serialised
from infimm_fast.benchmarks.report import save_json
from infimm_fast.kernels.common.configs import ARCHITECTURES
from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.common.offline import Launch, compile_triton, recorded_launches, source_of

# Shared memory that one block may use, bytes (CUDA programming guide, technical specifications per compute capability).
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# Rows of the accumulator of a warp group's matrix instruction.
WGMMA_ROWS = 64


@dataclass(frozen=True)
class Code:
    """What the compiled code holds.

    Accesses are instructions on global memory, by their width in bytes; `loop_wgmma` and `loop_waits` are the warp-group
    matrix instructions of the hot loop and the waits for them.
    """

    registers: int
    shared: int
    spills: int
    accesses: dict[int, int]
    wgmma: int
    loop_wgmma: int = 0
    loop_waits: int = 0


@dataclass(frozen=True)
class Verdict:
    """A job, its configuration, its code, and what is wrong with it."""

    job: Job
    config: LaunchConfig
    code: Code
    failures: tuple[str, ...]


def record(job: Job, config: LaunchConfig) -> Launch:
    """Run the op's launcher on meta tensors and return the launch of the job's kernel."""
    op = OPS[job.op]
    with recorded_launches() as launches:
        op.launch(job, config)
    return next(launch for launch in launches if launch.kernel.__name__ == op.kernels[job.kernel])


def inspect_code(compiled: Any) -> Code:
    """Read a compiled kernel's machine code."""
    registers, code = read_kernel(compiled)
    accesses: dict[int, int] = {}
    for width in (one.global_bytes for one in code if one.global_bytes):
        accesses[width] = accesses.get(width, 0) + 1
    loop = mix_of(hot_loop(code))
    return Code(
        registers=registers,
        shared=compiled.metadata.shared,
        spills=sum(one.spills for one in code),
        accesses=accesses,
        wgmma=sum(mix_of(code).hgmma.values()),
        loop_wgmma=sum(loop.hgmma.values()),
        loop_waits=loop.waits,
    )


def judge(job: Job, config: LaunchConfig, code: Code) -> tuple[str, ...]:
    """Return what is wrong with one row."""
    op = OPS[job.op]
    rules = op.rules(job, config)
    failures = []
    budget = op.spills.get((job.kernel, job.dtype, job.width, job.arch), 0)
    if code.spills > budget:
        failures.append(f"{code.spills} spill instructions, {budget} allowed")
    if code.shared > SHARED_LIMIT[job.arch]:
        failures.append(f"{code.shared} bytes of shared memory, {SHARED_LIMIT[job.arch]} available")
    wide = code.accesses.get(16, 0)
    narrow = sum(code.accesses.values()) - wide
    if rules.wide and not wide:
        failures.append("no 16-byte global access")
    if rules.no_elements and code.accesses.get(2):
        failures.append(f"{code.accesses[2]} two-byte global accesses")
    if rules.mostly_wide and narrow > wide:
        failures.append(f"{narrow} of the global accesses are narrower than 16 bytes")
    if job.arch == 90 and job.dtype != "fp32" and rules.tensor_rows >= WGMMA_ROWS and not code.wgmma:
        failures.append("no wgmma")
    if job.arch == 90 and job.dtype != "fp32" and serialised(code.loop_wgmma, code.loop_waits):
        failures.append(f"serialised: {code.loop_waits} waits for {code.loop_wgmma} wgmma in the loop")
    return tuple(failures)


def run_job(job: Job) -> Verdict:
    """Compile one job and judge it."""
    config = OPS[job.op].config(job)
    code = inspect_code(compile_triton(source_of(record(job, config)), job.arch))
    return Verdict(job, config, code, judge(job, config, code))


def jobs_of(
    ops: Sequence[str] = tuple(OPS),
    archs: Sequence[int] = ARCHITECTURES,
    dtypes: Sequence[str] = tuple(DTYPES),
    widths: Sequence[int] | None = None,
) -> list[Job]:
    """Return the shipped rows of some ops, architectures and dtypes, of all widths or of some."""
    return [
        Job(op, kernel, variant, width, dtype, arch)
        for op in ops
        for arch in archs
        for dtype in dtypes
        for kernel, variant, width in OPS[op].rows(dtype)
        if widths is None or width in widths
    ]


def describe(verdict: Verdict) -> str:
    """Return one line of the table."""
    job, config, code = verdict.job, verdict.config, verdict.code
    tiles = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
    widths = " ".join(f"{width}B:{count}" for width, count in sorted(code.accesses.items(), reverse=True))
    return (
        f"{job.op:<22}sm_{job.arch:<4}{job.kernel:<12}{job.variant:<8}{job.dtype:<5}D={job.width:<6}{tiles:<15}"
        f"{'+'.join(map(str, config.cover)):<9}reg {code.registers:<4}smem {code.shared / 1024:>5.1f}K  "
        f"spill {code.spills:<3} wgmma {code.wgmma:<3} waits {code.loop_waits:<3}{widths:<28} "
        f"{'; '.join(verdict.failures) or 'ok'}"
    )


def write_report(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write all rows as JSON, with the versions that made them; a report that is there is replaced as a whole."""
    import triton

    versions = {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}
    rows = [asdict(verdict) for verdict in verdicts]
    save_json(path, {"versions": versions, "rows": rows})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate; the exit status is 1 if any row fails."""
    parser = argparse.ArgumentParser(description="Compile every shipped kernel configuration without a GPU.")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--op", nargs="+", choices=tuple(OPS), default=tuple(OPS))
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--width", type=int, nargs="+", help="head dims, or channels of ops without heads; default: all")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    jobs = jobs_of(options.op, options.arch, options.dtype, options.width)
    if not jobs:
        parser.error(f"no row has a width of {options.width}")
    verdicts = []
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for verdict in pool.map(run_job, jobs):
            print(describe(verdict), flush=True)
            verdicts.append(verdict)
    failed = [verdict for verdict in verdicts if verdict.failures]
    print(f"{len(verdicts)} rows, {len(failed)} failed")
    if options.out:
        write_report(options.out, verdicts)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
