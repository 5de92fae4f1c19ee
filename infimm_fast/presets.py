"""Named configurations. They hold no weights: those of InfiMM-HD, Vicuna and Llama carry licences of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig

from infimm_fast.configuration_infimm_hd import InfiMMHDConfig, InfiMMHDVisionConfig
from infimm_fast.errors import ConfigurationError
from infimm_fast.tokenization_bytes import END_OF_CHUNK_ID, IMAGE_ID, VOCABULARY_SIZE

VICUNA_VOCABULARY = 32000 + 2  # Llama's tokens, <|endofchunk|>, <image>


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


PRESETS: dict[str, Callable[[], InfiMMHDConfig]] = {
    "infimm-hd-vicuna-13b": _high_resolution,
    "infimm-pretrain-vicuna-7b": lambda: _pretrain("7b"),
    "infimm-pretrain-vicuna-13b": lambda: _pretrain("13b"),
    "tiny": _tiny,
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
