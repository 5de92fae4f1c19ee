"""Checks a graph against the operators that TensorRT's ONNX parser takes, before any build, and names the node at fault."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from typing import Any

import onnx
from onnx import TensorProto

from infimm_fast.export.common.errors import MissingKernelError
from infimm_fast.export.to_onnx.functions import DOMAIN
from infimm_fast.export.to_tensorrt.prepare import Types, attribute_of, infer_types

_NAMES = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
    TensorProto.DOUBLE: "FP64",
}


@dataclass(frozen=True)
class Finding:
    """What is wrong with one node."""

    node: str
    op: str
    problem: str

    def __str__(self) -> str:
        return f"{self.node} ({self.op}): {self.problem}"


@functools.cache
def operator_table() -> dict[str, Any]:
    """Return the data file: operator -> the element types of its first data input, and restrictions in words."""
    return json.loads(resources.files(__package__).joinpath("operators.json").read_text())


def lint_graph(model: onnx.ModelProto, plugins: Collection[str] = ()) -> list[Finding]:
    """Return what TensorRT's parser would refuse in a prepared graph.

    Args:
        model: see `infimm_fast.export.to_tensorrt.prepare.prepare_graph`.
        plugins: op types of the domain ``infimm`` that a plugin runs.
    """
    table = operator_table()
    findings = []
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset > table["largest_opset"]:
        findings.append(Finding("the file", "opset", f"opset {opset}; the parser takes up to {table['largest_opset']}"))
    types = infer_types(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {output for node in model.graph.node if node.op_type == "Constant" for output in node.output}
    for index, node in enumerate(model.graph.node):
        name = node.name or f"node {index}"
        findings += [Finding(name, node.op_type, problem) for problem in _problems(node, types, constants, plugins)]
    return findings


def _problems(node: onnx.NodeProto, types: Types, constants: set[str], plugins: Collection[str]) -> list[str]:
    if node.domain == DOMAIN:
        return [] if node.op_type in plugins else ["no plugin runs it, and it has no function body"]
    entry = operator_table()["operators"].get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if entry is None:
        return [f"the parser has no {node.domain or 'ai.onnx'} operator of that name"]
    problems = []
    data = node.input[1 if node.op_type == "Where" else 0] if node.input else ""
    kind = _NAMES.get(types.get(data, (0, None))[0])
    if kind is not None and kind not in entry["types"]:
        problems.append(f"{kind} input {data}; the parser takes {', '.join(entry['types'])}")
    check = _RULES.get(node.op_type)
    return problems + (check(node, types, constants) if check else [])


def _attention(node: onnx.NodeProto, types: Types, constants: set[str]) -> list[str]:
    problems = []
    if any(node.input[4:]) or any(node.output[1:]):
        problems.append("a cache or a second output; it takes q, k, v, mask and gives one output")
    if attribute_of(node, "softcap", 0.0):
        problems.append("softcap is not supported")
    if node.input[0] == node.input[1]:
        # Observed with TensorRT-RTX 1.7.1: the builder ends the process.
        problems.append(f"its queries and keys are the same value {node.input[0]}, on which builders crash")
    for value in filter(None, node.input[:4]):
        rank = types.get(value, (0, None))[1]
        if rank not in (4, None):
            problems.append(f"{value} has {rank} axes; it takes 4")
    return problems


def _constant_axes(node: onnx.NodeProto, types: Types, constants: set[str]) -> list[str]:
    axes = node.input[1] if len(node.input) > 1 else ""
    return [] if not axes or axes in constants else [f"its axes {axes} are computed; they must be constant"]


def _no_reduction(node: onnx.NodeProto, types: Types, constants: set[str]) -> list[str]:
    reduction = attribute_of(node, "reduction", b"none")
    return [] if reduction == b"none" else [f"reduction {reduction.decode()} is not supported"]


def _one_output(node: onnx.NodeProto, types: Types, constants: set[str]) -> list[str]:
    return ["only its first output is supported"] if any(node.output[1:]) else []


def _int64_positions(node: onnx.NodeProto, types: Types, constants: set[str]) -> list[str]:
    positions = node.input[3] if len(node.input) > 3 else ""
    kind = types.get(positions, (TensorProto.INT64, None))[0]
    return [] if kind == TensorProto.INT64 else [f"position_ids {positions} must be INT64"]


_RULES = {
    "Attention": _attention,
    "CumSum": _constant_axes,
    "LayerNormalization": _one_output,
    "RotaryEmbedding": _int64_positions,
    "ScatterND": _no_reduction,
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceL2", "ReduceProd"), _constant_axes),
}


def check_graph(name: str, model: onnx.ModelProto, plugins: Collection[str] = ()) -> None:
    """Raise `MissingKernelError` if TensorRT's parser would refuse a prepared graph; the first nodes at fault are named."""
    findings = lint_graph(model, plugins)
    if findings:
        shown = "; ".join(map(str, findings[:4])) + (f"; and {len(findings) - 4} more" if len(findings) > 4 else "")
        raise MissingKernelError(f"TensorRT does not take the {name} graph: {shown}")
