"""Check and time the candidates of a plan: one command, made for a GPU that is rented by the minute.

Nothing is timed before its result was checked against the fp64 reference, and nothing that fails ends the run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from infimm_fast.benchmarks.ceilings import measure_ceilings
from infimm_fast.benchmarks.environment import describe, file_name, gpu_state
from infimm_fast.benchmarks.registry import Inputs, Run
from infimm_fast.benchmarks.timing import Timer, input_sets
from infimm_fast.benchmarks.tuning.candidates import Candidate, constants_set
from infimm_fast.benchmarks.tuning.jobs import TIMED_KERNELS, Job, launch, make_inputs, suite_of
from infimm_fast.benchmarks.tuning.plan import Assessed, TuningPlan
from infimm_fast.benchmarks.tuning.results import JobResult, Measured, Results
from infimm_fast.benchmarks.tuning.warm import NOT_REACHED, warm_up
from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.launch import interpreting
from infimm_fast.kernels.common.numerics import assert_error_budget, poisoned_memory
from infimm_fast.kernels.common.offline import recorded_launches

# What a candidate costs beside its timing, and a job for inputs and reference; seconds.
_CANDIDATE_SECONDS, _JOB_SECONDS = 0.3, 2.0


@dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    Attributes:
        budget: seconds for everything, or None for no limit.
        processes: that compile at the same time; 0 leaves compiling to the timing process.
        seconds: of timing for each candidate and launch mode.
        limit: seconds for compiling, at most half of the budget.
    """

    budget: float | None = None
    processes: int = 12
    seconds: float = 0.1
    limit: float = 150


class BrokenDeviceError(RuntimeError):
    """The GPU's context is lost: nothing more can run in this process."""


def find_device(arch: int) -> torch.device:
    """Return the GPU that a plan is for, or the CPU under Triton's interpreter.

    Raises:
        ConfigurationError: there is neither, or the GPU is of another generation.
    """
    if interpreting():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigurationError("tuning runs on a GPU, or with TRITON_INTERPRET=1 on a CPU; there is neither")
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor != arch:
        raise ConfigurationError(f"the plan is for compute capability {arch / 10}; this GPU has {major}.{minor}")
    return torch.device("cuda", torch.cuda.current_device())


def run_plan(plan: TuningPlan, settings: Settings, out: Path, tell: Callable[[str], None]) -> int:
    """Run a plan, store after each job, and print a table.

    Args:
        plan: its dropped candidates are left alone, but for the shipped ones.
        settings: how long.
        out: folder of the JSON file.
        tell: takes a line.

    Returns:
        1 if there is no checked time of a shipped configuration, else 0.

    Raises:
        ConfigurationError: see `find_device`.
    """
    device, started = find_device(plan.arch), time.monotonic()
    jobs = [(job, [one for one in candidates if not one.dropped or one.candidate.shipped]) for job, candidates in plan.jobs]
    remarks = _warm(jobs, settings, plan.arch, device, tell)
    timer = Timer(device, settings.seconds)
    results = Results(describe(device))
    if device.type == "cuda":
        results.ceilings = asdict(measure_ceilings(torch.bfloat16, timer))
    file = out / file_name(results.environment, "tuning")
    for job, candidates in jobs:
        estimate = _JOB_SECONDS + (len(candidates) + 1) * (2 * settings.seconds + _CANDIDATE_SECONDS)
        late = settings.budget is not None and time.monotonic() - started + estimate > settings.budget
        if late or remarks[id(job)][0] == NOT_REACHED:
            results.left_out.append(_title(job))
            continue
        try:
            result = run_job(job, candidates, remarks[id(job)], timer, plan.arch)
        except BrokenDeviceError as error:
            results.jobs.append(JobResult(job, [], remark=str(error)))
            results.left_out += [_title(later) for later, _ in jobs[jobs.index((job, candidates)) + 1 :]]
            break
        results.jobs.append(result)
        results.save(file)
        tell(_line(result, candidates))
    results.save(file)
    for line in _table(results, jobs):
        tell(line)
    tell(f"written: {file}; {time.monotonic() - started:.0f} s")
    return int(any(result.failed for result in results.jobs))


def _warm(
    jobs: Sequence[tuple[Job, list[Assessed]]], settings: Settings, arch: int, device: torch.device, tell: Any
) -> dict[int, list[str]]:
    """Return for each job (by identity) what keeps each of its candidates from being timed."""
    if not settings.processes:
        return {id(job): [""] * len(candidates) for job, candidates in jobs}
    tasks = [(job, one.candidate) for job, candidates in jobs for one in candidates]
    limit = settings.limit if settings.budget is None else min(settings.limit, settings.budget / 2)
    found = iter(warm_up(tasks, device, arch, settings.processes, limit, tell))
    return {id(job): [next(found) for _ in candidates] for job, candidates in jobs}


