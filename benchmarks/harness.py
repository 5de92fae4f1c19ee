"""Runs a plan: for every case all implementations, each checked before it is timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from infimm_fast.benchmarks import SECTIONS
from infimm_fast.benchmarks.ceilings import Ceilings, measure_ceilings
from infimm_fast.benchmarks.environment import describe, gpu_state
from infimm_fast.benchmarks.registry import (
    DTYPES,
    IMPLEMENTATIONS,
    OPS,
    Case,
    Implementation,
    Inputs,
    Op,
    Plan,
    Prepared,
    Run,
    load_suites,
    prepare,
)
from infimm_fast.benchmarks.report import CaseResult, Report, Row
from infimm_fast.benchmarks.timing import MIN_SAMPLES, WARM_UPS, Timer, input_sets, peak_memory_mb, pinned_threads
from infimm_fast.errors import ConfigurationError

# What a row costs beside its timing: inputs, the check, the first run.
_OVERHEAD_SECONDS = 0.5
# Implementations of long cases reach a third of the ceiling or more; the others are short anyway.
_SLOW_SHARE = 0.3


@dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    Attributes:
        sections: which of `infimm_fast.benchmarks.SECTIONS`.
        plan: preset, dtype, device, tiles.
        seconds: of timing for each row.
        budget: of the whole run in seconds, or None for no limit.
        against: only these peers beside our own implementations, or None for all.
        ops: only these ops, or None for all of the sections.
    """

    sections: tuple[str, ...]
    plan: Plan
    seconds: float
    budget: float | None = None
    against: tuple[str, ...] | None = None
    ops: tuple[str, ...] | None = None


@dataclass
class Progress:
    """What a run tells whoever watches it; every function may be replaced.

    Attributes:
        start: called with the report's head and the number of cases.
        case: called before a case.
        done: called after a case, with the report so far.
    """

    start: Callable[[Report, int], None] = lambda report, cases: None
    case: Callable[[str], None] = lambda name: None
    done: Callable[[CaseResult, Report], None] = lambda result, report: None


@dataclass
class Budget:
    """Decides whether a case fits into the time that is left.

    Estimates of an op are corrected by the worst of its cases so far.

    Attributes:
        seconds: of the whole run, or None for no limit.
        now: the host's clock in seconds.
    """

    seconds: float | None
    now: Callable[[], float] = time.perf_counter
    _started: float = field(init=False)
    _corrections: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._started = self.now()

    def fits(self, op: str, estimate: float) -> bool:
        """Return whether a case of an op, estimated at so many seconds, ends in time."""
        if self.seconds is None:
            return True
        return self.now() - self._started + estimate * self._corrections.get(op, 1.0) <= self.seconds

    @contextlib.contextmanager
    def watch(self, op: str, estimate: float) -> Iterator[None]:
        """Learn from what a case really takes."""
        started = self.now()
        yield
        self._corrections[op] = max(self._corrections.get(op, 1.0), (self.now() - started) / estimate)


def run_benchmarks(settings: Settings, progress: Progress, now: Callable[[], float] = time.perf_counter) -> Report:
    """Run a plan.

    Args:
        settings: what to run.
        progress: who is told.
        now: the host's clock in seconds, for everything but the ceilings.

    Raises:
        ConfigurationError: a section, an op or a peer is not known, or an artifact is none.
    """
    load_suites()
    plan = settings.plan
    _check_settings(settings)
    budget = Budget(settings.budget, now)
    timer = Timer(plan.device, settings.seconds, now)
    work = [
        (op, case)
        for op in sorted(OPS.values(), key=lambda op: SECTIONS.index(op.section))
        if op.section in settings.sections and (settings.ops is None or op.name in settings.ops)
        for case in op.cases(plan)
    ]
    work.sort(key=lambda pair: pair[1].importance)
    with pinned_threads():
        ceilings = measure_ceilings(DTYPES[plan.dtype], Timer(plan.device, settings.seconds))
        report = Report(_title(plan), describe(plan.device), _describe_settings(settings), asdict(ceilings))
        progress.start(report, len(work))
        for op, case in work:
            chosen = _choose(op, settings.against)
            estimate = _estimate(op, case, chosen, timer, ceilings)
            if not budget.fits(op.name, estimate):
                report.left_out.append(f"{op.name}, {case.name}")
                continue
            progress.case(f"{op.name}, {case.name}")
            with budget.watch(op.name, estimate):
                result = run_case(op, case, chosen, timer, ceilings)
            report.cases.append(result)
            progress.done(result, report)
    return report


def run_case(op: Op, case: Case, implementations: Sequence[Implementation], timer: Timer, ceilings: Ceilings) -> CaseResult:
    """Check and time every implementation on one case."""
    device = timer.device
    least_ms, bound = ceilings.least_ms(case.flops, case.bytes)
    sets = input_sets(case.bytes, device)
    with torch.set_grad_enabled(case.backward):
        rows = _measure_all(op, case, implementations, sets, timer)
    return CaseResult(
        op=op.name,
        section=op.section,
        case=case.name,
        sizes=case.sizes,
        dtype=case.dtype,
        importance=case.importance,
        backward=case.backward,
        flops=case.flops,
        bytes=case.bytes,
        series=case.series,
        bound=bound,
        input_sets=sets,
        gpu=gpu_state(device),
        rows=[_with_rates(row, case, least_ms) for row in rows],
    )


def _measure_all(op: Op, case: Case, implementations: Sequence[Implementation], sets: int, timer: Timer) -> list[Row]:
    try:
        inputs = [op.make_inputs(case, timer.device, seed=100 * index) for index in range(sets)]
        expected = op.expected(case, inputs[0])
    except torch.cuda.OutOfMemoryError as error:
        # The card is too small for this case, whoever computes it.
        remark = f"{_refusal(error)} for inputs and reference"
        return [Row(one.name, "eager", one.ours, remark=remark) for one in implementations]
    return [row for one in implementations for row in _measure(op, case, one, inputs, expected, timer)]


