"""What is known about an op beside its code: inputs at real and small sizes, the exact result, costs, and its kernels.

Each op has one `Op` in ``kernels/<op>/cases.py``. Benchmarks, compile gate, tuner, single launches, exports and tests
read it, so that a new op gets all of them from its own folder.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from infimm_fast.kernels.common.launch import LaunchConfig

Inputs = dict[str, Any]
Outputs = dict[str, torch.Tensor]

BENCH, TUNE, GATE, SMALL = "bench", "tune", "gate", "small"


@dataclass(frozen=True)
class Case:
    """One set of sizes of an op.

    Attributes:
        name: unique among the cases of the op.
        sizes: what `Op.make_inputs` needs to know, in the op's own words.
        backward: forward and backward, otherwise the forward alone.
        importance: 0 is a main case; a budget cuts off at the other end.
        uses: who takes the case: `BENCH` times it, `TUNE` tunes its kernels, `GATE` compiles them for every architecture,
            `SMALL` runs it once, checked, at awkward sizes, under sanitizers and in tests.
    """

    name: str
    sizes: Mapping[str, int]
    backward: bool = False
    importance: int = 1
    uses: tuple[str, ...] = (BENCH,)


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
        function: the public function; takes `backend`.
        outputs: names of its results.
        leaves: inputs that get gradients in cases with a backward pass, whose inputs hold "gradients", those that arrive
            at the outputs.
        kernels: kernel -> name of its jitted function; backward kernels start with "backward".
        cases: at real and at small sizes.
        spills: local memory instructions that (kernel, dtype, width, arch) may hold. A forward never spills; a backward
            that has to is listed with its count, so that a change for the worse is seen.
    """

    name: str
    function: Callable[..., Any]
    outputs: tuple[str, ...] = ("out",)
    leaves: tuple[str, ...] = ()
    kernels: Mapping[str, str]
    cases: tuple[Case, ...]
    spills: Mapping[tuple[str, str, int, int], int] = {}

    @abstractmethod
    def make_inputs(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Return fresh inputs by name, in the layouts that models produce; device "meta" gives tensors without memory."""

    @abstractmethod
    def call(self, case: Case, inputs: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
        """Return the results of the public function."""

    @abstractmethod
    def reference(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the results of the plain statement in `dtype`, gradients of the leaves included, of what `checked` keeps."""

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

        Returns:
            The results and gradients in the order of `outputs` and `leaves`.
        """

    @abstractmethod
    def rules(self, job: Job, config: LaunchConfig) -> Rules:
        """Return what the machine code of a job must hold."""

    def checked(self, case: Case, results: tuple[torch.Tensor, ...]) -> Outputs:
        """Return the part of a run's results that is compared: the outputs and then the gradients of `leaves`."""
        return dict(zip((*self.outputs, *self.leaves), results, strict=False))


def find_ops() -> dict[str, Op]:
    """Return every op that has a ``cases.py`` with a module-level ``OP``, by its name."""
    import infimm_fast.kernels as package

    ops = {}
    for folder in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if importlib.util.find_spec(f"{folder.name}.cases") is not None and folder.name.rpartition(".")[2] != "common":
            op = importlib.import_module(f"{folder.name}.cases").OP
            ops[op.name] = op
    return ops
