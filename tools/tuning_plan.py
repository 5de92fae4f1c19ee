"""Compile the tuner's candidates without a GPU, and write down what the compiler shows of each.

``python tools/tuning_plan.py --out benchmarks/results/tuning_plan_sm90.json``; the tuner leaves out what is dropped there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from compile_gate import flaws, record
from infimm_fast.benchmarks.tuning.candidates import Candidate, candidates_of, constants_set
from infimm_fast.benchmarks.tuning.run import PLAN_FORMAT
from infimm_fast.export.common.artifact import write_json
from infimm_fast.kernels.common.cases import TUNE, Job, Op, find_ops, jobs_of
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
        line = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
        return found | {"dropped": f"does not compile: {type(error).__name__}: {line}"}
    return found | {"code": asdict(code), "dropped": "; ".join(flaws(code, job.arch))}


def _assess_named(op: str, job: Job, candidate: Candidate) -> dict[str, Any]:
    return assess(find_ops()[op], job, candidate)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the plan of one architecture."""
    import triton

    ops = find_ops()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--op", nargs="+", choices=tuple(ops), default=tuple(ops))
    parser.add_argument("--kernel", nargs="+", help="as in the op's kernels; default: all")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    jobs = []
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for name in options.op:
            for job in jobs_of(ops[name], TUNE, ("bfloat16",), (options.arch,)):
                if options.kernel is None or job.kernel in options.kernel:
                    candidates = candidates_of(ops[name], job)
                    count = len(candidates)
                    found = list(pool.map(_assess_named, [name] * count, [job] * count, candidates))
                    jobs.append({"op": name, "kernel": job.kernel, "case": job.case.name, "candidates": found})
                    dropped = sum(bool(one["dropped"]) for one in found)
                    print(f"{name} {job.kernel} {job.case.name}: {dropped} of {count} dropped", flush=True)
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    write_json(options.out, {"format": PLAN_FORMAT, "arch": options.arch, "versions": versions, "jobs": jobs})


if __name__ == "__main__":
    main()
