"""Shows which plugin the real ONNX parser asks for: registers creators of our ops, parses a graph, prints the calls as JSON.

TensorRT-RTX takes creators of another kind than the one of Python ahead-of-time plugins, but its parser looks nodes up, and
reads their attributes, as TensorRT's does. In a process of its own, since creators stay registered.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import tensorrt_rtx_bindings as trt
from onnx import TensorProto, helper

from infimm_fast.export.to_onnx.functions import DOMAIN
from infimm_fast.export.to_tensorrt.prepare import PACKED_ATTENTION, PLUGIN_OPS, prepare_graph

FIELDS = {
    "SubimageAttention": {"scale": "FLOAT32", "is_causal": "INT32"},
    PACKED_ATTENTION: {"scale": "FLOAT32", "is_causal": "INT32"},
    "IntervalAttention": {"scale": "FLOAT32"},
}
calls = []


class Creator(trt.IPluginCreatorV3One):
    def __init__(self, name: str):
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = name, DOMAIN, "1"
        self.field_names = trt.PluginFieldCollection(
            [trt.PluginField(key, np.array([]), getattr(trt.PluginFieldType, kind)) for key, kind in FIELDS[name].items()]
        )

    def create_plugin(self, name: str, fields: trt.PluginFieldCollection, phase: trt.TensorRTPhase) -> None:
        calls.append([self.name, name, {field.name: [field.type.name, field.data.tolist()] for field in fields}])


def parse(node: onnx.NodeProto, inputs: dict[str, tuple[int, list]]) -> None:
    values = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    out = helper.make_tensor_value_info("out", *next(iter(inputs.values())))
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([node], "g", values, [out]), opset_imports=imports, ir_version=10)
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    trt.OnnxParser(network, logger).parse(prepare_graph(model, PLUGIN_OPS).SerializeToString())


if __name__ == "__main__":
    creators = [Creator(name) for name in FIELDS]
    assert all(trt.get_plugin_registry().register_creator(creator, DOMAIN) for creator in creators)
    half, attributes = TensorProto.FLOAT16, {"domain": DOMAIN, "scale": 0.125}
    tiles, text, visual = (half, [2, 9, 4, 64]), (half, [2, 3, 4, 64]), (half, [8, 4, 64])
    node = helper.make_node("SubimageAttention", ["q", "k", "v"], ["out"], name="first", is_causal=1, **attributes)
    parse(node, {"q": tiles, "k": tiles, "v": tiles})
    node = helper.make_node(PACKED_ATTENTION, ["qkv"], ["out"], name="second", is_causal=0, **attributes)
    parse(node, {"qkv": (half, [2, 9, 3, 4, 64])})
    node = helper.make_node("IntervalAttention", ["q", "k", "v", "r"], ["out"], name="third", **attributes)
    parse(node, {"q": text, "k": visual, "v": visual, "r": (TensorProto.INT64, [2, 3, 2])})
    print(json.dumps(calls))
