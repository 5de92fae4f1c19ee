"""What stages of the model cost: FLOPs on true sizes, and the fewest bytes that must move."""

from __future__ import annotations

from transformers import PretrainedConfig

from infimm_fast.dtypes import DTYPES
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.costs import (
    attention_flops,
    gated_block_flops,
    linear_flops,
    vision_attention_flops,
    vision_layers,
    vision_linear_flops,
)


def vision_flops(config: InfiMMHDConfig, tiles: int) -> int:
    """Operations of the tower up to the block whose features are used."""
    vision, layers = config.vision_config, vision_layers(config)
    return vision_linear_flops(vision, tiles, layers) + vision_attention_flops(vision, tiles, layers)


def one_gated_block_flops(config: InfiMMHDConfig, text_tokens: int, pairs: int) -> int:
    """Operations of one gated block with K/V given.

    Args:
        config: the model.
        text_tokens: that pass the block.
        pairs: sum over them of the visual tokens that they see.
    """
    linear = gated_block_flops(config, text_tokens, 0) // len(config.gated_layers)
    return linear + attention_flops(1, pairs, config.cross_attention_heads * config.cross_attention_head_dim)


def gated_block_parameters(config: InfiMMHDConfig) -> int:
    """Weights of the matrices that one gated block reads with K/V given."""
    return one_gated_block_flops(config, 1, 0) // 2


def _decoder_layer_parameters(text: PretrainedConfig) -> int:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query, key = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    return text.hidden_size * (2 * query + 2 * key + 3 * text.intermediate_size)


def language_flops(config: InfiMMHDConfig, rows: int, new: int, past: int, visual_tokens_per_row: int) -> int:
    """Operations of the decoder, the gated blocks and the head of one token for each row; K/V of the pictures given.

    Args:
        config: of the model; its decoder is a Llama or Mistral.
        rows: B.
        new: text tokens of each row that are computed.
        past: tokens of each row in the cache.
        visual_tokens_per_row: what every text token sees.
    """
    text = config.text_config
    linear = 2 * rows * new * _decoder_layer_parameters(text)
    pairs = rows * (new * past + new * (new + 1) // 2)
    attention = attention_flops(1, pairs, text.hidden_size)
    gated = gated_block_flops(config, rows * new, visual_tokens_per_row)
    return (linear + attention) * text.num_hidden_layers + gated + linear_flops(rows, text.hidden_size, text.vocab_size)


def language_bytes(config: InfiMMHDConfig, dtype: str, rows: int, new: int, past: int, visual_tokens: int) -> int:
    """Weights, caches and visual K/V that one pass of the language model must read.

    Args:
        config: see `language_flops`.
        dtype: of weights and caches.
        rows: see `language_flops`.
        new: see `language_flops`.
        past: see `language_flops`.
        visual_tokens: of all rows.
    """
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_key_value_heads * head_dim * rows * (new + past) * text.num_hidden_layers
    visual = 2 * config.cross_attention_heads * config.cross_attention_head_dim * visual_tokens * len(config.gated_layers)
    weights = _decoder_layer_parameters(text) * text.num_hidden_layers + text.hidden_size * text.vocab_size
    weights += gated_block_parameters(config) * len(config.gated_layers)
    return (weights + cache + visual) * DTYPES[dtype].itemsize


def vision_bytes(config: InfiMMHDConfig, dtype: str, tiles: int) -> int:
    """Weights of the blocks that run, pixels and features; activations between blocks could stay on the chip."""
    vision = config.vision_config
    matrices = 3 if vision.mlp_type == "swiglu" else 2
    weights = vision_layers(config) * (4 * vision.hidden_size**2 + matrices * vision.hidden_size * vision.intermediate_size)
    pixels = tiles * vision.num_channels * vision.image_size**2
    return (weights + pixels + tiles * vision.tokens_per_tile * vision.hidden_size) * DTYPES[dtype].itemsize
