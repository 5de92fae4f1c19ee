"""What a picture and text cost: visual tokens, memory and floating-point operations, from a configuration alone.

A multiplication and an addition are two operations. Matrix products, the patch embedding and attention are counted;
norms, activations, softmax and RoPE are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from infimm_fast.dtypes import DTYPES
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig, InfiMMHDVisionConfig
from infimm_fast.models.infimm_hd.tiling import choose_grid, tile_count


def linear_flops(rows: int, inputs: int, outputs: int) -> int:
    """Operations of a linear layer on ``[rows, inputs]``."""
    return 2 * rows * inputs * outputs


def attention_flops(queries: int, keys: int, width: int) -> int:
    """Operations of both products of attention; `width` is heads times head dim."""
    return 4 * queries * keys * width


def vision_layers(config: InfiMMHDConfig) -> int:
    """Blocks of the tower that run; those behind `vision_feature_layer` do not."""
    layer = config.vision_feature_layer
    return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer


def vision_linear_flops(vision: InfiMMHDVisionConfig, tiles: int, layers: int) -> int:
    """Operations of the tower's patch embedding and linear layers.

    Args:
        vision: the tower.
        tiles: in the batch.
        layers: blocks that run.
    """
    width, rows = vision.hidden_size, tiles * vision.tokens_per_tile
    patches = linear_flops(tiles * vision.grid_size**2, vision.num_channels * vision.patch_size**2, width)
    matrices = 3 if vision.mlp_type == "swiglu" else 2
    block = linear_flops(rows, width, 4 * width) + matrices * linear_flops(rows, width, vision.intermediate_size)
    return patches + layers * block


def vision_attention_flops(vision: InfiMMHDVisionConfig, tiles: int, layers: int) -> int:
    """Operations of the tower's attention; see `vision_linear_flops`."""
    return layers * tiles * attention_flops(vision.tokens_per_tile, vision.tokens_per_tile, vision.hidden_size)


def resampler_flops(config: InfiMMHDConfig, tiles: int) -> int:
    """Operations of the Perceiver resampler; 0 without one."""
    width, inner = config.vision_config.hidden_size, config.resampler_heads * config.resampler_head_dim
    latents = config.resampler_latents
    seen = config.vision_config.tokens_per_tile - (not config.use_class_token) + latents
    layer = (
        2 * linear_flops(latents, width, inner)  # queries, output
        + linear_flops(seen, width, 2 * inner)  # keys and values
        + attention_flops(latents, seen, inner)
        + 2 * linear_flops(latents, width, int(width * config.resampler_ff_mult))
    )
    return config.resampler_layers * tiles * layer


def key_value_flops(config: InfiMMHDConfig, visual_tokens: int) -> int:
    """Operations that make all gated blocks' keys and values, once for a picture."""
    return len(config.gated_layers) * linear_flops(visual_tokens, config.vision_config.hidden_size, 2 * _cross_width(config))


def gated_block_flops(config: InfiMMHDConfig, text_tokens: int, visible: int) -> int:
    """Operations of all gated blocks, keys and values aside.

    Args:
        config: the model.
        text_tokens: that pass the blocks.
        visible: visual tokens that each of them attends to.
    """
    width, inner = config.text_config.hidden_size, _cross_width(config)
    hidden = int(width * config.cross_attention_ff_mult)
    block = (
        2 * linear_flops(text_tokens, width, inner)
        + attention_flops(text_tokens, visible, inner)
        + 2 * linear_flops(text_tokens, width, hidden)
    )
    return len(config.gated_layers) * block


def _cross_width(config: InfiMMHDConfig) -> int:
    return config.cross_attention_heads * config.cross_attention_head_dim


@dataclass(frozen=True)
class PictureCosts:
    """What one picture costs before the first text token.

    Attributes:
        grid: sub-images, (rows, columns).
        tiles: sub-images and thumbnail.
        visual_tokens: that the gated blocks see.
        vision_linear_flops: of the tower.
        vision_attention_flops: of the tower.
        resampler_flops: of the Perceiver, 0 without one.
        key_value_flops: of all gated blocks' keys and values.
        feature_bytes: of the visual tokens.
        key_value_bytes: of all gated blocks' keys and values.
        score_bytes: of the attention scores of one layer of the tower, which the naive path holds and a fused one never.
    """

    grid: tuple[int, int]
    tiles: int
    visual_tokens: int
    vision_linear_flops: int
    vision_attention_flops: int
    resampler_flops: int
    key_value_flops: int
    feature_bytes: int
    key_value_bytes: int
    score_bytes: int

    @property
    def flops(self) -> int:
        """All operations."""
        return self.vision_linear_flops + self.vision_attention_flops + self.resampler_flops + self.key_value_flops


def picture_costs(config: InfiMMHDConfig, width: int, height: int, element_bytes: int = 2) -> PictureCosts:
    """Return what a picture of a size costs.

    Args:
        config: the model.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        element_bytes: of one number in memory; 2 for bfloat16 and float16.
    """
    vision = config.vision_config
    rows, columns = choose_grid(height, width, vision.image_size, max_grid=config.max_grid)
    tiles, layers = tile_count(rows, columns, config.always_thumbnail), vision_layers(config)
    tokens = tiles * config.visual_tokens_per_tile
    return PictureCosts(
        grid=(rows, columns),
        tiles=tiles,
        visual_tokens=tokens,
        vision_linear_flops=vision_linear_flops(vision, tiles, layers),
        vision_attention_flops=vision_attention_flops(vision, tiles, layers),
        resampler_flops=resampler_flops(config, tiles),
        key_value_flops=key_value_flops(config, tokens),
        feature_bytes=tokens * vision.hidden_size * element_bytes,
        key_value_bytes=tokens * len(config.gated_layers) * 2 * _cross_width(config) * element_bytes,
        score_bytes=tiles * vision.num_attention_heads * vision.tokens_per_tile**2 * element_bytes,
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
    return linear + attention_flops(1, pairs, _cross_width(config))


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
    visual = 2 * _cross_width(config) * visual_tokens * len(config.gated_layers)
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
