"""``python -m infimm_fast.benchmarks.tuning plan|run|report``; needs torch, triton and transformers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from infimm_fast.benchmarks.tuning.jobs import CROSS, RESIDUAL, SUBIMAGE, select_jobs
from infimm_fast.benchmarks.tuning.plan import TuningPlan, make_plan
from infimm_fast.benchmarks.tuning.prediction import MACHINES
from infimm_fast.errors import ConfigurationError


def _plan(options: argparse.Namespace) -> int:
    jobs = select_jobs(options.op, options.kernel, options.width)
    if not jobs:
        raise ConfigurationError("no job has such an op, kernel and width")
    plan = make_plan(jobs, options.arch, options.processes, lambda line: print(line, flush=True))
    plan.save(options.out)
    timed = sum(not one.dropped or one.candidate.shipped for _, candidates in plan.jobs for one in candidates)
    print(f"written: {options.out}; {len(plan.jobs)} jobs, {timed} candidates to time")
    return 0


def _run(options: argparse.Namespace) -> int:
    from infimm_fast.benchmarks.tuning.run import Settings, run_plan

    plan = TuningPlan.load(options.plan)
    plan.jobs = [
        (job, candidates)
        for job, candidates in plan.jobs
        if (options.op is None or job.op in options.op)
        and (options.kernel is None or job.kernel in options.kernel)
        and (options.width is None or job.width in options.width)
    ]
    settings = Settings(options.budget, options.processes, options.seconds, options.limit)
    return run_plan(plan, settings, options.out, lambda line: print(line, flush=True))


def _report(options: argparse.Namespace) -> int:
    from infimm_fast.benchmarks.tuning.report import write_notes

    write_notes(options.out, TuningPlan.load(options.plan), options.results or [])
    print(f"written: {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infimm_fast.benchmarks.tuning", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="plan|run|report")
    plan = commands.add_parser("plan", help="compile and judge candidates; needs no GPU")
    plan.add_argument("--arch", type=int, choices=tuple(MACHINES), default=90)
    plan.add_argument("--out", type=Path, default=Path("benchmarks/results/tuning_plan_sm90.json"))
    plan.set_defaults(command=_plan)
    run = commands.add_parser("run", help="check and time the candidates of a plan on a GPU")
    run.add_argument("--plan", type=Path, required=True)
    run.add_argument("--out", type=Path, required=True, help="folder of the JSON file")
    run.add_argument("--budget", type=float, help="seconds for everything; less important jobs are left out")
    run.add_argument("--seconds", type=float, default=0.1, help="of timing for each candidate and launch mode")
    run.add_argument("--limit", type=float, default=150, help="seconds for compiling all candidates")
    run.set_defaults(command=_run)
    for command, processes in ((plan, 2), (run, 12)):
        command.add_argument("--op", nargs="+", choices=(SUBIMAGE, CROSS, RESIDUAL))
        command.add_argument("--kernel", nargs="+", choices=("forward", "decode", "backward_kv", "backward_q", "backward"))
        command.add_argument("--width", type=int, nargs="+", help="head dims, or channels of ops without heads")
        command.add_argument("--processes", type=int, default=processes)
    report = commands.add_parser("report", help="write the notes file")
    report.add_argument("--plan", type=Path, required=True)
    report.add_argument("--results", type=Path, nargs="+", help="JSON files that `run` left")
    report.add_argument("--out", type=Path, default=Path("benchmarks/TUNING.md"))
    report.set_defaults(command=_report)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 if a shipped configuration failed its check, 2 if the arguments are not accepted."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ConfigurationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