def run_job(job: Job, candidates: Sequence[Assessed], remarks: Sequence[str], timer: Timer, arch: int) -> JobResult:
    """Check and time all candidates of one job, the shipped one first and again last.

    Raises:
        BrokenDeviceError: nothing more can run.
    """
    op, case, device = suite_of(job), job.case, timer.device
    try:
        sets = input_sets(case.bytes, device)
        inputs = [make_inputs(job, device, 100 * index, arch) for index in range(sets)]
        with torch.set_grad_enabled(job.backward):
            expected = op.expected(case, inputs[0])
    except Exception as error:  # too little memory, most likely; other jobs are smaller
        return JobResult(job, [], remark=_remark(error, device))
    measured = [
        Measured(one.candidate, remark=remark, wrong=remark != NOT_REACHED)
        if remark
        else measure(job, one.candidate, inputs, expected, timer, arch)
        for one, remark in zip(candidates, remarks, strict=True)
    ]
    again = None
    if measured[0].ms is not None:
        again = time_candidate(job, measured[0].candidate, inputs, timer, arch)["ms"]
    return JobResult(job, measured, again, gpu_state(device))


def measure(job: Job, candidate: Candidate, inputs: Sequence[Inputs], expected: Any, timer: Timer, arch: int) -> Measured:
    """Check one candidate and then time it."""
    try:
        with constants_set(job, candidate.constants), poisoned_memory():
            outputs = launch(job, inputs[0], candidate.config, arch)
        actual, (plain, exact) = suite_of(job).checked(job.case, outputs), expected
        errors = {name: asdict(assert_error_budget(name, actual[name], plain[name], exact[name])) for name in exact}
        return Measured(candidate, errors=errors, **time_candidate(job, candidate, inputs, timer, arch))
    except AssertionError as error:
        return Measured(candidate, remark=f"FAILED the check: {error}", wrong=True)
    except Exception as error:  # one candidate that does not run is a result, not an end
        return Measured(candidate, remark=_remark(error, timer.device), wrong=True)


def time_candidate(job: Job, candidate: Candidate, inputs: Sequence[Inputs], timer: Timer, arch: int) -> dict[str, Any]:
    """Return the times of one candidate, as `Measured` names them."""
    with constants_set(job, candidate.constants):
        runs = [timed_run(job, candidate, one, arch) for one in inputs]
        eager = timer.eager(runs)
        times = timer.graph(runs) if timer.device.type == "cuda" else eager
    return {"ms": times.median, "p10_ms": times.percentile(10), "p90_ms": times.percentile(90), "eager_ms": eager.median}


def timed_run(job: Job, candidate: Candidate, inputs: Inputs, arch: int) -> Run:
    """Return what is timed: the launcher, or the job's kernel alone where its launcher runs several for other jobs too."""
    if job.kernel not in TIMED_KERNELS or interpreting():
        return lambda: launch(job, inputs, candidate.config, arch)
    with recorded_launches() as launches:
        launch(job, inputs, candidate.config, arch)

    def replay(only: str | None = None) -> None:
        for one in launches:
            if only is None or one.kernel.__name__ == only:
                one.kernel[one.grid](*one.args, **one.kwargs)

    # Once everything: the kernel reads what others have written.
    replay()
    return lambda: replay(TIMED_KERNELS[job.kernel])


def _remark(error: Exception, device: torch.device) -> str:
    lines = str(error).strip().splitlines()
    remark = f"does not run: {type(error).__name__}: {lines[0][:200] if lines else ''}"
    if device.type == "cuda":
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            try:
                torch.cuda.synchronize(device)
            except RuntimeError as broken:
                raise BrokenDeviceError(remark) from broken
        torch.cuda.empty_cache()
    return remark


def _title(job: Job) -> str:
    return f"{job.op} {job.kernel} {job.name}"


def _line(result: JobResult, candidates: Sequence[Assessed]) -> str:
    wrong = sum(one.wrong for one in result.measured)
    best = result.best
    found = f"best {best.ms:.4f} ms, {best.candidate.label}" if best else result.remark or "no time"
    return f"{_title(result.job)}: {len(candidates)} candidates, {wrong} failed; {found}"


def _table(results: Results, jobs: Sequence[tuple[Job, list[Assessed]]]) -> list[str]:
    """Return one line for each job, and what went wrong."""
    planned = {_title(job): candidates for job, candidates in jobs}
    lines = [f"{'op':<23}{'kernel':<12}{'D':<6}{'shipped':>9}{'best':>9}{'gain':>7}{'noise':>7}{'predicted':>10}  best"]
    for result in results.jobs:
        job, shipped, best = result.job, result.shipped, result.best
        head = f"{job.op:<23}{job.kernel:<12}{job.width:<6}"
        if shipped is None or shipped.ms is None or best is None or best.ms is None:
            lines.append(f"{head} {result.remark or (shipped.remark if shipped else 'no time')}"[:200])
            continue
        predicted = next((one.prediction for one in planned[_title(job)] if one.candidate == best.candidate), None)
        lines.append(
            f"{head}{shipped.ms:>9.4f}{best.ms:>9.4f}{shipped.ms / best.ms - 1:>7.1%}{result.noise or 0.0:>7.1%}"
            f"{predicted.ms if predicted else 0.0:>10.4f}  {best.candidate.label}"
        )
    for result in results.jobs:
        lines += [
            f"! {_title(result.job)}, {one.candidate.label}: {one.remark}"[:240] for one in result.measured if one.remark
        ][:3]
    return lines + [f"left out, no time in the budget: {name}" for name in results.left_out]
