"""Configuration of the InfiMM family and of its vision towers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.launch import BACKENDS
from infimm_fast.models.infimm_hd.chat_templates import CHAT_TEMPLATES


def check_choice(name: str, value: Any, accepted: tuple) -> None:
    """Raise `ConfigurationError` unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ConfigurationError(f"{name}={value!r} is not accepted; choose one of {', '.join(map(repr, accepted))}")


class InfiMMHDVisionConfig(PretrainedConfig):
    """One tower of the EVA-CLIP family, or CLIP's; the defaults are EVA2-CLIP-E at 448 px, the tower of InfiMM-HD.

    Attributes:
        hidden_size: width of the tower.
        num_hidden_layers: blocks.
        num_attention_heads: heads; the head dim is ``hidden_size // num_attention_heads``.
        intermediate_size: width of the MLP's hidden layer.
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        num_channels: colour channels.
        layer_norm_eps: epsilon of every LayerNorm of the tower.
        norm_position: "post" adds ``norm(f(x))`` (EVA-CLIP-E), "pre" adds ``f(norm(x))``.
        mlp_type: "gelu" (exact erf form), "quick_gelu" (``x * sigmoid(1.702 x)``, OpenAI's CLIP) or "swiglu".
        use_embedding_norm: LayerNorm between the embeddings and the first block (CLIP).
        use_patch_bias: bias of the patch embedding; CLIP has none.
        use_key_bias: bias of the keys, as queries and values have one (CLIP).
        use_sub_layer_norm: LayerNorm before the attention's output projection and before the SwiGLU's (EVA02).
        use_absolute_position_embedding: learned position embedding of class token and patches.
        use_rope: axial rotary embedding of queries and keys, class token left alone.
        rope_theta: base of the rotary frequencies.
        rope_reference_grid: patch grid side of the pre-training; positions are scaled to it.
        projection_dim: width of the CLIP head, or None for a tower without one.
        initializer_range: standard deviation of fresh weights.
        backend: "sdpa", "reference" (the naive path, scores in memory), "triton" (our kernel) or "auto"
            (our kernel on CUDA, SDPA elsewhere).

    Source: EVA-CLIP (arXiv 2303.15389), EVA-02 (arXiv 2303.11331), CLIP (arXiv 2103.00020).
    """

    model_type = "infimm_hd_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1792
    num_hidden_layers: int = 64
    num_attention_heads: int = 16
    intermediate_size: int = 15360
    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    norm_position: str = "post"
    mlp_type: str = "gelu"
    use_embedding_norm: bool = False
    use_patch_bias: bool = True
    use_key_bias: bool = False
    use_sub_layer_norm: bool = False
    use_absolute_position_embedding: bool = True
    use_rope: bool = False
    rope_theta: float = 10000.0
    rope_reference_grid: int = 16
    projection_dim: int | None = 1024
    initializer_range: float = 0.02
    backend: str = "sdpa"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choice("norm_position", self.norm_position, ("post", "pre"))
        check_choice("mlp_type", self.mlp_type, ("gelu", "quick_gelu", "swiglu"))
        check_choice("backend", self.backend, BACKENDS)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigurationError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.image_size % self.patch_size:
            raise ConfigurationError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Patches and the class token."""
        return self.grid_size**2 + 1


class InfiMMHDConfig(PretrainedConfig):
    """A model of the InfiMM family: vision tower, Perceiver resampler or none, gated cross-attention, language model.

    The defaults are InfiMM-HD's.

    Attributes:
        vision_config: an `InfiMMHDVisionConfig` or its dict.
        text_config: configuration (or its dict) of any Transformers decoder with a plain ``model.layers`` list.
        image_token_id: id of ``<image>``.
        end_of_chunk_token_id: id of ``<|endofchunk|>``.
        cross_attention_every_n_layers: a gated block stands before every n-th decoder layer: 0-based n-1, 2n-1, ...
        cross_attention_heads: query heads of a gated block.
        cross_attention_head_dim: width of one of them.
        cross_attention_ff_mult: hidden width of the gated feed-forward over the model's width.
        cross_attention_gate: "vector" (a gate for each channel) or "scalar".
        cross_attention_layer_norm_eps: epsilon of the gated blocks' LayerNorms.
        only_attend_immediate_image: a text token sees only the latest image before it; False: all images so far.
        vision_feature_layer: block whose output the language model sees: -1 the last, without the final norm.
        use_class_token: the class token is one of the visual tokens; False: patches alone (OpenFlamingo).
        use_subimage_position_embedding: add POS(row, column) to the tokens of each sub-image.
        resampler_layers: layers of the Perceiver resampler, which makes `resampler_latents` visual tokens out of each tile;
            0 for none, so that the gated blocks see the tower's tokens.
        resampler_latents: learned queries of the resampler.
        resampler_heads: its attention heads.
        resampler_head_dim: width of one of them.
        resampler_ff_mult: hidden width of its feed-forward over the tower's width.
        resampler_layer_norm_eps: epsilon of its LayerNorms.
        max_grid: largest number of sub-images along a side in pre-processing; 1 means one tile for each picture.
        always_thumbnail: whether a picture of a single sub-image has a thumbnail too.
        image_fit: how a picture fills its tiles: "stretch", or "crop" (the shorter side is scaled to one tile and the middle
            is taken, for ``max_grid=1`` only).
        chat_format: how a conversation is written: "vicuna", "zephyr" or "plain" (no roles).
        gate_initializer_range: standard deviation of fresh gates; 0 gives closed gates, as in training from scratch.
        initializer_range: standard deviation of fresh weights.
        backend: "sdpa" (PyTorch's fused attention, cross K/V computed once), "reference" (the naive path: scores and
            masks in memory, cross K/V computed again at every step) or "triton" (our kernels for both attentions,
            cross K/V computed once).

    Source: InfiMM-HD (arXiv 2403.01487, section 3), Flamingo (arXiv 2204.14198), OpenFlamingo (arXiv 2308.01390).
    """

    model_type = "infimm_hd"
    sub_configs = {"vision_config": InfiMMHDVisionConfig, "text_config": AutoConfig}  # noqa: RUF012

    vision_config: InfiMMHDVisionConfig = None  # type: ignore[assignment]
    text_config: PretrainedConfig = None
    image_token_id: int = 32001
    end_of_chunk_token_id: int = 32000
    cross_attention_every_n_layers: int = 4
    cross_attention_heads: int = 12
    cross_attention_head_dim: int = 64
    cross_attention_ff_mult: float = 1.0
    cross_attention_gate: str = "vector"
    cross_attention_layer_norm_eps: float = 1e-5
    only_attend_immediate_image: bool = True
    vision_feature_layer: int = -1
    use_class_token: bool = True
    use_subimage_position_embedding: bool = True
    resampler_layers: int = 0
    resampler_latents: int = 64
    resampler_heads: int = 8
    resampler_head_dim: int = 64
    resampler_ff_mult: float = 4.0
    resampler_layer_norm_eps: float = 1e-5
    max_grid: int = 3
    always_thumbnail: bool = False
    image_fit: str = "stretch"
    chat_format: str = "vicuna"
    gate_initializer_range: float = 0.0
    initializer_range: float = 0.02
    backend: str = "sdpa"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = InfiMMHDVisionConfig()
        elif isinstance(self.vision_config, dict):
            self.vision_config = InfiMMHDVisionConfig(**self.vision_config)
        if self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        elif isinstance(self.text_config, dict):
            text = dict(self.text_config)
            self.text_config = AutoConfig.for_model(text.pop("model_type", "llama"), **text)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("cross_attention_gate", self.cross_attention_gate, ("vector", "scalar"))
        check_choice("image_fit", self.image_fit, ("stretch",) if self.max_grid > 1 else ("stretch", "crop"))
        check_choice("chat_format", self.chat_format, tuple(CHAT_TEMPLATES))
        if self.resampler_layers < 0:
            raise ConfigurationError(f"resampler_layers={self.resampler_layers} must be 0 (no resampler) or more")
        if self.cross_attention_every_n_layers < 1:
            raise ConfigurationError(
                f"cross_attention_every_n_layers={self.cross_attention_every_n_layers} must be at least 1"
            )
        layers = self.vision_config.num_hidden_layers
        if not -layers - 1 <= self.vision_feature_layer <= layers:
            raise ConfigurationError(
                f"vision_feature_layer={self.vision_feature_layer} is outside [{-layers - 1}, {layers}]"
            )

    @property
    def gated_layers(self) -> list[int]:
        """0-based indices of the decoder layers that have a gated block in front."""
        every = self.cross_attention_every_n_layers
        return list(range(every - 1, self.text_config.num_hidden_layers, every))

    @property
    def visual_tokens_per_tile(self) -> int:
        """Visual tokens that the gated blocks see of each tile."""
        if self.resampler_layers:
            return self.resampler_latents
        return self.vision_config.tokens_per_tile - (not self.use_class_token)
