"""Single modules to ONNX: our ops in any module, and vision towers of other libraries."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infimm_fast.dtypes import DTYPES, dtype_name
from infimm_fast.export.common.artifact import Progress, no_progress, prepare_folder
from infimm_fast.export.common.cases import Case
from infimm_fast.export.common.errors import AxisError, ExportError
from infimm_fast.export.common.family import Family
from infimm_fast.export.common.prepared import PreparedExport
from infimm_fast.export.common.spec import ALL_DTYPES, AxisLimits, GraphSpec, TensorSpec
from infimm_fast.export.to_onnx.export import OnnxOptions, write_onnx

GRAPH = "module"


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


class _SingleModule(Family):
    """The family of one module: one graph, declared by samples of its inputs."""

    graphs = (GRAPH,)

    def __init__(self, declared: GraphSpec, samples: Mapping[str, torch.Tensor]):
        self._declared, self._samples = declared, samples

    def specs(self, config: Any, dtype: str) -> dict[str, GraphSpec]:
        return {GRAPH: self._declared}

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        names = ([tensor.name for tensor in tensors] for tensors in (self._declared.inputs, self._declared.outputs))
        return {GRAPH: _Flat(model, *names)}

    def sample_sizes(self, specs: Mapping[str, GraphSpec]) -> dict[str, int]:
        return self._declared.resolve_axes({name: tuple(tensor.shape) for name, tensor in self._samples.items()}, {})

    def cases(self, spec: GraphSpec, config: Any) -> list[Case]:
        return _cases(spec, self._samples)


def export_module_onnx(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    out: str | Path,
    *,
    dynamic_axes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str] = ("output",),
    opset: int = 23,
    plain: bool = False,
    limits: AxisLimits | None = None,
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
    options = OnnxOptions(opset, plain)
    spec = GraphSpec(
        GRAPH,
        tuple(_input_spec(name, tensor, dynamic_axes.get(name, {})) for name, tensor in inputs.items()),
        tuple(TensorSpec(name, "", ()) for name in outputs),
    )
    prepared = PreparedExport(
        family=_SingleModule(spec, inputs),
        model=module,
        config=None,
        out=Path(out),
        dtype=_module_dtype(module),
        specs={GRAPH: spec},
        limits=dict(limits or {}),
        kind="module",
        progress=progress or no_progress,
    )
    prepare_folder(prepared.out, overwrite)
    return write_onnx(prepared, options, verify, {"opset": opset, "plain": plain, "module": type(module).__name__})


def _module_dtype(module: nn.Module) -> str:
    found = {dtype_name(parameter.dtype) for parameter in module.parameters() if parameter.is_floating_point()}
    if len(found) > 1 or not found <= set(DTYPES):
        raise ExportError(f"the module has weights of {', '.join(sorted(found))}; one of {', '.join(DTYPES)} is taken")
    return found.pop() if found else "float32"


def _input_spec(name: str, tensor: torch.Tensor, free: Mapping[int, str]) -> TensorSpec:
    dtype = dtype_name(tensor.dtype)
    if dtype not in ALL_DTYPES:
        raise ExportError(f"{name} is {dtype}; accepted are {', '.join(ALL_DTYPES)}")
    small = [axis for axis in free if tensor.shape[axis] < 2]
    if small:
        raise AxisError(f"axis {small[0]} of {name} is to be free, but has size {tensor.shape[small[0]]}; give at least 2")
    return TensorSpec(name, dtype, tuple(free.get(a, size) for a, size in enumerate(tensor.shape)))


def _cases(spec: GraphSpec, samples: Mapping[str, torch.Tensor]) -> list[Case]:
    """Return the samples, and the samples with free first axes one longer and of size 1."""
    cases = [Case("the sample", dict(samples))]
    first = {tensor.shape[0] for tensor in spec.inputs if tensor.shape and isinstance(tensor.shape[0], str)}
    for axis, change in itertools.product(sorted(first), (1, 0)):
        resized = {}
        for tensor in spec.inputs:
            sample = samples[tensor.name]
            if tensor.shape and tensor.shape[0] == axis:
                size = sample.shape[0] + 1 if change else 1
                sample = sample[torch.arange(size) % sample.shape[0]].contiguous()
            resized[tensor.name] = sample
        cases.append(Case(f"{axis} {'one longer' if change else 'of size 1'}", resized))
    return cases
