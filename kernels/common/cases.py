"""What is known about an op beside its code: inputs at real and small sizes, the exact result, costs, and its kernels.

Each op has one `Op` in ``kernels/<op>/cases.py``. Benchmarks, compile gate, tuner, single launches, exports and tests
read it, so that a new op gets all of them from its own folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from infimm_fast.kernels.common.checks import KernelArgumentError
from infimm_fast.kernels.common.launch import LaunchConfig

Inputs = dict[str, Any]
Outputs = dict[str, torch.Tensor]

BENCH, TUNE, GATE, SMALL, PROFILE = "bench", "tune", "gate", "small", "profile"
# Attention's backward pass multiplies five matrices where the forward multiplies two.
BACKWARD_FACTOR = 2.5


@dataclass(frozen=True)
class Case:
    """One set of sizes of an op.

    Attributes:
        name: unique among the cases of the op.
        sizes: what `Op.make_inputs` needs to know, in the op's own words.
        backward: forward and backward, otherwise the forward alone.
        importance: 0 is a main case; a budget cuts off at the other end.
        uses: who takes the case: `BENCH` times it, `TUNE` tunes its kernels, `GATE` compiles them for every architecture,
            `SMALL` runs it once, checked, at awkward sizes, under sanitizers and in tests, `PROFILE` runs it once at the
            sizes of a model.
        kernels: those that gate and tuner look at; all that it launches if there are none.
        dtypes: those in which the gate compiles it.
    """

    name: str
    sizes: Mapping[str, int]
    backward: bool = False
    importance: int = 1
    uses: tuple[str, ...] = (BENCH,)
    kernels: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16", "float32")


@dataclass(frozen=True)
class Cost:
    """Floating-point operations on true sizes, and the fewest bytes that must be read and written."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Rules:
    """What the machine code of one kernel must hold, beside few spills and little enough shared memory.

    Attributes:
        wide: at least one global access of 16 bytes.
        no_elements: no global access of two bytes; single elements are read where a kernel gathers.
        mostly_wide: at least as many global accesses of 16 bytes as narrower ones.
        tensor_rows: rows of the tile that tensor cores accumulate, 0 for none; 64 make a warp group's instruction.
    """

    wide: bool = True
    no_elements: bool = False
    mostly_wide: bool = False
    tensor_rows: int = 0


@dataclass(frozen=True)
class Job:
    """One kernel of one case in one dtype for one architecture: what is compiled, judged and tuned.

    Attributes:
        kernel: key of `Op.kernels`.
        case: the inputs.
        dtype: a key of `infimm_fast.dtypes.DTYPES`.
        arch: compute capability, 90 for a Hopper.
    """

    kernel: str
    case: Case
    dtype: str
    arch: int


