"""One run of the tuner: compile in parallel, check, time, choose; stored after each job."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from infimm_fast.benchmarks.ceilings import Ceilings, measure_ceilings
from infimm_fast.benchmarks.environment import describe, file_name, gpu_state
from infimm_fast.benchmarks.harness import Budget, refusal
from infimm_fast.benchmarks.report import read_json
from infimm_fast.benchmarks.timing import Timer, input_sets
from infimm_fast.benchmarks.tuning.candidates import Candidate, candidates_of, constants_set, select_jobs
from infimm_fast.dtypes import DTYPES
from infimm_fast.errors import ConfigurationError
from infimm_fast.export.common.artifact import write_json
from infimm_fast.kernels.common.cases import TUNE, Inputs, Job, Op, Outputs, find_ops
from infimm_fast.kernels.common.launch import interpreting
from infimm_fast.kernels.common.numerics import assert_error_budget, poisoned_memory
from infimm_fast.kernels.common.offline import recorded_launches

FORMAT, PLAN_FORMAT = "infimm_fast tuning run 2", "infimm_fast tuning plan 2"
# Candidates of a job that are timed, by the importance of its case.
MOST = {0: 16, 1: 8, 2: 5, 3: 4}
# What a candidate costs beside its timing, and a job for inputs and reference; seconds.
_CANDIDATE_SECONDS, _JOB_SECONDS = 0.3, 2.0
# Share of a time from which on another configuration counts as faster; twice the noise if that is more.
_LEAST_GAIN = 0.02
# By (op, kernel, case): label -> why the candidate is not worth a try.
Plan = Mapping[tuple[str, str, str], Mapping[str, str]]


@dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    Attributes:
        ops: names, or None for all; so are `kernels` and `widths`.
        kernels: see `ops`.
        widths: see `ops`.
        dtype: a key of `infimm_fast.dtypes.DTYPES`.
        budget: seconds for everything, or None for no limit.
        seconds: of timing for each candidate.
        processes: that compile at the same time; 0 leaves compiling to the timing process.
        plan: see `read_plan`.
    """

    ops: Sequence[str] | None = None
    kernels: Sequence[str] | None = None
    widths: Sequence[int] | None = None
    dtype: str = "bfloat16"
    budget: float | None = None
    seconds: float = 0.1
    processes: int = 0
    plan: Plan = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One candidate: a time behind a check, or the reason why there is none.

    Attributes:
        label: of the candidate.
        ms: median of replays of a CUDA graph, or of calls where there is no GPU.
        errors: of each checked result: max_abs, rms, and what was allowed.
        remark: why there is no time.
    """

    label: str
    ms: float | None = None
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class JobResult:
    """All candidates of one job, the shipped one first.

    Attributes:
        op: its name.
        kernel: key of the op's kernels.
        case: its name.
        width: head dim or channels.
        floor_ms: the least time by arithmetic and bytes, None without measured ceilings.
        measured: empty if nothing could be.
        again_ms: the shipped candidate once more, after all others.
        gpu: clock, temperature and power afterwards; empty on a CPU.
        remark: why nothing was measured.
    """

    op: str
    kernel: str
    case: str
    width: int
    floor_ms: float | None = None
    measured: list[Measured] = field(default_factory=list)
    again_ms: float | None = None
    gpu: dict[str, str] = field(default_factory=dict)
    remark: str = ""

    @property
    def choice(self) -> Measured | None:
        """The fastest candidate if it beats the shipped one by more than the noise, else that; None if that failed."""
        shipped = self.measured[0] if self.measured else None
        if shipped is None or shipped.ms is None or self.again_ms is None:
            return None
        noise = abs(self.again_ms - shipped.ms) / shipped.ms
        best = min((one for one in self.measured if one.ms), key=lambda one: one.ms or 0.0)
        limit = min(shipped.ms, self.again_ms) / (1 + max(_LEAST_GAIN, 2 * noise))
        return best if best.ms is not None and best.ms < limit else shipped


def read_plan(file: Path) -> Plan:
    """Return what an offline plan says against candidates.

    Raises:
        ConfigurationError: the file is no plan of this version.
    """
    plan = {}
    for job in read_json(file, "a tuning plan", PLAN_FORMAT)["jobs"]:
        dropped = {one["label"]: one["dropped"] for one in job["candidates"] if one["dropped"]}
        plan[job["op"], job["kernel"], job["case"]] = dropped
    return plan


def find_device() -> tuple[torch.device, int]:
    """Return the GPU and its compute capability, or under Triton's interpreter the CPU, for which those of a Hopper serve.

    Raises:
        ConfigurationError: there is neither.
    """
    if interpreting():
        return torch.device("cpu"), 90
    if not torch.cuda.is_available():
        raise ConfigurationError("tuning runs on a GPU, or with TRITON_INTERPRET=1 on a CPU; there is neither")
    major, minor = torch.cuda.get_device_capability()
    return torch.device("cuda", torch.cuda.current_device()), 10 * major + minor


def work_of(settings: Settings, arch: int) -> list[tuple[Op, Job, list[Candidate]]]:
    """Return the jobs that are asked for with the candidates to time, the most important first."""
    work = []
    for op, job in select_jobs(TUNE, (settings.dtype,), (arch,), settings):
        dropped = settings.plan.get((op.name, job.kernel, job.case.name), {})
        candidates = [one for one in candidates_of(op, job) if one.shipped or one.label not in dropped]
        work.append((op, job, candidates[: MOST[min(job.case.importance, max(MOST))]]))
    return sorted(work, key=lambda one: one[1].case.importance)


def tune(settings: Settings, out: Path, tell: Callable[[str], None]) -> int:
    """Run all jobs, store after each, and print a table.

    Args:
        settings: what and how long.
        out: folder of the JSON file.
        tell: takes a line.

    Returns:
        1 if there is no checked time of a shipped configuration, else 0.

    Raises:
        ConfigurationError: there is no device, or no such job.
    """
    (device, arch), budget = find_device(), Budget(settings.budget)
    work = work_of(settings, arch)
    if not work:
        raise ConfigurationError("no case has such an op, kernel and width")
    if settings.processes and device.type == "cuda":
        compile_all(work, settings, tell)
    timer, environment = Timer(device, settings.seconds), describe(device)
    ceilings = measure_ceilings(DTYPES[settings.dtype], timer) if device.type == "cuda" else None
    results: list[JobResult] = []
    left_out: list[str] = []
    out.mkdir(parents=True, exist_ok=True)
    file = out / file_name(environment, "tuning")

    def save() -> None:
        jobs = [asdict(one) | {"choice": one.choice.label if one.choice else None} for one in results]
        rates = asdict(ceilings) if ceilings else {}
        write_json(file, {"format": FORMAT, **environment, "ceilings": rates, "jobs": jobs, "left_out": left_out})

    for op, job, candidates in work:
        estimate = _JOB_SECONDS + (len(candidates) + 1) * (settings.seconds + _CANDIDATE_SECONDS)
        if not budget.fits(op.name, estimate):
            left_out.append(f"{op.name} {job.kernel} {job.case.name}")
            continue
        results.append(run_job(op, job, candidates, timer, ceilings))
        save()
        tell(_line(results[-1]))
    save()
    for result in results:
        for one in [one for one in result.measured if one.remark][:3]:
            tell(f"! {result.op} {result.kernel} {result.case}, {one.label}: {one.remark}"[:240])
    for name in left_out:
        tell(f"left out, no time in the budget: {name}")
    tell(f"written: {file}; {budget.spent:.0f} s")
    return int(any(result.choice is None for result in results))


def compile_all(work: Sequence[tuple[Op, Job, list[Candidate]]], settings: Settings, tell: Callable[[str], None]) -> None:
    """Fill Triton's disk cache in processes of their own, in at most half of the budget; nothing is launched there."""
    started, limit = time.monotonic(), None if settings.budget is None else settings.budget / 2
    tasks = [(op.name, job, candidate) for op, job, candidates in work for candidate in candidates]
    pool = ProcessPoolExecutor(settings.processes, mp_context=get_context("spawn"))
    try:
        done = sum(pool.map(_compile_one, *zip(*tasks, strict=True), timeout=limit))
        tell(f"compiled {done} of {len(tasks)} candidates; {time.monotonic() - started:.0f} s")
    except (OutOfTime, BrokenExecutor) as error:
        tell(f"not all of {len(tasks)} candidates were compiled beforehand: {type(error).__name__}")
        # Shutting down waits for what is compiled just now, which may hang.
        for process in list(pool._processes.values()):
            process.terminate()
    finally:
        pool.shutdown(cancel_futures=True)


