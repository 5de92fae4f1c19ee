"""FP8 matrix products: quantise-dequantise pairs around the linear layers of a graph, in standard ONNX operators.

Activations get one scale each, from the largest magnitude seen on sample inputs; weights get one for each output channel.
The weights stay in their file in 16 bits: the builder folds their pair into FP8 constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from infimm_fast.export.common.errors import ExportError

LARGEST_E4M3 = 448.0
_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class LinearLayer:
    """A matrix product with constant weights.

    Attributes:
        node: its index among the graph's nodes.
        activation: name of its input.
        weight: name of the initialiser.
        reader: index of the node that reads the initialiser, the product itself or a transposition before it.
        channel_axis: axis of the weight that is the output channel.
    """

    node: int
    activation: str
    weight: str
    reader: int
    channel_axis: int


def linear_layers(graph: onnx.GraphProto, any_dtype: bool = False) -> list[LinearLayer]:
    """Return the matrix products of activations with constant weights, of 16 bits unless `any_dtype`."""
    weights = {
        tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and (any_dtype or tensor.data_type in _HALF)
    }
    turned = {
        node.output[0]: (index, node.input[0])
        for index, node in enumerate(graph.node)
        if node.op_type == "Transpose" and node.input[0] in weights
    }
    layers = []
    for index, node in enumerate(graph.node):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        activation, factor = node.input[:2]
        transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        if factor in weights:
            layers.append(LinearLayer(index, activation, factor, index, 0 if transposed else 1))
        elif factor in turned:
            reader, weight = turned[factor]
            layers.append(LinearLayer(index, activation, weight, reader, 1 if transposed else 0))
    return layers


def measure_activations(file: Path, names: Iterable[str], samples: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Run a graph in ONNX Runtime on the CPU and return the largest magnitude of each named value.

    Args:
        file: the graph's file, float32 or float16.
        names: values inside the graph.
        samples: inputs.

    Raises:
        ExportError: ONNX Runtime does not run the graph, or a value is not finite, or there is no sample.
    """
    import onnxruntime as ort

    names = sorted(set(names))
    model = onnx.load(file, load_external_data=False)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    largest = dict.fromkeys(names, 0.0)
    samples = list(samples)
    if not samples:
        raise ExportError("FP8 needs sample inputs to measure activations on; none were given")
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for sample in samples:
            for name, value in zip(names, session.run(names, dict(sample)), strict=True):
                largest[name] = max(largest[name], float(np.abs(value.astype(np.float32)).max()))
    except Exception as error:  # ONNX Runtime's own types are not exported
        raise ExportError(f"activations of {file.name} cannot be measured on the CPU: {error}") from error
    infinite = [name for name, value in largest.items() if not np.isfinite(value)]
    if infinite:
        raise ExportError(
            f"activations {', '.join(infinite[:3])} of {file.name} overflow; measure a float32 or bfloat16 export"
        )
    return largest


def quantize_graph(model: onnx.ModelProto, folder: Path, activations: Mapping[str, float]) -> int:
    """Put quantise-dequantise pairs around the linear layers of a graph, in place.

    Args:
        model: without its weights' values.
        folder: where its external data lies.
        activations: value -> largest magnitude; layers whose input is not named stay as they are.

    Returns:
        How many layers were quantised.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    layers = [layer for layer in linear_layers(graph) if layer.activation in activations]
    # Pairs of weights stand first of all; a weight may be read before the first product that it takes part in.
    first: list[onnx.NodeProto] = []
    before: dict[int, list[onnx.NodeProto]] = {}
    made: dict[tuple[str, int | None], str] = {}
    for layer in layers:
        kind = tensors[layer.weight].data_type
        activation, weight = (layer.activation, None), (layer.weight, layer.channel_axis)
        if activation not in made:
            scale = np.asarray(max(activations[layer.activation], 1e-6) / LARGEST_E4M3, np.float32)
            pair = _pair(graph, layer.activation, scale, kind, None)
            before.setdefault(layer.node, []).extend(pair)
            made[activation] = pair[-1].output[0]
        if weight not in made:
            scale = _channel_scales(tensors[layer.weight], folder, layer.channel_axis)
            pair = _pair(graph, layer.weight, scale, kind, layer.channel_axis)
            first.extend(pair)
            made[weight] = pair[-1].output[0]
        graph.node[layer.node].input[0] = made[activation]
        reader = graph.node[layer.reader]
        reader.input[1 if layer.reader == layer.node else 0] = made[weight]
    nodes = [*first, *(node for index, own in enumerate(graph.node) for node in (*before.get(index, ()), own))]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return len(layers)


def _channel_scales(tensor: onnx.TensorProto, folder: Path, axis: int) -> np.ndarray:
    loaded = onnx.TensorProto()
    loaded.CopyFrom(tensor)
    if external_data_helper.uses_external_data(loaded):
        external_data_helper.load_external_data_for_tensor(loaded, str(folder))
    values = numpy_helper.to_array(loaded).astype(np.float32)
    return np.maximum(np.abs(values).max(axis=1 - axis), 1e-6) / LARGEST_E4M3


def _pair(graph: onnx.GraphProto, value: str, scale: np.ndarray, kind: int, axis: int | None) -> list[onnx.NodeProto]:
    """Return the two nodes of a value; their scale and zero point become initialisers."""
    prefix = f"{value}_fp8" if axis is None else f"{value}_fp8_{axis}"
    graph.initializer.append(helper.make_tensor(f"{prefix}_scale", kind, scale.shape, scale.flatten()))
    zeros = np.zeros(scale.shape, np.float32).flatten()
    graph.initializer.append(helper.make_tensor(f"{prefix}_zero", TensorProto.FLOAT8E4M3FN, scale.shape, zeros))
    options = {} if axis is None else {"axis": axis}
    parameters = [f"{prefix}_scale", f"{prefix}_zero"]
    return [
        helper.make_node(
            "QuantizeLinear", [value, *parameters], [f"{prefix}_quantized"], name=f"{prefix}_quantize", **options
        ),
        helper.make_node(
            "DequantizeLinear",
            [f"{prefix}_quantized", *parameters],
            [f"{prefix}_out"],
            name=f"{prefix}_dequantize",
            **options,
        ),
    ]
