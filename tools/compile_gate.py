"""Compile every shipped kernel configuration for every GPU generation, without a GPU, and refuse what would run badly.

The real launchers run on meta tensors with the strides a model produces; each launch is recorded instead of executed and
compiled as Triton would at run time (`kernels/common/offline.py`). The compiled code is then read back: registers, shared
memory, spills (local memory instructions), widths of global accesses, warp-group matrix instructions and whether the hot
loop waits for each of them. Which launches, and what their code must hold, says each op's ``cases.py``.

Run ``python tools/compile_gate.py --out benchmarks/results/compile_gate.json``.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from infimm_fast.benchmarks.tuning.candidates import add_choices, select_jobs
from infimm_fast.export.common.artifact import write_json
from infimm_fast.kernels.common.cases import GATE, Job, Op
from infimm_fast.kernels.common.configs import ARCHITECTURES
from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.common.offline import KernelSource, compile_triton, recorded_launches, source_of
from machine_code import Code, inspect_code

# Shared memory that one block may use, bytes (CUDA programming guide, technical specifications per compute capability).
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# Rows of the accumulator of a warp group's matrix instruction.
WGMMA_ROWS = 64
DTYPES = ("bfloat16", "float32")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Verdict:
    """A job of an op, its configuration, its code, and what is wrong with it."""

    op: str
    job: Job
    config: LaunchConfig
    code: Code
    failures: tuple[str, ...]


def record(op: Op, job: Job, config: LaunchConfig) -> KernelSource:
    """Run the op's launcher on meta tensors and return what would be compiled for the job's kernel."""
    inputs = op.make_inputs(job.case, getattr(torch, job.dtype), torch.device("meta"))
    with recorded_launches() as launches:
        op.launch(job, inputs, config)
    return source_of(next(launch for launch in launches if launch.kernel.__name__ == op.kernels[job.kernel]))


def flaws(code: Code, arch: int, spills: int = 0) -> Iterator[str]:
    """Yield what is wrong with code wherever it comes from.

    Args:
        code: of a kernel.
        arch: compute capability, 90 for a Hopper.
        spills: how many are allowed.
    """
    if code.spills > spills:
        yield f"{code.spills} spill instructions, {spills} allowed"
    if code.shared > SHARED_LIMIT[arch]:
        yield f"{code.shared} bytes of shared memory, {SHARED_LIMIT[arch]} available"
    if code.serialised:
        yield f"serialised: {code.loop_waits} waits for {code.loop_wgmma} wgmma in the loop"


def judge(op: Op, job: Job, config: LaunchConfig, code: Code) -> tuple[str, ...]:
    """Return what is wrong with one row."""
    rules = op.rules(job, config)
    failures = list(flaws(code, job.arch, op.spills.get((job.kernel, job.dtype, op.width(job.case), job.arch), 0)))
    wide = code.accesses.get(16, 0)
    narrow = sum(code.accesses.values()) - wide
    if rules.wide and not wide:
        failures.append("no 16-byte global access")
    if rules.no_elements and code.accesses.get(2):
        failures.append(f"{code.accesses[2]} two-byte global accesses")
    if rules.mostly_wide and narrow > wide:
        failures.append(f"{narrow} of the global accesses are narrower than 16 bytes")
    if job.arch == 90 and job.dtype != "float32" and rules.tensor_rows >= WGMMA_ROWS and not code.wgmma:
        failures.append("no wgmma")
    return tuple(failures)


def run_job(op: Op, job: Job) -> Verdict:
    """Compile one job and judge it."""
    config = op.config(job)
    code = inspect_code(compile_triton(record(op, job, config), job.arch))
    return Verdict(op.name, job, config, code, judge(op, job, config, code))


def in_processes(function: Callable[..., Result], tasks: Sequence[tuple], processes: int) -> Iterator[Result]:
    """Yield what a function makes of each task, in their order, from processes that work beside each other."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, *zip(*tasks, strict=True))


def describe(verdict: Verdict) -> str:
    """Return one line of the table."""
    job, config, code = verdict.job, verdict.config, verdict.code
    tiles = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
    widths = " ".join(f"{width}B:{count}" for width, count in sorted(code.accesses.items(), reverse=True))
    return (
        f"{verdict.op:<19}sm_{job.arch:<4}{job.kernel:<12}{job.case.name:<22}{job.dtype:<9}{tiles:<15}"
        f"{'+'.join(map(str, config.cover)):<9}reg {code.registers:<4}smem {code.shared / 1024:>5.1f}K  "
        f"spill {code.spills:<3} wgmma {code.wgmma:<3} waits {code.loop_waits:<3}{widths:<28} "
        f"{'; '.join(verdict.failures) or 'ok'}"
    )


def write_report(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write all rows as JSON, with the versions that made them; a report that is there is replaced as a whole."""
    import triton

    versions = {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}
    rows = []
    for verdict in verdicts:
        row, job = asdict(verdict), verdict.job
        named = {"op": row.pop("op"), "kernel": job.kernel, "case": job.case.name, "dtype": job.dtype, "arch": job.arch}
        rows.append(row | {"job": named})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"versions": versions, "rows": rows})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate; the exit status is 1 if any row fails."""
    parser = argparse.ArgumentParser(description="Compile every shipped kernel configuration without a GPU.")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    add_choices(parser)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    jobs = select_jobs(GATE, options.dtype, options.arch, options)
    if not jobs:
        parser.error("no row has such an op, kernel and width")
    verdicts = []
    for verdict in in_processes(run_job, jobs, options.processes):
        print(describe(verdict), flush=True)
        verdicts.append(verdict)
    failed = [verdict for verdict in verdicts if verdict.failures]
    print(f"{len(verdicts)} rows, {len(failed)} failed")
    if options.out:
        write_report(options.out, verdicts)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
