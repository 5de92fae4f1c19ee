"""Compile Triton kernels for any NVIDIA GPU on a machine without one, and say what the result is called with.

Two ways lead to a `KernelSource`: a launcher run on meta tensors, whose launches are recorded instead of executed and
specialised as Triton would at run time (a pointer's or an integer's divisibility by 16 comes from its value, never by
decree), or a signature written out by hand. `compile_source` turns it into machine code for one architecture.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infimm_fast.kernels.common.checks import KernelArgumentError

TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")
# Tensor cores of these generations have instructions that belong to exactly one architecture: PTX names it with an "a".
ARCHITECTURE_SPECIFIC = (90, 100, 103, 110, 120, 121)
_ENTRY = re.compile(r"(\.visible\s+\.entry\s+(\w+)\s*\()(.*?)(\n\))", re.DOTALL)


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by the names of the kernel's parameters."""
        names = (parameter.name for parameter in self.kernel.params)
        return dict(zip(names, self.args, strict=False)) | {
            name: value for name, value in self.kwargs.items() if name not in LAUNCH_OPTIONS
        }

    @property
    def values(self) -> dict[str, Any]:
        """The arguments, and the kernel's constants one by one."""
        return unpacked(self.arguments)

    @property
    def options(self) -> dict[str, int]:
        """What the kernel is compiled with beside its arguments."""
        return {name: self.kwargs[name] for name in LAUNCH_OPTIONS if name in self.kwargs}


@dataclass(frozen=True)
class KernelSource:
    """A Triton kernel with everything that compiling it needs.

    Attributes:
        kernel: the jitted function.
        signature: parameter -> "*bf16", "i32", "fp32", ... or "constexpr", in the kernel's order.
        constants: values of the parameters that are "constexpr".
        aligned: parameters whose values are divisible by 16.
        options: num_warps, num_stages, maxnreg.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str]
    options: Mapping[str, int]


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code for one architecture.

    Attributes:
        name: of the entry function.
        sm: compute capability, 90 for a Hopper.
        parameters: (name, type) of what the launch passes, in order; Triton's scratch pointers are not among them.
        constants: values compiled in, those of a NamedTuple one by one.
        num_warps: warps of a program; a block has 32 times as many threads.
        shared: dynamic shared memory of a block, bytes.
        ptx: text whose entry takes exactly `parameters`; `assemble` makes a cubin of it.
    """

    name: str
    sm: int
    parameters: tuple[tuple[str, str], ...]
    constants: dict[str, Any]
    num_warps: int
    shared: int
    ptx: str


def unpacked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments by name, with the fields of a NamedTuple of constants in its place."""
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        values |= value._asdict() if hasattr(value, "_asdict") else {name: value}
    return values


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect Triton launches instead of running them."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    original = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, tuple(grid), args, kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


def specialise(value: Any, fixed: bool) -> tuple[str, Any, bool]:
    """Return (type, constant, divisible by 16) that Triton derives from one run-time argument.

    Args:
        value: a tensor, a number or None.
        fixed: the parameter is excluded from specialisation.
    """
    if isinstance(value, torch.Tensor):
        # PyTorch's allocations are aligned to more than 16 bytes, so the offset inside the storage decides.
        return f"*{TYPE_NAMES[value.dtype]}", None, value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    if isinstance(value, int) and not isinstance(value, bool) and (fixed or value != 1):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), None, value % 16 == 0 and not fixed
    return "constexpr", value, False


def source_of(launch: Launch) -> KernelSource:
    """Return what Triton would compile for one recorded launch."""
    values = launch.arguments
    signature, constants, aligned = {}, {}, set()
    for parameter in launch.kernel.params:
        value = values[parameter.name]
        kind, constant, divisible = (
            ("constexpr", value, False) if parameter.is_constexpr else specialise(value, parameter.do_not_specialize)
        )
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = constant
        if divisible:
            aligned.add(parameter.name)
    return KernelSource(launch.kernel, signature, constants, frozenset(aligned), launch.options)


def compile_triton(source: KernelSource, sm: int) -> Any:
    """Return Triton's own compiled kernel for compute capability `sm` (90 for a Hopper)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = list(source.signature)
    constants = {(order.index(name),): value for name, value in source.constants.items()}
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in sorted(source.aligned)}
    ast = ASTSource(source.kernel, source.signature, constants, attributes)
    return triton.compile(ast, target=GPUTarget("cuda", sm, 32), options=dict(source.options))


