"""Our two attention ops in ONNX: nodes of the domain ``infimm``, and what each of them means in standard operators.

A file with such nodes carries their bodies along. A runtime that does not know the domain inlines the body, one with a
plugin or a library of custom ops runs its own kernel in place of the node. Both ops are inference only and have no
log-sum-exp output.

``infimm::SubimageAttention(q, k, v; scale, is_causal) -> out``
    `infimm_fast.kernels.subimage_attention` on ``[B, N, H, D]``. RoPE is applied before the node, in standard operators.

``infimm::IntervalAttention(q, k, v, kv_range; scale) -> out``
    `infimm_fast.kernels.interval_attention` on q ``[B, T, Hq, D]``, k and v ``[S, Hkv, D]``, S >= 1, and int64
    kv_range ``[B, T, 2]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import helper
from onnx.defs import OpSchema

from infimm_fast.export.common.errors import ExportError

DOMAIN = "infimm"
DOMAIN_VERSION = 1

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def _schema(name: str, inputs: tuple[str, ...], attributes: dict[str, OpSchema.AttrType]) -> OpSchema:
    return OpSchema(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[OpSchema.FormalParameter(i, "I" if i == "kv_range" else "T") for i in inputs],
        outputs=[OpSchema.FormalParameter("out", "T")],
        type_constraints=[("T", _FLOATS, "weights' dtype"), ("I", ["tensor(int64)"], "indices")],
        attributes=[OpSchema.Attribute(key, kind, "", required=True) for key, kind in attributes.items()],
    )


SUBIMAGE_ATTENTION = _schema(
    "SubimageAttention", ("q", "k", "v"), {"scale": OpSchema.AttrType.FLOAT, "is_causal": OpSchema.AttrType.INT}
)
INTERVAL_ATTENTION = _schema("IntervalAttention", ("q", "k", "v", "kv_range"), {"scale": OpSchema.AttrType.FLOAT})


def _node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """Make a node from names separated by spaces; an attribute given as ``ref="name"`` is the function's own."""
    refer = attributes.pop("refer", {})
    node = helper.make_node(op, inputs.split(), outputs.split(), **attributes)
    for name, kind in refer.items():
        reference = helper.make_attribute_ref(name, kind)
        reference.ref_attr_name = name
        node.attribute.append(reference)
    return node


