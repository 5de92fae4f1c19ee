"""A module to an ONNX graph without its weights' values: tracing sees fake tensors, weights are placed afterwards."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from infimm_fast.dtypes import dtype_name
from infimm_fast.export.common.errors import AxisError, ExportError
from infimm_fast.export.common.spec import GraphSpec, TensorSpec
from infimm_fast.export.to_onnx.functions import append_bodies, translations
from infimm_fast.kernels.common.launch import keep_operators

# 23 is the first with Attention, RMSNormalization and RotaryEmbedding. Past 24 onnxscript has no operators to write our ops'
# surroundings with, and from 26 on PyTorch's exporter writes a file that claims another opset than its nodes are of.
OPSETS = (23, 24)

# What PyTorch says of an axis that a module's code leaves no freedom.
_FIXED_AXIS = ("Constraints violated", "conflicts between user-specified ranges and inferred ranges")

# Weights up to this size (norms, biases) may be folded into others.
_FOLDED_ELEMENTS = 2**13


@dataclass
class TracedGraph:
    """An ONNX graph whose weights are still to be placed.

    Attributes:
        model: the graph; initialisers that stand for a weight have no data.
        weights: initialiser name -> the module's tensor.
        spec: names, dtypes and axes, those of outputs as tracing found them where nothing was declared.
    """

    model: ir.Model
    weights: dict[str, torch.Tensor]
    spec: GraphSpec


def check_opset(opset: int) -> None:
    """Raise `ExportError` unless an opset is one that this exporter writes."""
    if opset not in OPSETS:
        raise ExportError(f"opset={opset} is not accepted; choose one of {', '.join(map(str, OPSETS))}")


def fake_copy(
    module: nn.Module, dtype: torch.dtype | None, mode: FakeTensorMode
) -> tuple[nn.Module, dict[int, torch.Tensor]]:
    """Return a copy of a module that holds no data.

    Args:
        module: any module.
        dtype: of the copy's floating-point parameters; None keeps them. Buffers keep theirs, since they hold tables that
            16 bits are too few for.
        mode: the fake tensors' mode.

    Returns:
        The copy, in evaluation mode, and id of each of its tensors -> the tensor that it stands for.
    """
    memo: dict[int, Any] = {}
    originals: dict[int, torch.Tensor] = {}
    with mode:
        for tensor in (*module.parameters(), *module.buffers()):
            is_weight = isinstance(tensor, nn.Parameter)
            kind = dtype if dtype is not None and is_weight and tensor.is_floating_point() else tensor.dtype
            fake = torch.empty(tensor.shape, dtype=kind)
            fake = nn.Parameter(fake, requires_grad=False) if is_weight else fake
            memo[id(tensor)] = fake
            originals[id(fake)] = tensor
    return copy.deepcopy(module, memo).eval(), originals


def trace(
    module: nn.Module,
    arguments: tuple,
    dynamic_shapes: tuple,
    spec: GraphSpec,
    *,
    dtype: torch.dtype | None,
    opset: int,
    plain: bool,
) -> TracedGraph:
    """Export a module to an ONNX graph.

    Args:
        module: the module; it is neither changed nor copied in memory.
        arguments: its positional arguments: real tensors, or lists of them, of which only shapes and dtypes matter.
        dynamic_shapes: for each argument the names of its free axes, as `torch.export.export` takes them.
        spec: names and axes that the graph's flat inputs and outputs get. Outputs of dtype "" are left as they come.
        dtype: of the graph's weights, None for the module's.
        opset: of the file.
        plain: write standard operators only, no ``infimm::`` nodes.

    Raises:
        ExportError: PyTorch cannot export the module.
        AxisError: an axis that should be free was found to be fixed.
    """
    check_opset(opset)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fake, originals = fake_copy(module, dtype, mode)
    fake_arguments = torch.utils._pytree.tree_map(lambda t: mode.from_tensor(t.cpu(), static_shapes=True), arguments)
    try:
        with torch.no_grad(), _quiet(), contextlib.nullcontext() if plain else keep_operators():
            program = torch.onnx.export(
                fake,
                fake_arguments,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=_per_argument(module, dynamic_shapes),
                custom_translation_table={} if plain else translations(opset),
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise _explain(error, spec.name) from error
    assert program is not None
    model = program.model
    weights = _take_weights(model, originals)
    _name(model, spec)
    with _quiet():
        _optimize(model, weights)
    _check_axes(model, spec)
    _set_shapes(model, spec)
    if not plain:
        append_bodies(model, opset)
    used = model.graph.initializers
    taken = {name: tensor for name, tensor in weights.items() if name in used}
    return TracedGraph(
        model, taken, dataclasses.replace(spec, outputs=tuple(map(_declare, spec.outputs, model.graph.outputs)))
    )


def _declare(tensor: TensorSpec, value: ir.Value) -> TensorSpec:
    """Return an output's declaration; one that says nothing is read from the graph, where tracing has found its axes."""
    if tensor.dtype:
        return tensor
    assert value.shape is not None and value.dtype is not None
    sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(tensor.name, dtype_name(tensor_adapters.to_torch_dtype(value.dtype)), sizes)