def compile_source(source: KernelSource, sm: int) -> CompiledKernel:
    """Compile a kernel for compute capability `sm`, and check its parameters against the PTX itself.

    The PTX names no source files.

    Raises:
        KernelArgumentError: the kernel needs scratch memory, which only Triton's own launcher provides.
    """
    from triton import knobs

    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        compiled = compile_triton(source, sm)
    parameters = tuple((name, kind) for name, kind in source.signature.items() if kind != "constexpr")
    return CompiledKernel(
        name=compiled.metadata.name,
        sm=sm,
        parameters=parameters,
        constants=unpacked(source.constants),
        num_warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        ptx=_plain_ptx(compiled.asm["ptx"], [kind for _, kind in parameters], sm),
    )


def entry_parameters(ptx: str) -> list[str]:
    """Return the PTX type of each parameter of the only entry: "u64" for pointers, "u32", "f32", ..."""
    match = _ENTRY.search(ptx)
    if match is None:
        raise KernelArgumentError("the PTX has no entry")
    return re.findall(r"\.param\s+\.(\w+)", match[3])


def _plain_ptx(ptx: str, kinds: list[str], sm: int) -> str:
    """Return PTX whose entry takes only the parameters `kinds`, for exactly one architecture where that matters."""
    match = _ENTRY.search(ptx)
    if match is None:
        raise KernelArgumentError("the PTX has no entry")
    entries = [line.strip().rstrip(",") for line in match[3].strip().splitlines()]
    wanted = [_ptx_type(kind) for kind in kinds]
    found = entry_parameters(ptx)
    # Triton appends two pointers, to global and to profiling scratch memory.
    if found != [*wanted, "u64", "u64"]:
        raise KernelArgumentError(f"the PTX takes {found}; expected {wanted} and two scratch pointers")
    body = ptx[match.end() :]
    for entry in entries[len(kinds) :]:
        if re.search(rf"\b{re.escape(entry.split()[-1])}\b", body):
            raise KernelArgumentError(f"{match[2]} reads its scratch memory; only Triton's launcher provides any")
    ptx = ptx[: match.start(3)] + "\n\t" + ",\n\t".join(entries[: len(kinds)]) + ptx[match.start(4) :]
    suffix = "a" if sm in ARCHITECTURE_SPECIFIC else ""
    return re.sub(r"(\.target\s+sm_\d+)\w*", rf"\g<1>{suffix}", ptx, count=1)


def _ptx_type(kind: str) -> str:
    if kind.startswith("*"):
        return "u64"
    return {"i32": "u32", "i64": "u64", "fp32": "f32"}[kind]


def assemble(ptx: str, sm: int) -> bytes:
    """Return the cubin that ptxas makes of PTX; what a driver would do when it loads it.

    Raises:
        KernelArgumentError: ptxas refuses it.
    """
    suffix = "a" if sm in ARCHITECTURE_SPECIFIC else ""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [str(_assembler(sm)), f"-arch=sm_{sm}{suffix}", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise KernelArgumentError(f"ptxas refuses the PTX for sm_{sm}{suffix}: {result.stderr.strip()}")
        return target.read_bytes()


def _assembler(sm: int) -> Path:
    """Return the ptxas that comes with Triton; newer architectures have one of their own."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = folder / "ptxas-blackwell"
    return blackwell if sm >= 100 and blackwell.exists() else folder / "ptxas"
