"""What TensorRT needs an ONNX graph to look like. Works on graphs without their weights' values; nothing is written back.

Each change is made on a copy in memory that only TensorRT's parser sees: other runtimes refuse some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import onnx
from onnx import TensorProto, helper, inliner

from infimm_fast.export.to_onnx.functions import DOMAIN

# An attention that no fused kernel takes (fp32, some head dims) fails the build unless its node says that it may be taken
# apart. The report of the built engine says which were.
DECOMPOSABLE = "TRT_decomposable"
PACKED_ATTENTION = "SubimageAttentionPacked"
# Op types that stay nodes if plugins run them. The packed one comes out of the first by `_merge_packed_attention`.
PLUGIN_OPS = ("SubimageAttention", "IntervalAttention", PACKED_ATTENTION)
PLUGIN_VERSION = "1"
_INTEGERS = (TensorProto.INT32, TensorProto.INT64)


def prepare_graph(model: onnx.ModelProto, plugins: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy of a model for TensorRT's parser.

    - Functions are inlined, but for ops that a plugin runs: their nodes lose the function and gain the plugin's attributes,
      and queries, keys and values that were cut out of one tensor are read from it.
    - Attention gets four-dimensional inputs, one output, no cache of its own, and may be decomposed.
    - CumSum runs in floating point.

    Args:
        model: an ONNX model; weights may be external data that is not loaded.
        plugins: op types of the domain ``infimm`` that stay nodes.
    """
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    kept = [(function.domain, function.name) for function in prepared.functions if function.name in plugins]
    prepared = inliner.inline_selected_functions(prepared, kept, exclude=True)
    for function in [function for function in prepared.functions if function.name in plugins]:
        prepared.functions.remove(function)
    for node in prepared.graph.node:
        # Nodes of inlined functions have none; reports and errors speak of nodes by name.
        node.name = node.name or f"{node.op_type}_of_{node.output[0]}"
    types = infer_types(prepared)
    rewrite_nodes(prepared.graph, _cumulate_in_float, types)
    rewrite_nodes(prepared.graph, _four_dimensional, types)
    if plugins:
        _merge_packed_attention(prepared.graph)
        for node in prepared.graph.node:
            if node.domain == DOMAIN:
                node.attribute.extend(
                    [
                        helper.make_attribute("plugin_version", PLUGIN_VERSION),
                        helper.make_attribute("plugin_namespace", DOMAIN),
                        helper.make_attribute("aot", 1),
                    ]
                )
    return prepared


Types = dict[str, tuple[int, int | None]]


def infer_types(model: onnx.ModelProto) -> Types:
    """Return value name -> (element type, rank or None) as far as ONNX's shape inference goes."""
    graph = onnx.shape_inference.infer_shapes(_with_plugin_types(model)).graph
    types: Types = {tensor.name: (tensor.data_type, len(tensor.dims)) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        types[value.name] = (tensor.elem_type, len(tensor.shape.dim) if tensor.HasField("shape") else None)
    return types


def _with_plugin_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """Declare the outputs of our nodes, which inference knows nothing of: they are like the first input."""
    if not any(node.domain == DOMAIN for node in model.graph.node):
        return model
    known = onnx.shape_inference.infer_shapes(model)
    declared = {value.name: value for value in known.graph.value_info}
    for node in known.graph.node:
        if node.domain == DOMAIN and node.input[0] in declared and node.output[0] not in declared:
            value = onnx.ValueInfoProto()
            value.CopyFrom(declared[node.input[0]])
            value.name = node.output[0]
            known.graph.value_info.append(value)
    return known


def attention_nodes(model: onnx.ModelProto) -> dict[str, bool]:
    """Return attention node -> whether a plugin runs it, for a prepared graph."""
    found = {}
    for node in model.graph.node:
        if node.domain == DOMAIN or node.op_type == "Attention":
            found[node.name] = node.domain == DOMAIN
    return found


Rewrite = Callable[[onnx.NodeProto, Types], "list[onnx.NodeProto] | None"]


def rewrite_nodes(graph: onnx.GraphProto, rewrite: Rewrite, types: Types) -> None:
    """Replace nodes in place, keeping their order; `rewrite` returns the new nodes, or None to leave one as it is."""
    result: list[onnx.NodeProto] = []
    for node in graph.node:
        replaced = rewrite(node, types)
        result.extend([node] if replaced is None else replaced)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in result]
    del graph.node[:]
    graph.node.extend(nodes)


