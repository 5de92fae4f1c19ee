"""Models and small hand-made graphs that the TensorRT tests share."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from transformers import LlamaConfig
from transformers.initialization import no_init_weights

from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig, InfiMMHDVisionConfig
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.presets import preset


def make_model(shape: str, dtype: torch.dtype) -> InfiMMHDForConditionalGeneration:
    """Return the tiny model cut short, one with the real widths and two layers of everything, or one with a resampler.

    The wide one has the tower (1792 wide, heads of 112, 1025 tokens), gated blocks and self-attention (5120 wide) of
    InfiMM-HD, and a smaller vocabulary and feed-forward, which hold no attention.
    """
    config = preset("tiny-zephyr" if shape == "resampled" else "tiny")
    config.vision_config.num_hidden_layers = 2
    config.text_config.num_hidden_layers = config.cross_attention_every_n_layers = 1
    if shape == "wide":
        vision = InfiMMHDVisionConfig(image_size=448, num_hidden_layers=2)
        text = LlamaConfig(
            vocab_size=300,
            hidden_size=5120,
            intermediate_size=2048,
            num_hidden_layers=2,
            num_attention_heads=40,
            max_position_embeddings=4096,
            pad_token_id=0,
        )
        config = InfiMMHDConfig(vision_config=vision, text_config=text, cross_attention_every_n_layers=1)
    with no_init_weights():
        model = InfiMMHDForConditionalGeneration._from_config(config, dtype=dtype)
    # Builders do not care what the numbers are, and drawing hundreds of millions of them takes long.
    pattern = torch.linspace(-0.05, 0.05, 4093, dtype=dtype)
    for parameter in model.parameters():
        parameter.data = pattern.repeat(parameter.numel() // len(pattern) + 1)[: parameter.numel()].view_as(parameter)
    return model.eval()


def make_graph(
    nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, list]], outputs: dict[str, tuple[int, list]], opset: int = 23
) -> onnx.ModelProto:
    """Return a model; values are (element type, shape)."""
    values = [[helper.make_tensor_value_info(name, *kind) for name, kind in group.items()] for group in (inputs, outputs)]
    graph = helper.make_graph(nodes, "graph", *values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def save(model: onnx.ModelProto, folder: Path) -> Path:
    """Write a model and return its file."""
    file = folder / "graph.onnx"
    onnx.save(model, file)
    return file


FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
