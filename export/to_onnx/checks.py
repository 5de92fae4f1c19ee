"""Checks of an ONNX file that need no run: validity, declared shapes, kernels of the CUDA provider."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnx import defs, inliner, shape_inference

from infimm_fast.export.common.errors import InvalidGraphError, MissingKernelError, ShapeError
from infimm_fast.export.common.spec import ONNX_TYPES, GraphSpec

_TABLE = Path(__file__).with_name("cuda_kernels.json")

# ONNX Runtime replaces these by others before it looks for kernels; constants become initialisers.
_REPLACED = {"CastLike": "Cast", "Constant": None}

_DTYPE_NAMES = {number: name for name, number in ONNX_TYPES.items()}
_TABLE_NAMES = {"float32": "float", "float64": "double"}


def check_file(file: Path, spec: GraphSpec) -> None:
    """Run the ONNX checker and shape inference on a file, weights left on disk, and compare with the declaration.

    Raises:
        InvalidGraphError: the checker or shape inference refuses the file.
        ShapeError: an output has another dtype or shape than declared.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inferred_file = Path(scratch) / "inferred.onnx"
        try:
            onnx.checker.check_model(str(file), full_check=True)
            shape_inference.infer_shapes_path(str(file), str(inferred_file), strict_mode=True)
        except Exception as error:  # of several unrelated types
            raise InvalidGraphError(f"{file.name} is not valid ONNX: {error}") from error
        inferred = onnx.load(inferred_file, load_external_data=False)
    outputs = {value.name: value.type.tensor_type for value in inferred.graph.output}
    for tensor in spec.outputs:
        kind = outputs[tensor.name]
        shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
        dtype = _DTYPE_NAMES.get(kind.elem_type, str(kind.elem_type))
        if dtype != tensor.dtype or shape != list(tensor.shape):
            raise ShapeError(
                f"{file.name}: {tensor.name} is {dtype} {shape}; declared is {tensor.dtype} {list(tensor.shape)}"
            )


@functools.cache
def _kernel_table() -> dict[str, Any]:
    return json.loads(_TABLE.read_text())


def inline_functions(file: Path) -> onnx.ModelProto:
    """Return a file's graph with the bodies of our ops in place of their nodes and all shapes inferred; no weights."""
    model = inliner.inline_local_functions(onnx.load(file, load_external_data=False))
    return shape_inference.infer_shapes(model)


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every value whose type is known."""
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def check_cuda_kernels(file: Path) -> str:
    """See that the CUDA provider of ONNX Runtime has a kernel for every node of a file, by its registry.

    Returns:
        Which provider's registry that was.

    Raises:
        MissingKernelError: nodes have none; operators and dtypes are named.
    """
    model = inline_functions(file)
    types, table = value_types(model), _kernel_table()
    (opset,) = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    missing = sorted(
        {obstacle for node in model.graph.node if (obstacle := _obstacle(node, types, opset, table["kernels"]))}
    )
    if missing:
        raise MissingKernelError(f"{file.name}: {table['provider']} has no kernel for {', '.join(missing)}")
    return table["provider"]


def _obstacle(node: onnx.NodeProto, types: dict[str, int], opset: int, kernels: dict[str, Any]) -> str | None:
    """Return the operator and dtypes of a node that has no kernel, or None."""
    operator = _REPLACED.get(node.op_type, node.op_type)
    if operator is None:
        return None
    if node.domain not in ("", "ai.onnx"):
        return f"{node.domain}::{operator}"
    schema = defs.get_schema(node.op_type, opset, "")
    bound: dict[str, str] = {}
    for parameters, names in ((schema.inputs, node.input), (schema.outputs, node.output)):
        for index, name in enumerate(names):
            if name and types.get(name):
                dtype = _dtype_name(types[name])
                bound.setdefault(parameters[min(index, len(parameters) - 1)].type_str, dtype)
    version = defs.get_schema(operator, opset, "").since_version
    for first, last, constraints in kernels.get(operator, []):
        if first <= version and (last is None or version <= last):
            for constraint in constraints:
                if all(bound.get(name, accepted[0]) in accepted for name, accepted in constraint.items()):
                    return None
    return f"{operator}-{version} of {', '.join(f'{name}={dtype}' for name, dtype in sorted(bound.items()))}"


def _dtype_name(elem_type: int) -> str:
    name = str(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    return _TABLE_NAMES.get(name, name)