def attribute_of(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of an attribute."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _cumulate_in_float(node: onnx.NodeProto, types: Types) -> list[onnx.NodeProto] | None:
    kind = types.get(node.input[0], (0, None))[0] if node.input else 0
    if node.op_type != "CumSum" or kind not in _INTEGERS:
        return None
    (out,) = node.output
    summed = onnx.NodeProto()
    summed.CopyFrom(node)
    summed.input[0], summed.output[0] = f"{out}_terms", f"{out}_sum"
    return [
        helper.make_node("Cast", [node.input[0]], [f"{out}_terms"], name=f"{node.name}_to_float", to=TensorProto.FLOAT),
        summed,
        helper.make_node("Cast", [f"{out}_sum"], [out], name=f"{node.name}_to_int", to=kind),
    ]


def _four_dimensional(node: onnx.NodeProto, types: Types) -> list[onnx.NodeProto] | None:
    """Give an Attention node the only form that TensorRT's parser takes."""
    if node.op_type != "Attention" or node.domain:
        return None
    made = _Maker(node.name)
    inputs = [*node.input, *[""] * (6 - len(node.input))]
    outputs = [*node.output, *[""] * (3 - len(node.output))]
    flat = types.get(inputs[0], (0, None))[1] == 3
    if flat:
        heads = (attribute_of(node, "q_num_heads"), *[attribute_of(node, "kv_num_heads")] * 2)
        inputs[:3] = [made.split_heads(value, count) for value, count in zip(inputs[:3], heads, strict=True)]
    for value, (past, present) in enumerate(zip(inputs[4:6], outputs[1:3], strict=True), start=1):
        if past:
            joined = present or made.name(f"joined_{value}")
            inputs[value] = made.add("Concat", [past, inputs[value]], joined, axis=2)
        elif present:
            made.add("Identity", [inputs[value]], present)
    mask_rank = types.get(inputs[3], (0, None))[1]
    if inputs[3] and mask_rank in (2, 3):
        axes = made.constant([0, 1] if mask_rank == 2 else [1])
        inputs[3] = made.add("Unsqueeze", [inputs[3], axes], made.name("mask"))
    attention = onnx.NodeProto()
    attention.CopyFrom(node)
    del attention.input[:], attention.output[:], attention.attribute[:]
    attention.input.extend(inputs[: 4 if inputs[3] else 3])
    attention.output.append(made.name("heads") if flat else outputs[0])
    dropped = (DECOMPOSABLE, "q_num_heads", "kv_num_heads")
    attention.attribute.extend([a for a in node.attribute if a.name not in dropped])
    attention.attribute.append(helper.make_attribute(DECOMPOSABLE, 1))
    made.nodes.append(attention)
    if flat:
        made.join_heads(attention.output[0], outputs[0])
    return made.nodes


class _Maker:
    """Makes nodes with names after the node that they replace."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []

    def name(self, suffix: str) -> str:
        return f"{self.prefix}_{suffix}"

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}_{op}", **attributes))
        return output

    def constant(self, values: Iterable[int]) -> str:
        output = self.name(f"constant_{len(self.nodes)}")
        self.nodes.append(helper.make_node("Constant", [], [output], name=output, value_ints=list(values)))
        return output

    def split_heads(self, value: str, heads: int) -> str:
        """``[B, N, H * D] -> [B, H, N, D]``."""
        shape = self.constant([0, 0, heads, -1])
        split = self.add("Reshape", [value, shape], self.name(f"split_{len(self.nodes)}"))
        return self.add("Transpose", [split], self.name(f"turned_{len(self.nodes)}"), perm=[0, 2, 1, 3])

    def join_heads(self, value: str, output: str) -> None:
        """``[B, H, N, D] -> [B, N, H * D]``."""
        turned = self.add("Transpose", [value], self.name("turned_back"), perm=[0, 2, 1, 3])
        self.add("Reshape", [turned, self.constant([0, 0, -1])], output)


def _merge_packed_attention(graph: onnx.GraphProto) -> None:
    """Let sub-image attention read the packed tensor ``[B, N, 3, H, D]`` where its inputs are cut out of one."""
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.domain != DOMAIN or node.op_type != "SubimageAttention":
            continue
        squeezes = [producers.get(value) for value in node.input]
        if any(squeeze is None or squeeze.op_type != "Squeeze" for squeeze in squeezes):
            continue
        parts = [squeeze.input[0] for squeeze in squeezes if squeeze is not None]
        split = producers.get(parts[0])
        if (
            split is not None
            and split.op_type == "Split"
            and list(split.output) == parts
            and attribute_of(split, "axis") == 2
        ):
            node.op_type = PACKED_ATTENTION
            node.input[:] = [split.input[0]]
    _drop_unused(graph)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes whose outputs nobody reads."""
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(node.input)
    kept.reverse()
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)
