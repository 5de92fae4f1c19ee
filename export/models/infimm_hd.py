"""InfiMM-HD: three graphs make a model.

Shapes are written with numbers for fixed sizes and names for free axes::

    vision      pixel_values [num_tiles, 3, S, S], tile_positions [num_tiles, 2]
                    -> image_features [num_tiles, tokens_per_tile, C]
    cross_kv    image_features
                    -> cross_key_values.{i}.key / .value [visual_length, heads, head_dim]     for each gated block
    decoder     input_ids, position_ids [batch_size, sequence_length], attention_mask [batch_size, total_sequence_length],
                kv_range [batch_size, sequence_length, 2], has_image [batch_size],
                past_key_values.{i}.key / .value [batch_size, kv_heads, past_sequence_length, head_dim]   for each layer,
                cross_key_values.{i}.key / .value
                    -> logits [batch_size, sequence_length, vocabulary],
                       present.{i}.key / .value [batch_size, kv_heads, total_sequence_length, head_dim]

`tile_positions` is (row, column) of a sub-image and (-1, -1) of a thumbnail. `visual_length` is the number of visual tokens
rounded up to a multiple of 8; the tokens added are zero and in nobody's interval. `kv_range` says which of them each text
token sees. `has_image` says whether a row has any picture: text before a row's first picture sees nothing either, but goes
through the gated feed-forward, while a row without pictures passes the gated blocks unchanged, so that `kv_range` alone
cannot tell the two apart. A batch without any picture still gives the decoder one (dummy) visual token.

Pixels and logits are float32 whatever the weights' dtype, so that a program on the host needs no 16-bit numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from infimm_fast.dtypes import dtype_name
from infimm_fast.export.common.cases import Case
from infimm_fast.export.common.errors import ExportError
from infimm_fast.export.common.family import Family
from infimm_fast.export.common.spec import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from infimm_fast.export.common.artifact import Manifest
    from infimm_fast.export.common.runner import Backend
    from infimm_fast.export.models.infimm_hd_runner import ExportedInfiMMHD
    from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
    from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
    from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor

VISUAL_MULTIPLE = 8


class InfiMMHD(Family):
    """The family of `InfiMMHDForConditionalGeneration`, and of the Flamingo models that it can be configured to."""

    name = "infimm_hd"
    model_class = "InfiMMHDForConditionalGeneration"
    graphs = ("vision", "cross_kv", "decoder")
    bounded_axes = ("total_sequence_length",)
    derived_axes = ("total_sequence_length",)
    fp8_graphs = ("vision",)

    def specs(self, config: InfiMMHDConfig, dtype: str) -> dict[str, GraphSpec]:
        """Return the three graphs, as this module's docstring draws them."""
        vision = config.vision_config
        side, channels = vision.image_size, vision.num_channels
        features = TensorSpec("image_features", dtype, ("num_tiles", config.visual_tokens_per_tile, vision.hidden_size))
        cross_shape = ("visual_length", config.cross_attention_heads, config.cross_attention_head_dim)
        cross = _key_values("cross_key_values", len(config.gated_layers), dtype, cross_shape)
        pixels = TensorSpec("pixel_values", "float32", ("num_tiles", channels, side, side))
        places = TensorSpec("tile_positions", "int64", ("num_tiles", 2))
        return {
            "vision": GraphSpec("vision", (pixels, places), (features,)),
            "cross_kv": GraphSpec("cross_kv", (features,), cross),
            "decoder": _decoder(config, dtype, cross),
        }

    def modules(self, model: InfiMMHDForConditionalGeneration) -> dict[str, nn.Module]:
        """Return the modules of the three graphs; nothing of the model is changed."""
        from infimm_fast.export.models.infimm_hd_graphs import graph_modules

        return graph_modules(model)

    def load_model(self, folder: Path, dtype: torch.dtype | None) -> InfiMMHDForConditionalGeneration:
        """Load a model in evaluation mode."""
        from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration

        kind: Any = "auto" if dtype is None else dtype
        return InfiMMHDForConditionalGeneration.from_pretrained(folder, dtype=kind).eval()

    def load_processor(self, folder: Path) -> InfiMMHDProcessor | None:
        """Return the processor in a folder, or None if it holds no tokenizer."""
        from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor
        from infimm_fast.registration import register_auto

        register_auto()  # its parts are found by Transformers' Auto classes
        if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
            return InfiMMHDProcessor.from_pretrained(folder)
        return None

    def config_from_json(self, content: dict[str, Any]) -> InfiMMHDConfig:
        """Return the model's configuration."""
        from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig

        return InfiMMHDConfig.from_dict(content)

    def generation(self, model: InfiMMHDForConditionalGeneration) -> dict[str, Any]:
        """Return the ids that end and pad a generated text."""
        config = model.generation_config
        return {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}

    def default_limits(self, config: InfiMMHDConfig) -> dict[str, tuple[int, int]]:
        """Return limits of all axes; the largest are chosen generously and bound memory only, but for the text's length."""
        positions = most_positions(config)
        return {
            "num_tiles": (1, 1024),
            "batch_size": (1, 1024),
            "sequence_length": (1, positions),
            "past_sequence_length": (0, positions - 1),
            "total_sequence_length": (1, positions),
            "visual_length": (1, 1024 * config.visual_tokens_per_tile + VISUAL_MULTIPLE),
        }

    def sample_sizes(self, specs: Mapping[str, GraphSpec]) -> dict[str, int]:
        """Return sizes of which the total length is the sum of new and past tokens, as it always is."""
        return {
            "num_tiles": 3,
            "batch_size": 2,
            "sequence_length": 5,
            "past_sequence_length": 6,
            "total_sequence_length": 11,
            "visual_length": 24,
        }

    def cases(self, spec: GraphSpec, config: InfiMMHDConfig) -> list[Case]:
        """Return the cases of a graph: tiles, or batches of text with and without pictures, padding and cache."""
        from infimm_fast.export.models.infimm_hd_cases import model_cases

        return model_cases(spec, config)

    def axis_ranges(self, config: InfiMMHDConfig, limits: Any) -> dict[str, tuple[int, int, int]]:
        """Return the range of every free axis for tiles, rows, new and past tokens, and pictures that the text sees."""
        per_tile = config.visual_tokens_per_tile
        total = tuple(limits.text[i] + limits.past[i] for i in range(3))
        visual = tuple(max(VISUAL_MULTIPLE, padded_visual_length(tiles * per_tile)) for tiles in limits.pictures)
        return {
            "num_tiles": limits.tiles,
            "batch_size": limits.batch,
            "sequence_length": limits.text,
            "past_sequence_length": limits.past,
            "total_sequence_length": (total[0], total[1], total[2]),
            "visual_length": (1 if limits.pictures[0] == 0 else visual[0], visual[1], visual[2]),
        }

    def check_dtype(self, model: InfiMMHDForConditionalGeneration, dtype: str) -> None:
        """Refuse to round folded weights a second time."""
        own = {dtype_name(parameter.dtype) for parameter in model.parameters()}
        if own != {dtype} and any(getattr(block, "folded", None) is not None for block in model.gated_blocks):
            raise ExportError(
                f"a folded model of {', '.join(sorted(own))} would be rounded twice on the way to {dtype}; "
                f"use model.to({dtype}), which folds it anew, and export that"
            )

    def cast(self, model: Any, dtype: torch.dtype) -> Any:
        """Return a model in a dtype, its folded weights made of its own parameters."""
        from infimm_fast.models.infimm_hd.fused_gated_cross_attention import FusedGatedCrossAttentionBlock

        copied = super().cast(model, dtype)
        if copied is not model:
            for block in copied.modules():
                if isinstance(block, FusedGatedCrossAttentionBlock) and block.folded is not None:
                    block.fold()
        return copied

    @contextlib.contextmanager
    def as_exported(self, model: InfiMMHDForConditionalGeneration) -> Iterator[None]:
        """Put a model in evaluation mode and on the backends that can be exported, and back afterwards."""
        modules = [(module, module.backend) for module in model.modules() if hasattr(module, "backend")]
        attention = model.language_model.config._attn_implementation
        try:
            for module, _ in modules:
                module.backend = "sdpa"
            if attention != "sdpa":
                model.language_model.set_attn_implementation("sdpa")
            with super().as_exported(model):
                yield
        finally:
            for module, backend in modules:
                module.backend = backend
            if attention != "sdpa":
                model.language_model.set_attn_implementation(attention)

    def runner(self, manifest: Manifest, backend: Backend, processor: InfiMMHDProcessor | None) -> ExportedInfiMMHD:
        """Return the runner that answers questions about pictures."""
        from infimm_fast.export.models.infimm_hd_runner import ExportedInfiMMHD

        return ExportedInfiMMHD(manifest, backend, processor)