class Op(ABC):
    """One op.

    Attributes:
        name: of the public function.
        outputs: names of the results of the public function.
        leaves: inputs that get gradients in cases with a backward pass, whose inputs hold "gradients", those that arrive
            at the outputs; see `leaves_of`.
        kernels: kernel -> name of its jitted function. Those of a backward pass that have a configuration start with
            "backward".
        fixed: kernels without a configuration, which are neither judged nor tuned.
        cases: at real and at small sizes.
        spills: local memory instructions that (kernel, dtype, width, arch) may hold. A forward never spills; a backward
            that has to is listed with its count, so that a change for the worse is seen.
    """

    name: str
    outputs: tuple[str, ...] = ("out",)
    leaves: tuple[str, ...] = ()
    kernels: ClassVar[Mapping[str, str]]
    fixed: tuple[str, ...] = ()
    cases: tuple[Case, ...]
    spills: ClassVar[Mapping[tuple[str, str, int, int], int]] = {}

    @abstractmethod
    def make_inputs(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Return fresh inputs by name, in the layouts that models produce; device "meta" gives tensors without memory."""

    @abstractmethod
    def call(self, case: Case, inputs: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
        """Return the results of the public function."""

    @abstractmethod
    def reference(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the plain statement's results in `dtype`, gradients of the leaves included, of what `checked` keeps."""

    @abstractmethod
    def cost(self, case: Case, dtype: torch.dtype, kernel: str | None = None) -> Cost:
        """Return the cost of a case, or of one of its kernels."""

    @abstractmethod
    def kernels_of(self, case: Case) -> tuple[str, ...]:
        """Return the kernels that a case launches."""

    @abstractmethod
    def width(self, case: Case) -> int:
        """Return the head dim, or the channels of an op without heads."""

    @abstractmethod
    def config(self, job: Job) -> LaunchConfig:
        """Return the shipped configuration of a kernel."""

    @abstractmethod
    def launch(self, job: Job, inputs: Inputs, config: LaunchConfig) -> Any:
        """Run the launcher of a job's kernel with `config`, and with the shipped ones for the launcher's other kernels.

        Args:
            job: what is launched.
            inputs: of `make_inputs`. A backward launcher takes what the forward's returned from "forward", if it is there;
                else the forward runs first.
            config: of the job's kernel.

        Returns:
            What the forward's launcher returns; or what `call` does, and then the gradients of the leaves.
        """

    @abstractmethod
    def rules(self, job: Job, config: LaunchConfig) -> Rules:
        """Return what the machine code of a job must hold."""

    def leaves_of(self, case: Case) -> tuple[str, ...]:
        """Return the leaves of a case; an op whose cases leave some out says which."""
        return self.leaves

    def checked(self, case: Case, results: tuple[torch.Tensor, ...]) -> Outputs:
        """Return the part of a run's results that is compared: the outputs and then the gradients of `leaves`."""
        return dict(zip((*self.outputs, *self.leaves), results, strict=False))


def jobs_of(op: Op, use: str, dtypes: Sequence[str], archs: Sequence[int]) -> Iterator[Job]:
    """Yield the jobs of all cases with a use, in some dtypes (of the gate's cases those they name) and for architectures."""
    for case in op.cases:
        for kernel in case.kernels or op.kernels_of(case):
            if use in case.uses and kernel not in op.fixed:
                yield from (
                    Job(kernel, case, dtype, arch)
                    for arch in archs
                    for dtype in dtypes
                    if use != GATE or dtype in case.dtypes
                )


def run_op(op: Op, case: Case, inputs: Inputs, backend: str) -> Outputs:
    """Return what is compared of one run of the public function, gradients included."""
    with torch.set_grad_enabled(case.backward):
        results = op.call(case, inputs, backend)
        if case.backward:
            differentiable = [one for one in results if one.requires_grad]
            leaves = [inputs[name] for name in op.leaves_of(case)]
            results += torch.autograd.grad(differentiable, leaves, inputs["gradients"])
    return {name: x.detach() for name, x in op.checked(case, results).items()}


def spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` indices below `count`, evenly spread, first and last among them."""
    if count <= limit:
        return list(range(count))
    return [index * (count - 1) // (limit - 1) for index in range(limit)]


_REGISTERED: dict[str, Op] = {}


def register_op(op: Op) -> Op:
    """Make an op known that is no part of the package; `find_ops` returns it too.

    Raises:
        KernelArgumentError: there is another op of that name.
    """
    if find_ops().get(op.name, op) is not op:
        raise KernelArgumentError(f"there is an op named {op.name!r} already")
    _REGISTERED[op.name] = op
    return op


def load_op(folder: Path) -> Op:
    """Import an op's folder from anywhere as a package of its own name, and register its ``cases.OP``.

    Raises:
        KernelArgumentError: there is a module of that name, or an op as `register_op` says.
        FileNotFoundError: the folder has no ``__init__.py``.
    """
    loaded = sys.modules.get(folder.name)
    if loaded is not None and loaded.__file__ != str(folder / "__init__.py"):
        raise KernelArgumentError(f"there is a module named {folder.name!r} already, {loaded.__file__}")
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[folder.name] = package
    try:
        spec.loader.exec_module(package)
        return register_op(importlib.import_module(f"{folder.name}.cases").OP)
    except BaseException:
        # Nothing half-made is left behind: mended, the folder can be loaded again.
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{folder.name}.")]:
            del sys.modules[name]
        raise


def find_ops() -> dict[str, Op]:
    """Return the ops of the package, which `infimm_fast.kernels.OP_FOLDERS` lists, and those registered, by name."""
    from infimm_fast.kernels import OP_FOLDERS

    ops = [importlib.import_module(f"infimm_fast.kernels.{folder}.cases").OP for folder in OP_FOLDERS]
    return {op.name: op for op in ops} | _REGISTERED