def _compile_one(name: str, job: Job, candidate: Candidate) -> bool:
    op = find_ops()[name]
    inputs = op.make_inputs(job.case, DTYPES[job.dtype], torch.device("meta"))
    # Whatever the compiler refuses, the timing process will say.
    with contextlib.suppress(Exception):
        with constants_set(op, job, candidate.constants), recorded_launches() as launches:
            op.launch(job, inputs, candidate.config)
        for one in launches:
            one.kernel.warmup(*one.args, grid=one.grid, **one.kwargs)
        return True
    return False


def run_job(op: Op, job: Job, candidates: Sequence[Candidate], timer: Timer, ceilings: Ceilings | None = None) -> JobResult:
    """Check and time all candidates of one job, the shipped one first and again last."""
    device, dtype = timer.device, DTYPES[job.dtype]
    cost = op.cost(job.case, dtype, job.kernel)
    floor = ceilings.least_ms(cost.flops, cost.bytes)[0] if ceilings else None
    result = JobResult(op.name, job.kernel, job.case.name, op.width(job.case), floor)
    try:
        inputs = [make_inputs(op, job, device, 100 * index) for index in range(input_sets(cost.bytes, device))]
        with torch.set_grad_enabled(job.case.backward):
            plain, exact = (op.reference(job.case, inputs[0], one) for one in (dtype, torch.float64))
    except Exception as error:  # too little memory, most likely; other jobs are smaller
        return replace(result, remark=refusal(error))
    measured = [measure(op, job, one, inputs, (plain, exact), timer) for one in candidates]
    again = measured[0].ms and time_candidate(op, job, candidates[0], inputs, timer)
    return replace(result, measured=measured, again_ms=again, gpu=gpu_state(device))


