"""Single modules to ONNX: our ops in any module, and vision towers of other libraries."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from infimm_fast.export.common.artifact import (
    VERIFICATION,
    Manifest,
    Progress,
    no_progress,
    prepare_folder,
    write_manifest,
)
from infimm_fast.export.common.errors import AxisError, ExportError
from infimm_fast.export.common.source import checkpoint_names
from infimm_fast.export.common.spec import ALL_DTYPES, GraphSpec, TensorSpec
from infimm_fast.export.common.verify import Case
from infimm_fast.export.to_onnx.export import verify_folder, write_graphs
from infimm_fast.export.to_onnx.trace import TracedGraph, check_opset, trace
from infimm_fast.export.to_onnx.verification import verify_onnx

GRAPH = "module"
_DTYPES = {dtype: name for name, dtype in ALL_DTYPES.items()}


class _Flat(nn.Module):
    """A module with positional tensors in and a list of named outputs."""

    def __init__(self, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str]):
        super().__init__()
        self.module, self.inputs, self.outputs = module, tuple(inputs), tuple(outputs)

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Call the module by its arguments' names."""
        result = self.module(**dict(zip(self.inputs, tensors, strict=True)))
        return [_pick(result, name, index) for index, name in enumerate(self.outputs)]


def _pick(result: Any, name: str, index: int) -> torch.Tensor:
    """Return one output: by name from a dict or an output class, by its place from a tuple."""
    if isinstance(result, torch.Tensor) and index == 0:
        return result
    value = result.get(name) if isinstance(result, Mapping) else result[index] if isinstance(result, (tuple, list)) else None
    if not isinstance(value, torch.Tensor):
        raise ExportError(f"the module returns no tensor {name!r}; it returns {type(result).__name__}")
    return value


def export_module_onnx(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    out: str | Path,
    *,
    dynamic_axes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str] = ("output",),
    opset: int = 23,
    plain: bool = False,
    limits: Mapping[str, tuple[int, int]] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export one module, for example a vision tower of Transformers with ``attn_implementation="infimm_fast"``.

    Args:
        module: the module, in the dtype it is to be exported in.
        inputs: its arguments by name; the sizes of their free axes must be at least 2.
        out: folder to make.
        dynamic_axes: input name -> axis -> name of each free axis.
        outputs: names of the outputs: keys of what the module returns if that is a dict or one of Transformers' output
            classes, else names for a tensor or the elements of a tuple.
        opset: of the file.
        plain: see `export_onnx`.
        limits: free axis -> (smallest, largest) size.
        verify: compare with PyTorch on these inputs, and with first axes that are free one longer and of size 1.
        overwrite: replace an artifact in `out`.
        progress: see `export_onnx`.

    Returns:
        The folder; `infimm_fast.export.load` makes an `ExportedModule` of it.

    Raises:
        ExportError: an argument is not accepted, or the module cannot be exported.
        VerificationError: the graph is wrong. Everything stays in the folder, but it has no manifest.
    """
    out, progress = Path(out), progress or no_progress
    check_opset(opset)
    dtype = _module_dtype(module)
    spec = GraphSpec(
        GRAPH,
        tuple(_input_spec(name, tensor, dynamic_axes.get(name, {})) for name, tensor in inputs.items()),
        tuple(TensorSpec(name, "", ()) for name in outputs),
    )
    prepare_folder(out, overwrite)
    training = module.training
    flat = _Flat(module.eval(), list(inputs), outputs)
    samples = {name: tensor.clone() for name, tensor in inputs.items()}  # a view would fix its axes
    traced: dict[str, GraphSpec] = {}

    def trace_graph(declared: GraphSpec) -> TracedGraph:
        # The arguments of a variadic module have one tuple of shapes.
        axes = (tuple(tensor.free_axes for tensor in declared.inputs),)
        graph = trace(flat, tuple(samples.values()), axes, declared, dtype=None, opset=opset, plain=plain)
        traced[GRAPH] = GraphSpec(GRAPH, declared.inputs, tuple(_output_spec(value) for value in graph.model.graph.outputs))
        return graph

    files, limits = {GRAPH: f"onnx/{GRAPH}.onnx"}, dict(limits or {})
    try:
        names = write_graphs(out, {GRAPH: spec}, files, trace_graph, checkpoint_names(module), None, progress)
        if verify:
            cases = _cases(traced[GRAPH], samples)
            verify_folder(
                out,
                lambda report: verify_onnx(
                    out, traced, files, dtype, lambda name: flat, lambda spec: cases, limits, progress, report
                ),
            )
            names.add(VERIFICATION)
    finally:
        module.train(training)
    options = {"opset": opset, "plain": plain, "module": type(module).__name__}
    manifest = Manifest("module", "onnx", dtype, traced, files, limits, options=options, verified=verify)
    write_manifest(out, manifest, names, progress)
    return out


def _module_dtype(module: nn.Module) -> str:
    found = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if len(found) > 1 or not found <= set(_DTYPES):
        raise ExportError(
            f"the module has weights of {', '.join(map(str, found))}; one of float32, float16, bfloat16 is taken"
        )
    return _DTYPES[found.pop()] if found else "float32"


def _input_spec(name: str, tensor: torch.Tensor, free: Mapping[int, str]) -> TensorSpec:
    if tensor.dtype not in _DTYPES:
        raise ExportError(f"{name} is {tensor.dtype}; accepted are {', '.join(_DTYPES.values())}")
    small = [axis for axis in free if tensor.shape[axis] < 2]
    if small:
        raise AxisError(f"axis {small[0]} of {name} is to be free, but has size {tensor.shape[small[0]]}; give at least 2")
    return TensorSpec(name, _DTYPES[tensor.dtype], tuple(free.get(a, size) for a, size in enumerate(tensor.shape)))


def _output_spec(value: ir.Value) -> TensorSpec:
    """Read an output's declaration from the graph, where tracing has found its axes."""
    from onnx_ir import tensor_adapters

    assert value.shape is not None and value.dtype is not None and value.name is not None
    sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(value.name, _DTYPES[tensor_adapters.to_torch_dtype(value.dtype)], sizes)


def _cases(spec: GraphSpec, samples: Mapping[str, torch.Tensor]) -> list[Case]:
    """Return the samples, and the samples with free first axes one longer and of size 1."""
    cases = [Case("the sample", dict(samples), {})]
    first = {tensor.shape[0] for tensor in spec.inputs if tensor.shape and isinstance(tensor.shape[0], str)}
    for axis, change in itertools.product(sorted(first), (1, 0)):
        resized = {}
        for tensor in spec.inputs:
            sample = samples[tensor.name]
            if tensor.shape and tensor.shape[0] == axis:
                size = sample.shape[0] + 1 if change else 1
                sample = sample[torch.arange(size) % sample.shape[0]].contiguous()
            resized[tensor.name] = sample
        cases.append(Case(f"{axis} {'one longer' if change else 'of size 1'}", resized, {}))
    return cases