def _with_rates(row: Row, case: Case, least_ms: float) -> Row:
    if row.median_ms is None:
        return row
    return replace(
        row,
        tflops=case.flops / (row.median_ms * 1e9),
        share=least_ms / row.median_ms,
        pictures_per_s=case.pictures / row.median_ms * 1e3 if case.pictures else None,
    )


def _measure(
    op: Op, case: Case, implementation: Implementation, inputs: Sequence[Inputs], expected: Any, timer: Timer
) -> list[Row]:
    """Return the rows of one implementation: a checked figure for each launch mode, or a remark."""
    blank = Row(implementation.name, "eager", implementation.ours)
    if obstacle := implementation.obstacle(case, timer.device):
        return [replace(blank, remark=obstacle)]
    with contextlib.ExitStack() as stack:
        if implementation.setup_seconds:
            # After eight shapes of one function the compiler would give up and run it as it stands.
            stack.callback(torch.compiler.reset)
        try:
            prepared = []
            for one in inputs:
                prepared.append(prepare(op, case, implementation, one))
                stack.callback(prepared[-1].close)
            runs = [one.run for one in prepared]
            # Compiling and other work of the first run; an error here is a refusal, one in the check a wrong result.
            runs[0]()
            try:
                errors = op.check(case, inputs[0], expected, implementation.name, runs[0])
            except AssertionError as error:
                return [replace(blank, remark=f"FAILED the check: {error}", failed=True)]
            checked = replace(blank, errors={name: asdict(error) for name, error in errors.items()})
            rows = [_time_eager(op, checked, prepared[0], runs, timer)]
        except Exception as error:  # whatever a peer raises is its own affair, and shown
            return [replace(blank, remark=_refusal(error), failed=implementation.ours)]
        if timer.device.type == "cuda" and implementation.graph and not op.wall_clock:
            rows.append(_time_graph(op, checked, runs, timer))
    return rows


def _time_eager(op: Op, row: Row, prepared: Prepared, runs: list[Run], timer: Timer) -> Row:
    time_runs = timer.wall if op.wall_clock else timer.eager
    row = _with_times(row, time_runs(runs))
    stages = {name: time_runs([run]).median for name, run in prepared.stages.items()}
    return replace(row, stages=stages, peak_memory_mb=peak_memory_mb(runs[0], timer.device))


def _time_graph(op: Op, row: Row, runs: list[Run], timer: Timer) -> Row:
    row = replace(row, mode="graph")
    try:
        return _with_times(row, timer.graph(runs[: op.largest_graph]))
    except Exception as error:  # a peer that waits for the device cannot be captured
        return replace(row, remark=_refusal(error))


def _with_times(row: Row, times: Any) -> Row:
    return replace(
        row, median_ms=times.median, p10_ms=times.percentile(10), p90_ms=times.percentile(90), samples=len(times.samples)
    )


def _refusal(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, ImportError):
        return f"not installed: {lines[0] if lines else type(error).__name__}"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "does not run: out of memory"
    return f"does not run: {type(error).__name__}: {lines[0][:160] if lines else ''}"


def _choose(op: Op, against: tuple[str, ...] | None) -> list[Implementation]:
    return [one for one in IMPLEMENTATIONS[op.name].values() if one.ours or against is None or one.name in against]


def _estimate(op: Op, case: Case, implementations: Sequence[Implementation], timer: Timer, ceilings: Ceilings) -> float:
    """Return how many seconds a case takes, compiling included."""
    slow = ceilings.least_ms(case.flops, case.bytes)[0] / 1e3 / _SLOW_SHARE
    each = max(timer.seconds, (WARM_UPS + MIN_SAMPLES) * slow)
    total = _OVERHEAD_SECONDS
    for implementation in implementations:
        if implementation.obstacle(case, timer.device) is None:
            # A graph besides, or the stages once more.
            twice = op.wall_clock or (timer.device.type == "cuda" and implementation.graph)
            total += implementation.setup_seconds + _OVERHEAD_SECONDS + (2 if twice else 1) * each
    return total


def _check_settings(settings: Settings) -> None:
    if settings.sections == ("export",) and not settings.plan.artifacts:
        raise ConfigurationError("section 'export' times exported models; name their folders with --artifact")
    for kind, asked, known in (
        ("section", settings.sections, SECTIONS),
        ("op", settings.ops or (), tuple(OPS)),
        ("peer", settings.against or (), tuple({name for ones in IMPLEMENTATIONS.values() for name in ones})),
    ):
        for name in asked:
            if name not in known:
                raise ConfigurationError(f"{kind} {name!r} is not known; choose from {', '.join(sorted(known))}")


def _title(plan: Plan) -> str:
    on_gpu = plan.device.type == "cuda"
    where = torch.cuda.get_device_name(plan.device) if on_gpu else "CPU"
    scaled_down = " (scaled down: no GPU, so a tiny preset)" if plan.tiny and not on_gpu else ""
    return f"{plan.preset} in {plan.dtype} on {where}{scaled_down}"


def _describe_settings(settings: Settings) -> dict[str, Any]:
    return {
        "sections": list(settings.sections),
        "preset": settings.plan.preset,
        "dtype": settings.plan.dtype,
        "tiles": list(settings.plan.tile_counts),
        "artifacts": list(settings.plan.artifacts),
        "seconds": settings.seconds,
        "budget": settings.budget,
        "against": None if settings.against is None else list(settings.against),
    }
