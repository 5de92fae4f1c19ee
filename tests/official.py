"""Checkpoints as the authors name their tensors, of any size: the inverse of the converter's renaming."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import torch

import golden
from infimm_fast import InfiMMHDConfig, InfiMMHDForConditionalGeneration

_RENAMES = (
    (r"^vision_tower\.embeddings\.class_token$", "vision_encoder.cls_token"),
    (r"^vision_tower\.embeddings\.position_embedding$", "vision_encoder.pos_embed"),
    (r"^vision_tower\.embeddings\.patch_embed\.", "vision_encoder.patch_embed.proj."),
    (r"^vision_tower\.", "vision_encoder."),
    (r"\.qkv\.([qv]_bias)", r".\1"),
    (r"\.attn\.inner_norm\.", ".attn.inner_attn_ln."),
    (r"^(vision_encoder\..*)\.mlp\.gate_proj\.", r"\1.mlp.w1."),
    (r"^(vision_encoder\..*)\.mlp\.up_proj\.", r"\1.mlp.w2."),
    (r"^(vision_encoder\..*)\.mlp\.down_proj\.", r"\1.mlp.w3."),
    (r"^(vision_encoder\..*)\.mlp\.norm\.", r"\1.mlp.ffn_ln."),
    (r"^resampler\.", "perceiver."),
    (r"^(perceiver\.layers\.\d+)\.attn\.(q|kv)_proj\.", r"\1.0.to_\2."),
    (r"^(perceiver\.layers\.\d+)\.attn\.o_proj\.", r"\1.0.to_out."),
    (r"^(perceiver\.layers\.\d+)\.attn\.", r"\1.0."),
    (r"^(perceiver\.layers\.\d+)\.ff\.norm\.", r"\1.1.0."),
    (r"^(perceiver\.layers\.\d+)\.ff\.up_proj\.", r"\1.1.1."),
    (r"^(perceiver\.layers\.\d+)\.ff\.down_proj\.", r"\1.1.3."),
    (r"^language_model\.model\.layers\.(\d+)\.(?!gated_cross)", r"lang_encoder.model.layers.\1.decoder_layer."),
    (r"^language_model\.", "lang_encoder."),
    (r"\.gated_cross_attention\.", ".gated_cross_attn_layer."),
    (r"(gated_cross_attn_layer\.attn)\.(q|kv)_proj", r"\1.to_\2"),
    (r"(gated_cross_attn_layer\.attn)\.o_proj", r"\1.to_out"),
    (r"(gated_cross_attn_layer\.ff)\.norm", r"\1.0"),
    (r"(gated_cross_attn_layer\.ff)\.up_proj", r"\1.1"),
    (r"(gated_cross_attn_layer\.ff)\.down_proj", r"\1.3"),
)


def official_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def official_names(config: InfiMMHDConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Official names and shapes, each tensor once; the tower's q, k and v weights as one."""
    with torch.device("meta"):
        model = InfiMMHDForConditionalGeneration(config)
    for name, value in model.state_dict().items():
        yield official_name(name), tuple(value.shape)


def zephyr_state_dict(model: InfiMMHDForConditionalGeneration) -> dict[str, torch.Tensor]:
    """A model's weights as InfiMM-Zephyr's checkpoint has them: prefix, q, k, v apart, RoPE tables, second names."""
    vision, state = model.config.vision_config, {}
    for name, value in model.state_dict().items():
        name = official_name(name)
        if name.endswith(".attn.qkv.weight"):
            for part, weight in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("qkv", f"{part}_proj")] = weight.clone()
        else:
            state[name] = value
    tables = {kind: torch.randn(vision.grid_size**2, vision.head_dim) for kind in ("cos", "sin")}
    places = ("rope", *(f"blocks.{index}.attn.rope" for index in range(vision.num_hidden_layers)))
    state |= {f"vision_encoder.{place}.freqs_{kind}": table for place in places for kind, table in tables.items()}
    for name in list(state):
        second = re.sub(
            r"^lang_encoder\.model\.layers\.(\d+)\.decoder_layer\.", r"lang_encoder.old_decoder_blocks.\1.", name
        )
        second = re.sub(r"model\.layers\.(\d+)\.gated_cross_attn_layer\.", r"gated_cross_attn_layers.\1.", second)
        state[second] = state[name]
    return {f"model.{name}": value for name, value in state.items()}


def key_patterns(name: str) -> dict:
    """The names and shapes in a real checkpoint; see tests/data/README.md."""
    return json.loads((golden.FOLDER / "official_key_patterns.json").read_text())[name]
