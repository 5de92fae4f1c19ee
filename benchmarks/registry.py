"""What can be measured: ops with their cases, and the implementations that compete on them."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from infimm_fast.benchmarks import SECTIONS
from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.numerics import Errors, assert_error_budget
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.presets import preset

Inputs = dict[str, Any]
Outputs = dict[str, torch.Tensor]
Run = Callable[[], Any]
Series = tuple[str, str, int]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One set of sizes of one op.

    Attributes:
        name: unique among the cases of its op.
        sizes: what `Op.make_inputs` needs to know.
        dtype: a key of `DTYPES`.
        flops: floating-point operations on true sizes, without padding, masked parts, or work that could be kept.
        bytes: fewest bytes that must be read and written.
        importance: 0 is a main case; a budget cuts off at the other end.
        backward: forward and backward, otherwise the forward alone.
        series: of the scaling plots that the case is a point of, (name, axis, value) each.
        preset: configuration of the model, where the op needs a whole one.
        artifact: folder of an exported model, where it is about one.
        pictures: that one run takes in, for the throughput; 0 for none.
    """

    name: str
    sizes: dict[str, int]
    dtype: str
    flops: int
    bytes: int
    importance: int = 1
    backward: bool = False
    series: tuple[Series, ...] = ()
    preset: str = ""
    artifact: str = ""
    pictures: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of its tensors."""
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """What a run is about; ops make their cases from it.

    Attributes:
        preset: name of the model's configuration, see `infimm_fast.models.infimm_hd.presets`.
        dtype: a key of `DTYPES`.
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
        possible = {1: (1,), 2: (1, 2, 5)}
        return possible.get(self.config.max_grid, (1, 2, 4, 6, 10))

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
    """One way to do what an op does.

    Attributes:
        name: unique among the implementations of its op.
        prepare: takes a case and its inputs, makes what can be made once (masks, padded copies, compiled functions), and
            returns the function to time, or a `Prepared`.
        ours: one of this library's; it may not fail to run, and ``--against`` does not deselect it.
        requires: returns why it cannot run a case, or None.
        setup_seconds: what compiling takes, roughly; 0 if nothing is compiled with `torch.compile`.
        main_only: run on main cases only, since compiling takes too long.
        graph: whether it can be captured in a CUDA graph.
    """

    name: str
    prepare: Callable[[Case, Inputs], Run | Prepared]
    ours: bool = False
    requires: Callable[[Case, torch.device], str | None] = lambda case, device: None
    setup_seconds: float = 0.0
    main_only: bool = False
    graph: bool = True

    def obstacle(self, case: Case, device: torch.device) -> str | None:
        """Return why there is no figure of this implementation for a case, or None."""
        if self.main_only and case.importance > 0:
            return "compiles for long: on the main cases only"
        return self.requires(case, device)


class Op(ABC):
    """Something to measure: an op, a block or a stage of the model. Subclasses say what, `register_op` makes it known.

    Attributes:
        name: unique.
        section: one of `infimm_fast.benchmarks.SECTIONS`.
        outputs: names of the results of a run.
        leaves: names of the inputs whose gradients a case with a backward pass takes; such cases have an input
            "gradients", those that arrive at the outputs.
        wall_clock: time on the host's clock, since part of the work is the host's.
        largest_graph: how many runs one CUDA graph may hold, or None for as many as a cold cache needs.
    """

    name: str
    section: str
    outputs: tuple[str, ...] = ("out",)
    leaves: tuple[str, ...] = ()
    wall_clock: bool = False
    largest_graph: int | None = None

    @abstractmethod
    def cases(self, plan: Plan) -> list[Case]:
        """Return the cases of a plan."""

    @abstractmethod
    def make_inputs(self, case: Case, device: torch.device, seed: int) -> Inputs:
        """Return fresh inputs; all implementations of a case get the same tensors in the same layouts."""

    @abstractmethod
    def reference(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the results of the plain statement in `dtype`, of the part that `checked` keeps."""

    def checked(self, case: Case, outputs: tuple[torch.Tensor, ...]) -> Outputs:
        """Return the part of a run's results that is compared: the outputs and then the gradients of `leaves`."""
        return dict(zip((*self.outputs, *self.leaves), outputs, strict=False))

    def bind(self, case: Case, inputs: Inputs, run: Run) -> Run:
        """Return what is timed: `run`, or `run` and its backward pass."""
        if not case.backward:
            return run
        leaves = [inputs[name] for name in self.leaves]

        def forward_and_backward() -> tuple[torch.Tensor, ...]:
            outputs = _as_tuple(run())
            return *outputs, *torch.autograd.grad(outputs, leaves, inputs["gradients"])

        return forward_and_backward

    def expected(self, case: Case, inputs: Inputs) -> Any:
        """Return what `check` compares with, computed once for all implementations."""
        return self.reference(case, inputs, case.torch_dtype), self.reference(case, inputs, torch.float64)

    def check(self, case: Case, inputs: Inputs, expected: Any, implementation: str, run: Run) -> dict[str, Errors]:
        """Return the errors of one implementation.

        Raises:
            AssertionError: they are beyond what `infimm_fast.kernels.common.numerics` allows.
        """
        actual = self.checked(case, _as_tuple(run()))
        plain, exact = expected
        return {name: assert_error_budget(name, actual[name].detach(), plain[name], exact[name]) for name in exact}


def _as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def prepare(op: Op, case: Case, implementation: Implementation, inputs: Inputs) -> Prepared:
    """Return an implementation that is ready to run on inputs, its backward pass included if the case has one."""
    prepared = implementation.prepare(case, inputs)
    if not isinstance(prepared, Prepared):
        prepared = Prepared(prepared)
    return replace(prepared, run=op.bind(case, inputs, prepared.run))


OPS: dict[str, Op] = {}
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}


def register_op(op: type[Op]) -> type[Op]:
    """Class decorator: make an op known."""
    if op.section not in SECTIONS:
        raise ConfigurationError(f"section {op.section!r} of op {op.name!r} is not known; use one of {', '.join(SECTIONS)}")
    OPS[op.name] = op()
    IMPLEMENTATIONS.setdefault(op.name, {})
    return op


def register_implementation(op: str, name: str, **properties: Any) -> Callable:
    """Decorator: make the function below an implementation of an op.

    Args:
        op: name of the op.
        name: of the implementation.
        **properties: the other attributes of `Implementation`.
    """

    def register(prepare: Callable[[Case, Inputs], Run | Prepared]) -> Callable[[Case, Inputs], Run | Prepared]:
        IMPLEMENTATIONS.setdefault(op, {})[name] = Implementation(name, prepare, **properties)
        return prepare

    return register


@functools.cache
def load_suites() -> None:
    """Import every module of `infimm_fast.benchmarks.suites`, which registers what it holds."""
    suites = importlib.import_module("infimm_fast.benchmarks.suites")
    for module in sorted(pkgutil.iter_modules(suites.__path__), key=lambda module: module.name):
        importlib.import_module(f"{suites.__name__}.{module.name}")


def needs_cuda(case: Case, device: torch.device) -> str | None:
    """Requirement of implementations that run on a CUDA GPU only."""
    return None if device.type == "cuda" else "needs a CUDA GPU"
