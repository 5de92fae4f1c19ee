"""Compile the tuner's candidates without a GPU, and write down what the compiler shows of each.

``python tools/tuning_plan.py --out benchmarks/results/tuning_plan_sm90.json``; the tuner leaves out what is dropped there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from compile_gate import flaws, in_processes, record
from infimm_fast.benchmarks.harness import refusal
from infimm_fast.benchmarks.tuning.candidates import Candidate, add_choices, candidates_of, constants_set, select_jobs
from infimm_fast.benchmarks.tuning.run import PLAN_FORMAT
from infimm_fast.export.common.artifact import write_json
from infimm_fast.kernels.common.cases import TUNE, Job, Op
from infimm_fast.kernels.common.configs import ARCHITECTURES
from infimm_fast.kernels.common.offline import compile_triton
from machine_code import inspect_code


def assess(op: Op, job: Job, candidate: Candidate) -> dict[str, Any]:
    """Return a candidate's label, its code and why it is not worth a try, "" if it is."""
    found: dict[str, Any] = {"label": candidate.label, "code": None, "dropped": ""}
    try:
        with constants_set(op, job, candidate.constants):
            code = inspect_code(compile_triton(record(op, job, candidate.config), job.arch))
    except Exception as error:  # whatever the compiler refuses is a reason, not an end
        return found | {"dropped": refusal(error, "compile")}
    return found | {"code": asdict(code), "dropped": "; ".join(flaws(code, job.arch))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the plan of one architecture."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90)
    add_choices(parser)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    chosen = select_jobs(TUNE, ("bfloat16",), (options.arch,), options)
    work = [(op, job, candidates_of(op, job)) for op, job in chosen]
    results = in_processes(assess, [(op, job, one) for op, job, ones in work for one in ones], options.processes)
    jobs = []
    for op, job, candidates in work:
        found = list(islice(results, len(candidates)))
        jobs.append({"op": op.name, "kernel": job.kernel, "case": job.case.name, "candidates": found})
        dropped = sum(bool(one["dropped"]) for one in found)
        print(f"{op.name} {job.kernel} {job.case.name}: {dropped} of {len(found)} dropped", flush=True)
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    write_json(options.out, {"format": PLAN_FORMAT, "arch": options.arch, "versions": versions, "jobs": jobs})


if __name__ == "__main__":
    main()