def padded_visual_length(tokens: int) -> int:
    """Return the visual length of so many visual tokens."""
    return (tokens + VISUAL_MULTIPLE - 1) // VISUAL_MULTIPLE * VISUAL_MULTIPLE


def most_positions(config: InfiMMHDConfig) -> int:
    """Return the longest text that the decoder graph is right for: of a sliding window only what fits into it."""
    text = config.text_config
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return min(text.max_position_embeddings, window or text.max_position_embeddings)


def _key_values(name: str, count: int, dtype: str, shape: tuple[int | str, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(f"{name}.{i}.{part}", dtype, shape) for i in range(count) for part in ("key", "value"))


def _decoder(config: InfiMMHDConfig, dtype: str, cross: tuple[TensorSpec, ...]) -> GraphSpec:
    text = config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = ("batch_size", "sequence_length")
    past, present = (
        _key_values(name, text.num_hidden_layers, dtype, ("batch_size", heads, axis, head_dim))
        for name, axis in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length"))
    )
    inputs = (
        TensorSpec("input_ids", "int64", tokens),
        TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
        TensorSpec("position_ids", "int64", tokens),
        TensorSpec("kv_range", "int64", (*tokens, 2)),
        TensorSpec("has_image", "bool", ("batch_size",)),
        *past,
        *cross,
    )
    return GraphSpec("decoder", inputs, (TensorSpec("logits", "float32", (*tokens, text.vocab_size)), *present))
