"""Runs a plan: for every case all implementations, each checked before it is timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from infimm_fast.benchmarks import SECTIONS, registry
from infimm_fast.benchmarks.ceilings import Ceilings, measure_ceilings
from infimm_fast.benchmarks.environment import describe, gpu_state
from infimm_fast.benchmarks.registry import BenchCase, Implementation, Plan, Prepared, Run, Stage, prepare
from infimm_fast.benchmarks.report import CaseResult, Report, Row
from infimm_fast.benchmarks.timing import MIN_SAMPLES, WARM_UPS, Timer, input_sets, peak_memory_mb, pinned_threads
from infimm_fast.dtypes import DTYPES
from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.cases import Inputs

# What a row costs beside its timing: inputs, the check, the first run.
_OVERHEAD_SECONDS = 0.5
# Implementations of long cases reach a third of the ceiling or more; the others are short anyway.
_SLOW_SHARE = 0.3
# How often figures above a ceiling make the ceilings be measured again; data that stays in a cache passes them every time.
_MOST_REPEATS = 3


@dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    Attributes:
        sections: which of `infimm_fast.benchmarks.SECTIONS`.
        plan: preset, dtype, device, tiles.
        seconds: of timing for each row.
        budget: of the whole run in seconds, or None for no limit.
        against: only these peers beside our own implementations, or None for all.
        ops: only these stages, or None for all of the sections.
    """

    sections: tuple[str, ...]
    plan: Plan
    seconds: float
    budget: float | None = None
    against: tuple[str, ...] | None = None
    ops: tuple[str, ...] | None = None


class Budget:
    """Decides whether a case fits into the time that is left.

    Estimates of a stage are corrected by the worst of its cases so far.

    Args:
        seconds: of the whole run, or None for no limit.
        now: the host's clock in seconds.
    """

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.perf_counter):
        self.seconds, self.now, self._started = seconds, now, now()
        self._corrections: dict[str, float] = {}

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self.now() - self._started

    def fits(self, stage: str, estimate: float) -> bool:
        """Return whether a case of a stage, estimated at so many seconds, ends in time."""
        return self.seconds is None or self.spent + estimate * self._corrections.get(stage, 1.0) <= self.seconds

    @contextlib.contextmanager
    def watch(self, stage: str, estimate: float) -> Iterator[None]:
        """Learn from what a case really takes."""
        started = self.now()
        yield
        self._corrections[stage] = max(self._corrections.get(stage, 1.0), (self.now() - started) / estimate)


def run_benchmarks(
    settings: Settings,
    tell: Callable[[str], None] = lambda line: None,
    done: Callable[[Report], None] = lambda report: None,
    now: Callable[[], float] = time.perf_counter,
) -> Report:
    """Run a plan.

    Args:
        settings: what to run.
        tell: called with a line at the start and before each case.
        done: called after each case, with the report so far.
        now: the host's clock in seconds, for everything but the ceilings.

    Raises:
        ConfigurationError: a section, a stage or a peer is not known, or an artifact is none.
    """
    registry.load_suites()
    _check_settings(settings)
    plan, repeats = settings.plan, 0
    budget, timer = Budget(settings.budget, now), Timer(plan.device, settings.seconds, now)
    work = [
        (stage, case)
        for stage in sorted(registry.STAGES.values(), key=lambda stage: SECTIONS.index(stage.section))
        if stage.section in settings.sections and (settings.ops is None or stage.name in settings.ops)
        for case in stage.cases(plan)
    ]
    work.sort(key=lambda pair: pair[1].importance)
    with pinned_threads():
        ceilings = _measure_ceilings(settings)
        report = Report(_title(plan), describe(plan.device), _describe_settings(settings), asdict(ceilings))
        tell(_head(report))
        for index, (stage, case) in enumerate(work, 1):
            known = registry.IMPLEMENTATIONS[stage.name].values()
            chosen = [one for one in known if one.ours or settings.against is None or one.name in settings.against]
            estimate = _estimate(stage, case, chosen, timer, ceilings)
            if not budget.fits(stage.name, estimate):
                report.left_out.append(f"{stage.name}, {case.name}")
                continue
            tell(f"[{index}/{len(work)}, {budget.spent:.0f} s] {stage.name}, {case.name}, {case.dtype}")
            with budget.watch(stage.name, estimate):
                report.cases.append(run_case(stage, case, chosen, timer, ceilings))
            if report.cases[-1].above_ceiling and repeats < _MOST_REPEATS:
                repeats += 1
                ceilings = ceilings.raised_by(_measure_ceilings(settings))
                report.ceilings, report.cases = asdict(ceilings), [one.rated(ceilings) for one in report.cases]
                tell(f"a figure is above a ceiling, so they were measured again; {report.ceilings_line}")
            done(report)
    return report


def _measure_ceilings(settings: Settings) -> Ceilings:
    return measure_ceilings(DTYPES[settings.plan.dtype], Timer(settings.plan.device, settings.seconds))


def run_case(
    stage: Stage, case: BenchCase, implementations: Sequence[Implementation], timer: Timer, ceilings: Ceilings
) -> CaseResult:
    """Check and time every implementation on one case."""
    sets = input_sets(case.bytes, timer.device)
    with torch.set_grad_enabled(case.backward):
        rows = _measure_all(stage, case, implementations, sets, timer)
    where: dict[str, Any] = {"op": stage.name, "section": stage.section, "gpu": gpu_state(timer.device)}
    return CaseResult(**vars(case), **where, input_sets=sets, rows=rows).rated(ceilings)


