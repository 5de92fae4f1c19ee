"""Finds the nodes of a float16 graph whose results come near the end of the range."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

from infimm_fast.export.common.spec import GraphSpec
from infimm_fast.export.to_onnx.checks import inline_functions, value_types

HALF_RANGE = torch.finfo(torch.float16).max / 2
_MARK = "largest of "


def large_activations(
    file: Path, spec: GraphSpec, cases: list[Mapping[str, torch.Tensor]], threads: int | None
) -> list[dict]:
    """Run a float16 graph and return the nodes with a result beyond half the range of float16.

    The results of nodes inside our ops' bodies count as well.

    Args:
        file: the graph.
        spec: its declaration.
        cases: inputs to run it on.
        threads: of the CPU provider.

    Returns:
        ``{"node", "operator", "value", "largest"}`` of each such node, in the graph's order; `largest` is infinite for an
        overflow.
    """
    import onnxruntime as ort

    model = inline_functions(file)
    types = value_types(model)
    watched = {name: node for node in model.graph.node for name in node.output if types.get(name) == TensorProto.FLOAT16}
    del model.graph.output[:]
    for name in watched:
        model.graph.node.extend(_watch(name))
        model.graph.output.append(helper.make_tensor_value_info(_MARK + name, TensorProto.FLOAT, []))
    # Beside the original, whose data file it reads.
    probe = file.with_name(f".{file.stem}.probe.onnx")
    try:
        onnx.save(model, probe)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        session = ort.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
        largest = dict.fromkeys(watched, 0.0)
        # An input that no watched node reads is gone from the session.
        needed = {value.name for value in session.get_inputs()}
        for inputs in cases:
            feed = {tensor.name: inputs[tensor.name].numpy() for tensor in spec.inputs if tensor.name in needed}
            for name, value in zip(watched, session.run([_MARK + name for name in watched], feed), strict=True):
                size = float(value)
                largest[name] = max(largest[name], size if size == size else float("inf"))
    finally:
        probe.unlink(missing_ok=True)
    return [
        {"node": watched[name].name, "operator": watched[name].op_type, "value": name, "largest": size}
        for name, size in largest.items()
        if size > HALF_RANGE
    ]


def _watch(name: str) -> list[Any]:
    """Make the nodes that compute the largest absolute value of a float16 value."""
    return [
        helper.make_node("Cast", [name], [f"{name}/wide"], to=TensorProto.FLOAT),
        helper.make_node("Abs", [f"{name}/wide"], [f"{name}/abs"]),
        helper.make_node("ReduceMax", [f"{name}/abs"], [_MARK + name], keepdims=0),
    ]
