"""What can be measured: stages with their cases, and the implementations that compete on them."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from infimm_fast.benchmarks import SECTIONS
from infimm_fast.dtypes import DTYPES
from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.cases import BENCH, Case, Inputs, Op, Outputs, find_ops
from infimm_fast.kernels.common.numerics import Errors, assert_error_budget
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.presets import preset

Run = Callable[[], Any]
Series = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True)
class BenchCase(Case):
    """A case in one dtype, with what is needed to judge its time.

    Attributes:
        dtype: a key of `infimm_fast.dtypes.DTYPES`.
        flops: floating-point operations on true sizes, without padding, masked parts, or work that could be kept.
        bytes: fewest bytes that must be read and written.
        series: of the scaling plots that the case is a point of, (name, axis, value) each.
        preset: configuration of the model, where the stage needs a whole one.
        artifact: folder of an exported model, where it is about one.
        pictures: that one run takes in, for the throughput; 0 for none.
    """

    dtype: str
    flops: int
    bytes: int
    series: tuple[Series, ...] = ()
    preset: str = ""
    artifact: str = ""
    pictures: int = 0

    @classmethod
    def of_op(cls, op: Op, case: Case, dtype: str, series: tuple[Series, ...] = ()) -> BenchCase:
        """Return a case of an op in one dtype, at the op's own cost."""
        return cls(**vars(case), **vars(op.cost(case, DTYPES[dtype])), dtype=dtype, series=series)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of its tensors."""
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """What a run is about; stages make their cases from it.

    Attributes:
        preset: name of the model's configuration, see `infimm_fast.models.infimm_hd.presets`.
        dtype: a key of `infimm_fast.dtypes.DTYPES`.
        device: where everything runs.
        tiles: only these numbers of tiles, or None for those of the preset.
        artifacts: folders of exported models.
    """

    preset: str
    dtype: str
    device: torch.device
    tiles: tuple[int, ...] | None = None
    artifacts: tuple[str, ...] = ()

    @property
    def config(self) -> InfiMMHDConfig:
        """A fresh configuration of the preset."""
        return preset(self.preset)

    @property
    def tile_counts(self) -> tuple[int, ...]:
        """Tiles of one picture, rising: those asked for, or what grids of the preset give."""
        if self.tiles:
            return tuple(sorted(set(self.tiles)))
        return {1: (1,), 2: (1, 2, 5)}.get(self.config.max_grid, (1, 2, 4, 6, 10))

    @property
    def tiny(self) -> bool:
        """Whether the preset is scaled down, and texts and batches are to be so too."""
        return self.preset.startswith("tiny")


@dataclass(frozen=True)
class Prepared:
    """An implementation that is ready to be timed.

    Attributes:
        run: what is timed; returns the result that is checked.
        stages: parts of it that are timed apart, by name.
        close: undoes what preparing did to shared objects.
    """

    run: Run
    stages: dict[str, Run] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Implementation:
    """One way to do what a stage does.

    Attributes:
        name: unique among the implementations of its stage.
        prepare: takes a case and its inputs, makes what can be made once (masks, padded copies, compiled functions), and
            returns the function to time, or a `Prepared`.
        ours: one of this library's; it may not fail to run, and ``--against`` does not deselect it.
        requires: returns why it cannot run a case, or None.
        setup_seconds: what compiling takes, roughly; 0 if nothing is compiled with `torch.compile`.
        main_only: run on main cases only, since compiling takes too long.
        graph: whether it can be captured in a CUDA graph.
    """

    name: str
    prepare: Callable[[Any, Inputs], Run | Prepared]
    ours: bool = False
    requires: Callable[[Any, torch.device], str | None] = lambda case, device: None
    setup_seconds: float = 0.0
    main_only: bool = False
    graph: bool = True

    def obstacle(self, case: Case, device: torch.device) -> str | None:
        """Return why there is no figure of this implementation for a case, or None."""
        if self.main_only and case.importance > 0:
            return "compiles for long: on the main cases only"
        return self.requires(case, device)


class Stage(ABC):
    """Something to measure: an op of the kernels, a block or a part of the model.

    Attributes:
        name: unique.
        section: one of `infimm_fast.benchmarks.SECTIONS`.
        wall_clock: time on the host's clock, since part of the work is the host's.
        largest_graph: how many runs one CUDA graph may hold, or None for as many as a cold cache needs.
    """

    name: str
    section: str
    wall_clock: bool = False
    largest_graph: int | None = None

    @abstractmethod
    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return the cases of a plan."""

    @abstractmethod
    def make_inputs(self, case: BenchCase, device: torch.device, seed: int) -> Inputs:
        """Return fresh inputs; all implementations of a case get the same tensors in the same layouts."""

    def reference(self, case: BenchCase, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the results of the plain statement in `dtype`, of the part that `checked` keeps.

        A stage without one says in `expected` and `check` what is right.
        """
        raise NotImplementedError

    def leaves_of(self, case: BenchCase) -> Sequence[str]:
        """Return the inputs that get gradients in a case with a backward pass; "gradients" are those of its outputs."""
        return ()

    def checked(self, case: BenchCase, results: tuple[torch.Tensor, ...]) -> Outputs:
        """Return the part of a run's results that is compared."""
        return {"out": results[0]}

    def expected(self, case: BenchCase, inputs: Inputs) -> Any:
        """Return what `check` compares with, computed once for all implementations."""
        return self.reference(case, inputs, case.torch_dtype), self.reference(case, inputs, torch.float64)

    def check(self, case: BenchCase, inputs: Inputs, expected: Any, implementation: str, run: Run) -> dict[str, Errors]:
        """Return the errors of one implementation.

        Raises:
            AssertionError: they are beyond what `infimm_fast.kernels.common.numerics` allows.
        """
        actual = self.checked(case, _as_tuple(run()))
        plain, exact = expected
        return {name: assert_error_budget(name, actual[name].detach(), plain[name], exact[name]) for name in exact}


class OpStage(Stage):
    """An op of the kernels: its own inputs, reference and costs, on cases of a model or on its own.

    Args:
        op: the op.
        section: see `Stage`.
        cases: returns the cases of a plan; without it those of the op for `BENCH`.
    """

    def __init__(self, op: Op, section: str = "ops", cases: Callable[[Plan], list[BenchCase]] | None = None):
        self.op, self.name, self.section = op, op.name, section
        self._cases = cases or (lambda plan: own_cases(op, plan.dtype))

    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return the cases of a plan."""
        return self._cases(plan)

    def make_inputs(self, case: BenchCase, device: torch.device, seed: int) -> Inputs:
        """Return the op's inputs."""
        return self.op.make_inputs(case, case.torch_dtype, device, seed)

    def reference(self, case: BenchCase, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the op's plain statement."""
        return self.op.reference(case, inputs, dtype)

    def leaves_of(self, case: BenchCase) -> Sequence[str]:
        """Return the op's leaves."""
        return self.op.leaves_of(case)

    def checked(self, case: BenchCase, results: tuple[torch.Tensor, ...]) -> Outputs:
        """Return what the op compares."""
        return self.op.checked(case, results)


def own_cases(op: Op, dtype: str) -> list[BenchCase]:
    """Return the cases that an op brings along for benchmarks."""
    return [BenchCase.of_op(op, case, dtype) for case in op.cases if BENCH in case.uses]


def _as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def prepare(stage: Stage, case: BenchCase, implementation: Implementation, inputs: Inputs) -> Prepared:
    """Return an implementation that is ready to run on inputs, its backward pass included if the case has one."""
    prepared = implementation.prepare(case, inputs)
    if not isinstance(prepared, Prepared):
        prepared = Prepared(prepared)
    if not case.backward:
        return prepared
    forward, leaves = prepared.run, [inputs[name] for name in stage.leaves_of(case)]

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        outputs = _as_tuple(forward())
        return *outputs, *torch.autograd.grad(outputs, leaves, inputs["gradients"])

    return replace(prepared, run=forward_and_backward)


STAGES: dict[str, Stage] = {}
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}


def register_stage(stage: Stage) -> Stage:
    """Make a stage known.

    Raises:
        ConfigurationError: its section is not known.
    """
    if stage.section not in SECTIONS:
        known = ", ".join(SECTIONS)
        raise ConfigurationError(f"section {stage.section!r} of {stage.name!r} is not known; use one of {known}")
    STAGES[stage.name] = stage
    IMPLEMENTATIONS.setdefault(stage.name, {})
    return stage


def register_implementation(stage: str, name: str, **properties: Any) -> Callable:
    """Decorator: make the function below an implementation of a stage; `properties` are those of `Implementation`."""

    def register(prepare: Callable[[Any, Inputs], Run | Prepared]) -> Callable[[Any, Inputs], Run | Prepared]:
        IMPLEMENTATIONS.setdefault(stage, {})[name] = Implementation(name, prepare, **properties)
        return prepare

    return register


def load_suites() -> None:
    """Import every module of `infimm_fast.benchmarks.suites`, and add the ops that none of them registered."""
    _import_suites()
    for op in find_ops().values():
        if op.name not in STAGES:
            register_stage(OpStage(op))
            register_implementation(op.name, "reference")(_call(op, "reference"))
        if "infimm_fast" not in IMPLEMENTATIONS[op.name]:
            register_implementation(op.name, "infimm_fast sdpa", ours=True)(_call(op, "sdpa"))
            register_implementation(op.name, "infimm_fast", ours=True, requires=needs_cuda)(_call(op, "triton"))


@functools.cache
def _import_suites() -> None:
    suites = importlib.import_module("infimm_fast.benchmarks.suites")
    for module in sorted(pkgutil.iter_modules(suites.__path__), key=lambda module: module.name):
        importlib.import_module(f"{suites.__name__}.{module.name}")


def _call(op: Op, backend: str) -> Callable[[BenchCase, Inputs], Run]:
    return lambda case, inputs: lambda: op.call(case, inputs, backend)


def needs_cuda(case: Case, device: torch.device) -> str | None:
    """Requirement of implementations that run on a CUDA GPU only."""
    return None if device.type == "cuda" else "needs a CUDA GPU"
