"""Small jobs for the tuner's tests, and a run of them in Triton's interpreter; loaded as a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from infimm_fast.benchmarks import timing
from infimm_fast.benchmarks.tuning import run
from infimm_fast.benchmarks.tuning.candidates import Candidate, candidates_of
from infimm_fast.benchmarks.tuning.jobs import CROSS, RESIDUAL, SUBIMAGE, Job
from infimm_fast.benchmarks.tuning.plan import Assessed, TuningPlan
from infimm_fast.benchmarks.tuning.results import Results
from infimm_fast.benchmarks.tuning.run import Settings, run_plan

_TOWER = {"tiles": 1, "tokens": 33, "heads": 1, "head_dim": 16}
_TEXT = {"rows": 1, "tokens": 12, "tiles": 1, "images": 1, "shared": 0, "tokens_per_tile": 40, "heads": 2, "kv_heads": 1}
_TEXT |= {"head_dim": 16, "kv_blocks": 2}


def small_job(op: str, kernel: str) -> Job:
    """Return a job that the interpreter does in less than a second."""
    sizes = {SUBIMAGE: _TOWER, CROSS: _TEXT, RESIDUAL: {"tokens": 4, "width": 32}}[op]
    if kernel == "decode":
        sizes = sizes | {"rows": 2, "tokens": 2, "tokens_per_tile": 300}
    return Job(op, kernel, "small", sizes, 0, "fp32")


def small_plan(*kernels: tuple[str, str]) -> TuningPlan:
    """Return a plan of small jobs with two candidates each: the shipped one, and one that is a little different."""
    plan = TuningPlan(90, {"triton": "none", "torch": torch.__version__})
    for op, kernel in kernels:
        job = small_job(op, kernel)
        shipped = candidates_of(job, 90)[0]
        other = Candidate(shipped.config, {"TARGET_POOL": 1024})
        if kernel != "decode":
            other = Candidate(replace(shipped.config, num_stages=shipped.config.num_stages + 1))
        plan.jobs.append((job, [Assessed(shipped), Assessed(other)]))
    return plan


def stored(folder: Path | str) -> Results:
    """Return the only results in a folder."""
    (file,) = Path(folder).glob("*.json")
    return Results.load(file)


def run_small(kernels: list[tuple[str, str]], folder: str, spoil: bool = False) -> dict[str, Any]:
    """Run a small plan in this process; return its status, its lines, and for each job whether candidates were timed.

    Args:
        kernels: (op, kernel) of each job.
        folder: for the results.
        spoil: the second candidate computes with other values than it should.
    """
    lines: list[str] = []
    launch = run.launch

    def spoiled(job: Job, inputs: Any, config: Any, arch: int) -> Any:
        outputs = launch(job, inputs, config, arch)
        wrong = spoil and config != candidates_of(job, arch)[0].config
        return tuple(output * 1.01 for output in outputs) if wrong else outputs

    with mock.patch.multiple(timing, WARM_UPS=0, MIN_SAMPLES=1), mock.patch.object(run, "launch", spoiled):
        plan = small_plan(*kernels)
        status = run_plan(plan, Settings(processes=0, seconds=0.0), Path(folder), lines.append)
    results = stored(folder)
    return {
        "status": status,
        "lines": lines,
        "timed": [[one.ms is not None for one in job.measured] for job in results.jobs],
        "remarks": [[one.remark for one in job.measured] for job in results.jobs],
    }
