"""The modules behind InfiMM-HD's graphs: thin wrappers around a model, with flat tensors in and out."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import DynamicCache

from infimm_fast.export.models.infimm_hd import VISUAL_MULTIPLE, padded_visual_length
from infimm_fast.models.infimm_hd.modeling_gated_cross_attention import CrossAttentionInputs, VisualCrossAttention
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.position_embedding import tile_position_embedding
from infimm_fast.models.infimm_hd.visual_context import VisualContext


class VisionGraph(nn.Module):
    """Tiles to visual tokens: the tower, POS(row, column) of each sub-image, and the resampler if there is one."""

    def __init__(self, model: InfiMMHDForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, tile_positions: torch.Tensor) -> torch.Tensor:
        """Return ``[num_tiles, tokens_per_tile, C]``; see `infimm_fast.export.models.infimm_hd`."""
        config, positions = self.model.config, None
        if config.use_subimage_position_embedding:
            positions = tile_position_embedding(tile_positions, config.vision_config.hidden_size)
        return self.model.encode_tiles(pixel_values, positions)


class CrossKeyValueGraph(nn.Module):
    """Visual tokens to the keys and values of all gated blocks, packed end to end and padded to a multiple of 8."""

    def __init__(self, model: InfiMMHDForConditionalGeneration):
        super().__init__()
        self.attentions = nn.ModuleList([block.attn for block in model.gated_blocks])

    def forward(self, image_features: torch.Tensor) -> list[torch.Tensor]:
        """Return key and value ``[visual_length, heads, head_dim]`` of each block."""
        packed = image_features.flatten(0, 1)
        # Fused attention of runtimes wants the number of keys divisible by 4 or 8. (No runtime pads bfloat16, all join it.)
        # Padded by a fixed number and cut: an amount of padding that may be 0 or 1 would be fixed by torch.export.
        length = padded_visual_length(packed.shape[0])
        packed = torch.cat((packed, packed.new_zeros(VISUAL_MULTIPLE - 1, packed.shape[1])))[:length]
        attentions = cast(list[VisualCrossAttention], list(self.attentions))
        return [part for attention in attentions for part in attention.project_visual(packed)]


class DecoderGraph(nn.Module):
    """Tokens to logits, for the prompt and for every later step: the cache comes in and goes out as flat tensors."""

    def __init__(self, model: InfiMMHDForConditionalGeneration):
        super().__init__()
        self.language_model = model.language_model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        kv_range: torch.Tensor,
        has_image: torch.Tensor,
        past_key_values: list[torch.Tensor],
        cross_key_values: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Return the logits and the new cache; see `infimm_fast.export.models.infimm_hd`."""
        cache = DynamicCache(_pairs(past_key_values))
        keys_and_values = tuple(_pairs(cross_key_values))
        context = VisualContext(keys_and_values[0][0], has_image, has_image, keys_and_values)
        states = self.language_model.get_decoder()(
            input_ids=input_ids,
            attention_mask=_causal_mask(attention_mask, input_ids.shape[1]),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            cross_attention=CrossAttentionInputs(context, kv_range, has_image),
        ).last_hidden_state
        logits = self.language_model.get_output_embeddings()(states).float()
        return [logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))]


def _pairs(flat: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _causal_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Return who sees whom, bool ``[B, 1, T, total]``.

    Padding sees itself: what a runtime makes of a row that sees nothing differs from one to the next.
    """
    total = attention_mask.shape[1]
    key = torch.arange(total, device=attention_mask.device)
    query = torch.arange(length, device=attention_mask.device)[:, None] + (total - length)
    visible = (attention_mask[:, None] != 0) & (key <= query)
    return (visible | (key == query))[:, None]


def graph_modules(model: InfiMMHDForConditionalGeneration) -> dict[str, nn.Module]:
    """Return the module of every graph; they share the model's parameters.

    Nothing of the model is changed. The decoder's arguments after `has_image` are two lists.
    """
    return {
        "vision": VisionGraph(model),
        "cross_kv": CrossKeyValueGraph(model),
        "decoder": DecoderGraph(model),
    }