def make_inputs(op: Op, job: Job, device: torch.device, seed: int) -> Inputs:
    """Return the op's inputs and, before a backward pass, the forward's results."""
    inputs = op.make_inputs(job.case, DTYPES[job.dtype], device, seed)
    if job.kernel.startswith("backward"):
        forward = replace(job, kernel="forward")
        inputs["forward"] = op.launch(forward, inputs, op.config(forward))
    return inputs


def measure(
    op: Op, job: Job, candidate: Candidate, inputs: Sequence[Inputs], expected: tuple[Outputs, Outputs], timer: Timer
) -> Measured:
    """Check one candidate and then time it."""
    plain, exact = expected
    try:
        with constants_set(op, job, candidate.constants), poisoned_memory():
            actual = op.checked(job.case, op.launch(job, inputs[0], candidate.config))
        errors = {name: asdict(assert_error_budget(name, x, plain[name], exact[name])) for name, x in actual.items()}
        return Measured(candidate.label, time_candidate(op, job, candidate, inputs, timer), errors)
    except AssertionError as error:
        return Measured(candidate.label, remark=f"FAILED the check: {error}")
    except Exception as error:  # one candidate that does not run is a result, not an end
        return Measured(candidate.label, remark=refusal(error))


def time_candidate(op: Op, job: Job, candidate: Candidate, inputs: Sequence[Inputs], timer: Timer) -> float:
    """Return the median of replays of a CUDA graph, or of calls where there is no GPU."""
    with constants_set(op, job, candidate.constants):
        runs = [timed_run(op, job, candidate, one) for one in inputs]
        times = timer.graph(runs) if timer.device.type == "cuda" else timer.eager(runs)
    return times.median


def timed_run(op: Op, job: Job, candidate: Candidate, inputs: Inputs) -> Callable[[], Any]:
    """Return what is timed: the launcher, or one kernel alone where a backward launcher runs several for other jobs too."""
    if not job.kernel.startswith("backward_") or interpreting():
        return lambda: op.launch(job, inputs, candidate.config)
    with recorded_launches() as launches:
        op.launch(job, inputs, candidate.config)

    def replay(only: str | None = None) -> None:
        for one in launches:
            if only is None or one.kernel.__name__ == only:
                one.kernel[one.grid](*one.args, **one.kwargs)

    # Once everything: the kernel reads what others have written.
    replay()
    return lambda: replay(op.kernels[job.kernel])


def _line(result: JobResult) -> str:
    head = f"{result.op:<19}{result.kernel:<12}{result.case[:44]:<45}"
    choice, shipped = result.choice, result.measured[0] if result.measured else None
    if choice is None or choice.ms is None or shipped is None or shipped.ms is None:
        return f"{head}{result.remark or (shipped.remark if shipped else '')}"[:200]
    floor = "" if result.floor_ms is None else f"floor {result.floor_ms:.4f} "
    gain = "keeps the shipped one" if choice is shipped else f"{shipped.ms / choice.ms:.2f} times: {choice.label}"
    return f"{head}{floor}shipped {shipped.ms:.4f} best {choice.ms:.4f} ms, {gain}"