def _measure_all(
    stage: Stage, case: BenchCase, implementations: Sequence[Implementation], sets: int, timer: Timer
) -> list[Row]:
    try:
        inputs = [stage.make_inputs(case, timer.device, seed=100 * index) for index in range(sets)]
        expected = stage.expected(case, inputs[0])
    except torch.cuda.OutOfMemoryError as error:
        # The card is too small for this case, whoever computes it.
        remark = f"{refusal(error)} for inputs and reference"
        return [Row(one.name, "eager", one.ours, remark=remark) for one in implementations]
    return [row for one in implementations for row in _measure(stage, case, one, inputs, expected, timer)]


def _measure(
    stage: Stage, case: BenchCase, implementation: Implementation, inputs: Sequence[Inputs], expected: Any, timer: Timer
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
                prepared.append(prepare(stage, case, implementation, one))
                stack.callback(prepared[-1].close)
            runs = [one.run for one in prepared]
            # Compiling and other work of the first run; an error here is a refusal, one in the check a wrong result.
            runs[0]()
            try:
                errors = stage.check(case, inputs[0], expected, implementation.name, runs[0])
            except AssertionError as error:
                return [replace(blank, remark=f"FAILED the check: {error}", failed=True)]
            checked = replace(blank, errors={name: asdict(error) for name, error in errors.items()})
            rows = [_time_eager(stage, checked, prepared[0], runs, timer)]
        except Exception as error:  # whatever a peer raises is its own affair, and shown
            return [replace(blank, remark=refusal(error), failed=implementation.ours)]
        if _captured(stage, implementation, timer):
            rows.append(_time_graph(stage, checked, runs, timer))
    return rows


def _captured(stage: Stage, implementation: Implementation, timer: Timer) -> bool:
    return timer.device.type == "cuda" and implementation.graph and not stage.wall_clock


def _time_eager(stage: Stage, row: Row, prepared: Prepared, runs: list[Run], timer: Timer) -> Row:
    time_runs = timer.wall if stage.wall_clock else timer.eager
    figures = time_runs(runs).figures
    stages = {name: time_runs([run]).median for name, run in prepared.stages.items()}
    return replace(row, **figures, stages=stages, peak_memory_mb=peak_memory_mb(runs[0], timer.device))


def _time_graph(stage: Stage, row: Row, runs: list[Run], timer: Timer) -> Row:
    row = replace(row, mode="graph")
    try:
        return replace(row, **timer.graph(runs[: stage.largest_graph]).figures)
    except Exception as error:  # a peer that waits for the device cannot be captured
        return replace(row, remark=refusal(error))


def refusal(error: Exception, verb: str = "run") -> str:
    """Return why something does not run, in one line; `verb` in place of "run"."""
    lines = str(error).strip().splitlines()
    if isinstance(error, ImportError):
        return f"not installed: {lines[0] if lines else type(error).__name__}"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
        return f"does not {verb}: out of memory"
    return f"does not {verb}: {type(error).__name__}: {lines[0][:160] if lines else ''}"


def _estimate(
    stage: Stage, case: BenchCase, implementations: Sequence[Implementation], timer: Timer, ceilings: Ceilings
) -> float:
    """Return how many seconds a case takes, compiling included."""
    slow = ceilings.least_ms(case.flops, case.bytes)[0] / 1e3 / _SLOW_SHARE
    each = max(timer.seconds, (WARM_UPS + MIN_SAMPLES) * slow)
    total = _OVERHEAD_SECONDS
    for one in implementations:
        if one.obstacle(case, timer.device) is None:
            # A graph besides, or the stages once more.
            twice = stage.wall_clock or _captured(stage, one, timer)
            total += one.setup_seconds + _OVERHEAD_SECONDS + (2 if twice else 1) * each
    return total


def _check_settings(settings: Settings) -> None:
    if settings.sections == ("export",) and not settings.plan.artifacts:
        raise ConfigurationError("section 'export' times exported models; name their folders with --artifact")
    for kind, asked, known in (
        ("section", settings.sections, SECTIONS),
        ("op", settings.ops or (), tuple(registry.STAGES)),
        ("peer", settings.against or (), tuple({name for ones in registry.IMPLEMENTATIONS.values() for name in ones})),
    ):
        for name in asked:
            if name not in known:
                raise ConfigurationError(f"{kind} {name!r} is not known; choose from {', '.join(sorted(known))}")


def _title(plan: Plan) -> str:
    on_gpu = plan.device.type == "cuda"
    where = torch.cuda.get_device_name(plan.device) if on_gpu else "CPU"
    scaled_down = " (scaled down: no GPU, so a tiny preset)" if plan.tiny and not on_gpu else ""
    return f"{plan.preset} in {plan.dtype} on {where}{scaled_down}"


def _head(report: Report) -> str:
    where = report.environment
    versions = f"torch {where['torch']}, triton {where['triton'] or 'not installed'}"
    machine = f"{where['device']}, {versions}, {where['threads']} threads, commit {where['commit']}"
    return f"{report.title}\n{machine}\n{report.ceilings_line}"


def _describe_settings(settings: Settings) -> dict[str, Any]:
    plan = settings.plan
    asked = {name: getattr(settings, name) for name in ("sections", "seconds", "budget", "against")}
    asked |= {"preset": plan.preset, "dtype": plan.dtype, "tiles": plan.tile_counts, "artifacts": plan.artifacts}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()}
