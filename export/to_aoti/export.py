"""A model to AOTInductor packages: one compiled library for each graph, without the weights, and the weights once."""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim, ExportedProgram

from infimm_fast.export.common.artifact import Progress, writing
from infimm_fast.export.common.errors import AxisError, ExportError
from infimm_fast.export.common.prepared import PreparedExport, prepare_export
from infimm_fast.export.common.source import checkpoint_names
from infimm_fast.export.common.spec import AxisLimits, GraphSpec
from infimm_fast.kernels.common.launch import keep_operators

TARGET = "aoti"
WEIGHTS = "aoti/model.safetensors"
DEVICES = ("cpu", "cuda")


def export_aoti(
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    graphs: tuple[str, ...] | None = None,
    limits: AxisLimits | None = None,
    processor: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Compile a model with AOTInductor to a folder that ``infimm_fast.export.load(folder, provider="aoti")`` takes.

    A package runs on the kind of device, and for CUDA the compute capability, that it was compiled for. It holds no
    weights: those lie in a ``.safetensors`` file, once for all graphs. On CUDA the packages hold our Triton kernels and
    need no Python.

    Args:
        model: a model of a registered family, or the folder of one.
        out: folder to make.
        dtype: "float32", "float16" or "bfloat16"; None for the model's own.
        device: "cpu" or "cuda", which is the device that compiles too.
        graphs: which of the family's to compile, of InfiMM-HD's "vision", "cross_kv" and "decoder"; None for all.
        limits: free axis -> (smallest, largest) size, in place of the family's default. The runner enforces them.
        processor: saved with the model; None takes the one in the model's folder, if there is one.
        overwrite: replace an artifact in `out`.
        progress: called with (what is being done, how much is done, how much there is).

    Returns:
        The folder.

    Raises:
        ExportError: an argument is not accepted, there is no compiler, or the model cannot be exported.
        AxisError: an axis that should be free was found to be fixed.
        OSError: a file cannot be written; there is no manifest then.
    """
    _check_device(device)
    prepared = prepare_export(
        model, out, dtype=dtype, graphs=graphs, limits=limits, processor=processor, overwrite=overwrite, progress=progress
    )
    files = {name: f"{TARGET}/{name}.pt2" for name in prepared.specs}
    (prepared.out / TARGET).mkdir(exist_ok=True)
    constants = _compile_graphs(prepared, files, device)
    options = {"device": device, "sm": _sm(device), "weights": WEIGHTS, "constants": constants}
    return prepared.finish(TARGET, files, {*files.values(), WEIGHTS}, options, verified=False)


def _compile_graphs(prepared: PreparedExport, files: Mapping[str, str], device: str) -> dict[str, dict[str, str]]:
    """Compile every graph and save the weights; return for each graph its constants' names in the weights' file."""
    family, progress = prepared.family, prepared.progress
    cast = family.cast(prepared.model, prepared.torch_dtype)
    if device == "cuda":
        # A copy, so that the caller's model stays where it is.
        cast = copy.deepcopy(cast).to(device)
    constants: dict[str, dict[str, str]] = {}
    tensors: dict[str, torch.Tensor] = {}
    with family.as_exported(cast):
        modules, names = family.modules(cast), checkpoint_names(cast)
        for name, spec in prepared.specs.items():
            progress(f"trace {name}", 0, 1)
            program = trace_program(modules[name], spec, prepared, device)
            progress(f"trace {name}", 1, 1)
            progress(f"compile {name}", 0, 1)
            used = _compile(program, prepared.out / files[name])
            constants[name] = _collect(name, modules[name], program, used, names, tensors)
            progress(f"compile {name}", 1, 1)
    _save_weights(prepared.out / WEIGHTS, tensors)
    return constants


def _check_device(device: str) -> None:
    if device not in DEVICES:
        raise ExportError(f"device={device!r} is not accepted; choose one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ExportError("device='cuda' compiles on a CUDA GPU, and PyTorch sees none here")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ExportError("AOTInductor needs a C++ compiler; install g++ or clang++")


def _sm(device: str) -> int | None:
    if device == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def trace_program(module: nn.Module, spec: GraphSpec, prepared: PreparedExport, device: str) -> ExportedProgram:
    """Return a graph as an exported program with its declared axes free.

    Args:
        module: of the graph, on the device.
        spec: the declaration.
        prepared: the export, for samples and limits.
        device: of the samples.

    Raises:
        AxisError: an axis that should be free was found to be fixed.
        ExportError: PyTorch cannot export the module.
    """
    derived = prepared.family.derived_axes
    dims = {axis: Dim(axis, min=low, max=high) for axis, (low, high) in prepared.limits.items() if axis not in derived}
    free = [{i: dims.get(axis, Dim.AUTO) for i, axis in t.free_axes.items()} for t in spec.inputs]
    arguments, shapes = spec.nest(prepared.samples(spec, device)), spec.nest(free)
    # On CUDA our operators stay nodes until they are replaced; on a CPU what they are made of is traced.
    with_operators = keep_operators() if device == "cuda" else contextlib.nullcontext()
    try:
        with torch.no_grad(), with_operators:
            program = torch.export.export(
                module, arguments, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
            )
    except Exception as error:
        kind = AxisError if "Constraints violated" in str(error) else ExportError
        raise kind(f"{spec.name}: PyTorch cannot export it: {str(error)[:500]}") from error
    names = program.graph_signature.user_inputs
    shapes_found = {node.name: node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"}
    for tensor, name in zip(spec.inputs, names, strict=True):
        fixed = [axis for i, axis in tensor.free_axes.items() if isinstance(shapes_found[str(name)][i], int)]
        if fixed:
            raise AxisError(f"{spec.name}: {', '.join(fixed)} of {tensor.name} is fixed by the module's code")
    return decompose_attention(program) if device == "cuda" else program


def decompose_attention(program: ExportedProgram) -> ExportedProgram:
    """Replace our opaque operators by twins whose Triton kernels the compiler sees and takes into the package."""
    from infimm_fast.export.to_aoti.twins import TWINS

    return program.run_decompositions({**torch.export.default_decompositions(), **TWINS})


def _compile(program: ExportedProgram, file: Path) -> list[str]:
    """Compile a program to a package and return the names of the constants that it wants to be given."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(Path(folder) / file.name),
            inductor_configs={"aot_inductor.package_constants_in_so": False},
        )
        names = torch._inductor.aoti_load_package(made).get_constant_fqns()
        with writing(file) as partial:
            shutil.copyfile(made, partial)
    return names


def _collect(
    graph: str,
    module: nn.Module,
    program: ExportedProgram,
    used: list[str],
    names: Mapping[int, str],
    tensors: dict[str, torch.Tensor],
) -> dict[str, str]:
    """Add the constants of one graph to the weights' file; return constant -> name in that file.

    Weights keep their names in the model's checkpoint, so that graphs which share one store it once.
    """
    own = {**module.state_dict(keep_vars=True), **dict(module.named_buffers())}
    found = {**program.state_dict, **program.constants}
    keys = {}
    for constant in used:
        key = names.get(id(own.get(constant)), f"{graph}.{constant}")
        keys[constant] = key
        tensors.setdefault(key, found[constant].detach())
    return keys


def _save_weights(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    with writing(file) as partial:
        try:
            save_file({name: tensor.to("cpu").contiguous().clone() for name, tensor in tensors.items()}, partial)
        except SafetensorError as error:
            raise OSError(f"{file} cannot be written: {error}") from error
