"""Named configurations. They hold no weights: those of InfiMM-HD, Vicuna and Llama carry licences of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig, MistralConfig

from infimm_fast.errors import ConfigurationError
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig, InfiMMHDVisionConfig
from infimm_fast.models.infimm_hd.tokenization_bytes import END_OF_CHUNK_ID, IMAGE_ID, VOCABULARY_SIZE

VICUNA_VOCABULARY = 32000 + 2  # Llama's tokens, <|endofchunk|>, <image>; Mistral has as many

# What the Flamingo models of the family share: one gate for each branch, a wide feed-forward, six Perceiver layers of 64
# latents, a picture of one tile.
_FLAMINGO: dict[str, Any] = {
    "cross_attention_heads": 8,
    "cross_attention_ff_mult": 4.0,
    "cross_attention_gate": "scalar",
    "use_subimage_position_embedding": False,
    "resampler_layers": 6,
    "max_grid": 1,
    "image_fit": "crop",
}

# What makes an EVA-CLIP tower one of EVA02's (arXiv 2303.11331).
_EVA02: dict[str, Any] = {"norm_position": "pre", "mlp_type": "swiglu", "use_sub_layer_norm": True, "use_rope": True}


def _vicuna(size: str) -> LlamaConfig:
    """Vicuna v1.5 by its published Llama-2 dimensions, with the two added tokens."""
    dimensions: dict[str, Any] = {
        "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    }[size]
    return LlamaConfig(
        vocab_size=VICUNA_VOCABULARY, max_position_embeddings=4096, rms_norm_eps=1e-5, pad_token_id=0, **dimensions
    )


def _high_resolution() -> InfiMMHDConfig:
    """The model of the paper, whose features come from the penultimate block (arXiv 2403.01487)."""
    return InfiMMHDConfig(
        vision_config=InfiMMHDVisionConfig(image_size=448), text_config=_vicuna("13b"), vision_feature_layer=-2
    )


def _pretrain(size: str) -> InfiMMHDConfig:
    return InfiMMHDConfig(
        vision_config=InfiMMHDVisionConfig(image_size=224),
        text_config=_vicuna(size),
        use_subimage_position_embedding=False,
        max_grid=1,
    )


def _zephyr() -> InfiMMHDConfig:
    """InfiMM-Zephyr as its published configuration and the shapes in its checkpoint have it."""
    vision = InfiMMHDVisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=2730,
        image_size=336,
        **_EVA02,
        projection_dim=768,
    )
    text = MistralConfig(
        vocab_size=VICUNA_VOCABULARY, max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=4096, pad_token_id=2
    )
    return InfiMMHDConfig(
        vision_config=vision,
        text_config=text,
        cross_attention_every_n_layers=2,
        chat_format="zephyr",
        **_FLAMINGO,
    )


def _open_flamingo() -> InfiMMHDConfig:
    """OpenFlamingo-9B on Llama (arXiv 2308.01390): CLIP ViT-L/14, patches without the class token."""
    vision = InfiMMHDVisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=224,
        layer_norm_eps=1e-5,
        norm_position="pre",
        mlp_type="quick_gelu",
        use_embedding_norm=True,
        use_patch_bias=False,
        use_key_bias=True,
        projection_dim=None,
    )
    text = LlamaConfig(
        vocab_size=VICUNA_VOCABULARY + 1,  # and a padding token
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        pad_token_id=VICUNA_VOCABULARY,
    )
    return InfiMMHDConfig(
        vision_config=vision,
        text_config=text,
        cross_attention_every_n_layers=4,
        use_class_token=False,
        chat_format="plain",
        **_FLAMINGO,
    )


def _tiny() -> InfiMMHDConfig:
    """Seconds on a CPU, with the real head dim 112, an odd token count (65) and grids up to 2 x 2."""
    vision = InfiMMHDVisionConfig(
        hidden_size=224,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=1920,
        image_size=112,
        projection_dim=32,
        initializer_range=0.1,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        initializer_range=0.1,
    )
    return InfiMMHDConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        end_of_chunk_token_id=END_OF_CHUNK_ID,
        max_grid=2,
        gate_initializer_range=0.5,
        initializer_range=0.1,
    )


def _tiny_zephyr() -> InfiMMHDConfig:
    """InfiMM-Zephyr in seconds on a CPU: every part of it, heads of 64, grouped keys in the language model."""
    vision = InfiMMHDVisionConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=341,
        image_size=84,
        **_EVA02,
        projection_dim=32,
        initializer_range=0.1,
    )
    text = MistralConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        sliding_window=4096,
        pad_token_id=0,
        initializer_range=0.1,
    )
    small = {"resampler_layers": 2, "resampler_latents": 16, "resampler_heads": 2}
    return InfiMMHDConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        end_of_chunk_token_id=END_OF_CHUNK_ID,
        cross_attention_every_n_layers=2,
        chat_format="zephyr",
        gate_initializer_range=0.5,
        initializer_range=0.1,
        **{**_FLAMINGO, **small},
    )


PRESETS: dict[str, Callable[[], InfiMMHDConfig]] = {
    "infimm-hd-vicuna-13b": _high_resolution,
    "infimm-pretrain-vicuna-7b": lambda: _pretrain("7b"),
    "infimm-pretrain-vicuna-13b": lambda: _pretrain("13b"),
    "infimm-zephyr-7b": _zephyr,
    "openflamingo-9b": _open_flamingo,
    "tiny": _tiny,
    "tiny-zephyr": _tiny_zephyr,
}


def preset(name: str) -> InfiMMHDConfig:
    """Return a fresh configuration by name.

    Args:
        name: a key of `PRESETS`.

    Raises:
        ConfigurationError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ConfigurationError(f"preset {name!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
