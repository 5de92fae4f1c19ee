"""The bodies of our ops in ONNX against the reference of each op, and the forms that have no node."""

import pytest

pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from torch import nn

from infimm_fast.export import ExportError, export_module_onnx, load
from infimm_fast.export.to_onnx.functions import DOMAIN, interval_attention_body, subimage_attention_body
from infimm_fast.kernels import subimage_attention, subimage_attention_packed
from infimm_fast.kernels.common.numerics import assert_error_budget, outlier_normal
from infimm_fast.kernels.interval.reference import interval_attention_reference
from infimm_fast.kernels.subimage.reference import subimage_attention_reference

ONNX_TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}


def run_node(body, inputs, **attributes):
    """Run one node of our domain in ONNX Runtime, which inlines its body."""
    kinds = {name: ONNX_TYPES.get(tensor.dtype, TensorProto.INT64) for name, tensor in inputs.items()}
    node = helper.make_node(body.name, list(inputs), ["out"], domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, kinds[name], list(tensor.shape)) for name, tensor in inputs.items()],
        [helper.make_tensor_value_info("out", kinds["q"], list(inputs["q"].shape))],
    )
    opsets = [helper.make_opsetid("", body.opset_import[0].version), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=11)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def cross_inputs(heads, kv_heads, dtype=torch.float32):
    q = outlier_normal(2, 4, heads, 16, dtype=dtype, seed=1)
    k, v = (outlier_normal(11, kv_heads, 16, dtype=dtype, seed=seed) for seed in (2, 3))
    # Nothing, everything, one key, the last keys; outside on both sides, reversed, negative and empty, past the end.
    kv_range = torch.tensor([[[0, 0], [0, 11], [3, 4], [8, 11]], [[-3, 40], [7, 2], [-5, -1], [11, 20]]])
    return {"q": q, "k": k, "v": v, "kv_range": kv_range}


@pytest.mark.parametrize("opset", (23, 24))
@pytest.mark.parametrize("heads, kv_heads, dtype", ((4, 4, torch.float32), (4, 2, torch.float32), (2, 2, torch.float16)))
def test_interval_attention(heads, kv_heads, dtype, opset):
    inputs = cross_inputs(heads, kv_heads, dtype)
    actual = run_node(interval_attention_body(opset), inputs, scale=0.2)
    plain, _ = interval_attention_reference(*inputs.values(), 0.2)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs.values()]
    exact, _ = interval_attention_reference(*wide, 0.2)
    assert_error_budget("out", actual, plain, exact)
    for row, token in ((0, 0), (1, 1), (1, 2), (1, 3)):
        assert (actual[row, token] == 0).all()
    with pytest.raises(AssertionError):
        assert_error_budget("scale", run_node(interval_attention_body(opset), inputs, scale=0.3), plain, exact)


def test_what_an_empty_row_is_shown_is_dropped_even_if_it_is_no_number():
    inputs = cross_inputs(2, 2)
    inputs["k"][0], inputs["v"][0] = torch.nan, torch.nan
    out = run_node(interval_attention_body(23), inputs, scale=0.25)
    assert (out[0, 0] == 0).all() and (out[1, 1:] == 0).all() and out[0, 1].isnan().all()


@pytest.mark.parametrize("opset", (23, 24))
@pytest.mark.parametrize("is_causal", (0, 1))
def test_subimage_attention(is_causal, opset):
    inputs = {name: outlier_normal(2, 9, 3, 24, dtype=torch.float32, seed=seed) for seed, name in enumerate("qkv")}
    actual = run_node(subimage_attention_body(opset), inputs, scale=0.3, is_causal=is_causal)
    plain, _ = subimage_attention_reference(*inputs.values(), 0.3, is_causal=bool(is_causal))
    exact, _ = subimage_attention_reference(*(x.double() for x in inputs.values()), 0.3, is_causal=bool(is_causal))
    assert_error_budget("out", actual, plain, exact)
    with pytest.raises(AssertionError):
        other = run_node(subimage_attention_body(opset), inputs, scale=0.3, is_causal=1 - is_causal)
        assert_error_budget("causality", other, plain, exact)


class Rotated(nn.Module):
    """Our attention with RoPE tables, all in one module."""

    def __init__(self, prefix, interleaved, packed):
        super().__init__()
        self.prefix, self.interleaved, self.packed = prefix, interleaved, packed
        angles = torch.linspace(0, 3, (9 - prefix) * 8).view(9 - prefix, 8)
        angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, qkv):
        options = {"rope_cos": self.cos, "rope_sin": self.sin, "rope_prefix": self.prefix}
        options["rope_interleaved"] = self.interleaved
        if self.packed:
            return subimage_attention_packed(qkv, **options)
        return subimage_attention(*qkv.unbind(2), is_causal=True, **options)


@pytest.mark.parametrize("prefix, interleaved, packed", ((1, True, True), (0, False, False)))
def test_rope_stands_before_the_node(tmp_path, prefix, interleaved, packed):
    module = Rotated(prefix, interleaved, packed).eval()
    qkv = outlier_normal(3, 9, 3, 2, 16, dtype=torch.float32)
    folder = export_module_onnx(module, {"qkv": qkv}, tmp_path / "out", dynamic_axes={"qkv": {0: "tiles"}})
    nodes = onnx.load(folder / "onnx" / "module.onnx", load_external_data=False).graph.node
    assert [node.op_type for node in nodes if node.domain == DOMAIN] == ["SubimageAttention"]
    more = outlier_normal(5, 9, 3, 2, 16, dtype=torch.float32, seed=1)
    np.testing.assert_allclose(load(folder, threads=1)(qkv=more)["output"], module(more), atol=1e-5)


class Padded(nn.Module):
    def forward(self, q, seqlens):
        return subimage_attention(q, q, q, seqlens=seqlens)


def test_a_form_without_a_node_is_named(tmp_path):
    inputs = {"q": outlier_normal(3, 9, 2, 16, dtype=torch.float32), "seqlens": torch.tensor([3, 9, 5])}
    axes = {"q": {0: "tiles"}, "seqlens": {0: "tiles"}}
    with pytest.raises(ExportError, match="subimage_attention with seqlens has no infimm:: node"):
        export_module_onnx(Padded(), inputs, tmp_path / "nodes", dynamic_axes=axes)
    export_module_onnx(Padded(), inputs, tmp_path / "plain", dynamic_axes=axes, plain=True)