def _per_argument(module: nn.Module, shapes: tuple) -> tuple:
    """Return the dynamic shapes as the exporter wants them: all those of a variadic argument are one tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return (shapes,) if kinds == [inspect.Parameter.VAR_POSITIONAL] else shapes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about packages and names that play no part here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx._internal.exporter._registration", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message=".*axis name.*")
            warnings.filterwarnings("ignore", message=".*training mode.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain(error: BaseException, graph: str) -> ExportError:
    """Turn the exporter's error, which nests causes, into one sentence; our own errors inside it come out as they are."""
    cause: BaseException | None = error
    innermost = error
    while cause is not None:
        if isinstance(cause, ExportError):
            return cause
        innermost, cause = cause, cause.__cause__
    text = str(innermost)
    first_line = text.strip().splitlines()[0] if text.strip() else type(innermost).__name__
    if any(sign in text for sign in _FIXED_AXIS):
        return AxisError(f"{graph}: an axis declared free is fixed by the module's code: {' '.join(text.split())[:500]}")
    return ExportError(f"{graph}: PyTorch cannot export it: {type(innermost).__name__}: {first_line}")


def cast_tensor(tensor: torch.Tensor, dtype: torch.dtype) -> ir.TensorProtocol:
    """Return a tensor of PyTorch, cast and on the CPU, as one of an ONNX graph."""
    return tensor_adapters.TorchTensor(tensor.detach().to("cpu", dtype).contiguous())


def _take_weights(model: ir.Model, originals: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace fake initialisers by stand-ins for the real tensors, and return those."""
    weights = {}
    for name, value in model.graph.initializers.items():
        fake = getattr(value.const_value, "raw", None)
        if isinstance(fake, torch.Tensor) and id(fake) in originals:
            weights[name] = originals[id(fake)]
            value.const_value = ir.LazyTensor(
                functools.partial(cast_tensor, originals[id(fake)], fake.dtype),
                tensor_adapters.from_torch_dtype(fake.dtype),
                ir.Shape(tuple(fake.shape)),
                name=name,
            )
    return weights


def _name(model: ir.Model, spec: GraphSpec) -> None:
    """Give inputs and outputs their declared names."""
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        if len(values) != len(tensors):
            raise AxisError(f"{spec.name} has {len(values)} inputs or outputs; {len(tensors)} are declared")
    taken = {tensor.name for tensor in spec}
    for node in model.graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_inner"
    for index, (value, tensor) in enumerate(zip(model.graph.outputs, spec.outputs, strict=True)):
        if value.is_graph_input() or value in list(model.graph.outputs)[:index]:
            # A value that is input and output, or two outputs, cannot have two names.
            copied = ir.node("Identity", [value])
            model.graph.append(copied)
            copied.outputs[0].type, copied.outputs[0].shape = value.type, value.shape
            model.graph.outputs[index] = value = copied.outputs[0]
        value.name = tensor.name
    for value, tensor in zip(model.graph.inputs, spec.inputs, strict=True):
        value.name = tensor.name


def _optimize(model: ir.Model, weights: dict[str, torch.Tensor]) -> None:
    """Fold constants and fuse norms and rotary embeddings into their operators; large weights are never read."""
    import onnxscript.optimizer
    from onnxscript.rewriter import onnx_fusions

    # The optimizer folds transposed weights whatever their size: what it cannot see it leaves alone.
    hidden = {
        name: value
        for name, value in model.graph.initializers.items()
        if name in weights and weights[name].numel() > _FOLDED_ELEMENTS
    }
    data = {name: value.const_value for name, value in hidden.items()}
    for value in hidden.values():
        value.const_value = None
    onnxscript.optimizer.optimize_ir(model)
    onnx_fusions.fuse(model)
    for name, value in hidden.items():
        value.const_value = data[name]


def _check_axes(model: ir.Model, spec: GraphSpec) -> None:
    """Raise `AxisError` if an axis is free where the declaration has a number, or the other way round."""
    declared = (*zip(model.graph.inputs, spec.inputs, strict=True), *zip(model.graph.outputs, spec.outputs, strict=True))
    for value, tensor in declared:
        if value.shape is None or not tensor.dtype:
            continue
        for axis, (have, want) in enumerate(zip(value.shape, tensor.shape, strict=True)):
            if isinstance(have, int) == isinstance(want, str) or (isinstance(have, int) and have != want):
                raise AxisError(f"{spec.name}: axis {axis} of {tensor.name} is {have} in the graph; declared is {want}")


def _set_shapes(model: ir.Model, spec: GraphSpec) -> None:
    """Write the declared names of the axes, in place of the expressions that tracing found for outputs."""
    for value, tensor in zip(model.graph.outputs, spec.outputs, strict=True):
        if tensor.dtype:
            value.shape = ir.Shape(tensor.shape)