def _function(schema: OpSchema, nodes: list[onnx.NodeProto], opset: int) -> onnx.FunctionProto:
    return helper.make_function(
        DOMAIN,
        schema.name,
        [parameter.name for parameter in schema.inputs],
        ["out"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=list(schema.attributes),
    )


def subimage_attention_body(opset: int) -> onnx.FunctionProto:
    """Return ``infimm::SubimageAttention`` in standard operators."""
    nodes = [_node("Transpose", name, f"{name}_heads", perm=[0, 2, 1, 3]) for name in "qkv"]  # [B, H, N, D]
    refer = {"scale": onnx.AttributeProto.FLOAT, "is_causal": onnx.AttributeProto.INT}
    nodes += [
        _node("Attention", "q_heads k_heads v_heads", "out_heads", refer=refer),
        _node("Transpose", "out_heads", "out", perm=[0, 2, 1, 3]),
    ]
    return _function(SUBIMAGE_ATTENTION, nodes, opset)


def interval_attention_body(opset: int) -> onnx.FunctionProto:
    """Return ``infimm::IntervalAttention`` in standard operators: batch and text are one query axis under one mask."""
    nodes = [
        _node("Constant", "", "zero", value_int=0),
        _node("Constant", "", "one", value_int=1),
        _node("Constant", "", "first", value_ints=[0]),
        _node("Constant", "", "second", value_ints=[1]),
        _node("Constant", "", "pairs", value_ints=[-1, 2]),
        _node("Constant", "", "folded", value_ints=[1, -1]),
        # The interval of every token, clamped to the visual tokens.
        _node("Shape", "k", "num_keys_1d", start=0, end=1),
        _node("Squeeze", "num_keys_1d", "num_keys"),
        _node("Reshape", "kv_range pairs", "intervals"),  # [B * T, 2]
        _node("Max", "intervals zero", "from_zero"),
        _node("Min", "from_zero num_keys", "clamped"),
        _node("Gather", "clamped first", "given_start", axis=1),  # [B * T, 1]
        _node("Gather", "clamped second", "given_end", axis=1),
        # A token that sees nothing is shown key 0, and its result is dropped: no row of the mask is empty.
        _node("Less", "given_start given_end", "nonempty"),
        _node("Where", "nonempty given_start zero", "start"),
        _node("Where", "nonempty given_end one", "end"),
        _node("Range", "zero num_keys one", "index"),  # [S]
        _node("GreaterOrEqual", "index start", "after_start"),
        _node("Less", "index end", "before_end"),
        _node("And", "after_start before_end", "mask"),  # [B * T, S]
        # One batch row of B * T queries.
        _node("Shape", "q", "heads_and_dim", start=2),
        _node("Concat", "folded heads_and_dim", "folded_shape", axis=0),
        _node("Reshape", "q folded_shape", "q_rows"),  # [1, B * T, Hq, D]
        _node("Transpose", "q_rows", "q_heads", perm=[0, 2, 1, 3]),
        _node("Transpose", "k", "k_transposed", perm=[1, 0, 2]),
        _node("Transpose", "v", "v_transposed", perm=[1, 0, 2]),
        _node("Unsqueeze", "k_transposed first", "k_heads"),  # [1, Hkv, S, D]
        _node("Unsqueeze", "v_transposed first", "v_heads"),
        _node("Attention", "q_heads k_heads v_heads mask", "out_heads", refer={"scale": onnx.AttributeProto.FLOAT}),
        _node("Transpose", "out_heads", "out_rows", perm=[0, 2, 1, 3]),
        _node("Reshape", "nonempty column", "nonempty_rows"),  # [1, B * T, 1, 1]
        _node("CastLike", "zero out_rows", "nothing"),
        _node("Where", "nonempty_rows out_rows nothing", "kept_rows"),
        _node("Shape", "q", "q_shape"),
        _node("Reshape", "kept_rows q_shape", "out"),
    ]
    nodes.insert(0, _node("Constant", "", "column", value_ints=[1, -1, 1, 1]))
    return _function(INTERVAL_ATTENTION, nodes, opset)


def append_bodies(model: ir.Model, opset: int) -> None:
    """Give a model the bodies of those of our ops that it uses."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for schema, body in ((SUBIMAGE_ATTENTION, subimage_attention_body), (INTERVAL_ATTENTION, interval_attention_body)):
        if schema.name in used:
            function = ir.serde.deserialize_function(body(opset))
            model.functions[function.identifier()] = function
            model.opset_imports[DOMAIN] = DOMAIN_VERSION


def translations(opset: int) -> dict[Callable, Callable]:
    """Return what `torch.onnx.export` makes of our torch operators: a custom translation table.

    Every operator returns ``(out, lse)``, of which ONNX has no second; a scalar stands in for it and is dropped as unused.

    Args:
        opset: of the file.

    Raises:
        ExportError: when a graph is traced, for a form of an op that the ONNX ops do not have.
    """
    import onnxscript
    from onnxscript import values

    op = getattr(onnxscript, f"opset{opset}")
    domain = values.Opset(DOMAIN, DOMAIN_VERSION)
    subimage_node = values.Op(domain, SUBIMAGE_ATTENTION.name, SUBIMAGE_ATTENTION)
    cross_node = values.Op(domain, INTERVAL_ATTENTION.name, INTERVAL_ATTENTION)

    def cross(q, k, v, kv_range, scale, backend):
        range64 = kv_range if kv_range.dtype == ir.DataType.INT64 else op.Cast(kv_range, to=ir.DataType.INT64.value)
        return cross_node(q, k, v, range64, scale=scale), op.Constant(value_float=0.0)

    def separate(
        q, k, v, scale, cos, sin, prefix, interleaved, seqlens, cu_seqlens, max_seqlen, is_causal, backend
    ):  # fmt: skip
        for name, value in (("seqlens", seqlens), ("cu_seqlens", cu_seqlens)):
            if value is not None:
                raise ExportError(
                    f"subimage_attention with {name} has no infimm:: node; export with plain=True for standard operators"
                )
        if cos is not None:
            q, k = (_rotate(op, x, cos, sin, prefix, interleaved) for x in (q, k))
        return subimage_node(q, k, v, scale=scale, is_causal=int(is_causal)), op.Constant(value_float=0.0)

    def packed(qkv, *options):
        axis = op.Constant(value_ints=[2])
        parts = [op.Squeeze(part, axis) for part in op.Split(qkv, axis=2, num_outputs=3)]
        return separate(*parts, *options)

    operators = torch.ops.infimm_fast
    return {
        operators.interval_attention.default: cross,
        operators.subimage_attention.default: separate,
        operators.subimage_attention_packed.default: packed,
    }


def _rotate(op: Any, x: Any, cos: Any, sin: Any, prefix: int, interleaved: bool) -> Any:
    """Rotate queries or keys ``[B, N, H, D]`` as `infimm_fast.kernels.subimage.reference.apply_rope` does."""
    head_dim = cos.shape[-1]
    ints = lambda *numbers: op.Constant(value_ints=list(numbers))  # noqa: E731 - a name for a constant, nothing more
    tail = op.Slice(x, ints(prefix), ints(2**31 - 1), ints(1)) if prefix else x
    wide = op.Cast(tail, to=ir.DataType.FLOAT.value)
    if interleaved:
        pairs = op.Reshape(wide, ints(0, 0, 0, head_dim // 2, 2))
        first, second = op.Split(pairs, axis=4, num_outputs=2)
        partner = op.Reshape(op.Concat(op.Neg(second), first, axis=4), ints(0, 0, 0, head_dim))
    else:
        first, second = op.Split(wide, axis=3, num_outputs=2)
        partner = op.Concat(op.Neg(second), first, axis=3)
    tables = (op.Unsqueeze(op.Cast(table, to=ir.DataType.FLOAT.value), ints(1)) for table in (cos, sin))
    turned = op.CastLike(op.Add(op.Mul(wide, next(tables)), op.Mul(partner, next(tables))), x)
    if not prefix:
        return turned
    return op.Concat(op.Slice(x, ints(0), ints(prefix), ints(1)), turned, axis=1)
