"""Vision towers of the EVA-CLIP family, and CLIP's: post- or pre-norm, absolute positions and/or axial RoPE, three MLPs."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from infimm_fast.errors import ImageInputError
from infimm_fast.folders import updated_folder
from infimm_fast.kernels import subimage_attention_packed
from infimm_fast.kernels.common.launch import BACKENDS
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDVisionConfig, check_choice
from infimm_fast.models.infimm_hd.position_embedding import axial_rope, resize_position_embedding

_WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

RopeTables = tuple[torch.Tensor, torch.Tensor] | None


class QKVProjection(nn.Module):
    """One projection to queries, keys and values; queries and values have a bias, keys have one only in CLIP."""

    def __init__(self, hidden_size: int, use_key_bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.q_bias = nn.Parameter(torch.zeros(hidden_size))
        self.k_bias = nn.Parameter(torch.zeros(hidden_size)) if use_key_bias else None
        self.v_bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., C]`` to ``[..., 3 C]``."""
        k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
        bias = torch.cat((self.q_bias, k_bias, self.v_bias))
        return F.linear(x, self.weight, bias)


class EvaAttention(nn.Module):
    """Self-attention inside each tile."""

    def __init__(self, config: InfiMMHDVisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.backend = config.backend
        self.qkv = QKVProjection(config.hidden_size, config.use_key_bias)
        eps = config.layer_norm_eps
        self.inner_norm = nn.LayerNorm(config.hidden_size, eps=eps) if config.use_sub_layer_norm else nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, rope: RopeTables) -> torch.Tensor:
        """Map ``[tiles, tokens, C]`` to the same shape."""
        tiles, tokens, width = x.shape
        qkv = self.qkv(x).view(tiles, tokens, 3, self.num_heads, self.head_dim)
        rope_cos, rope_sin = rope if rope is not None else (None, None)
        out = subimage_attention_packed(qkv, rope_cos=rope_cos, rope_sin=rope_sin, rope_prefix=1, backend=self.backend)
        return self.proj(self.inner_norm(out.reshape(tiles, tokens, width)))


class GeluMlp(nn.Module):
    """Two layers with the exact (erf) GELU between them."""

    def __init__(self, config: InfiMMHDVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[tiles, tokens, C]`` to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class QuickGeluMlp(GeluMlp):
    """Two layers with the sigmoid approximation of the GELU between them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[tiles, tokens, C]`` to the same shape."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class SwiGluMlp(nn.Module):
    """SwiGLU, with a LayerNorm before the last layer if the tower has sub-layer norms."""

    def __init__(self, config: InfiMMHDVisionConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner)
        self.up_proj = nn.Linear(hidden, inner)
        self.norm = nn.LayerNorm(inner, eps=config.layer_norm_eps) if config.use_sub_layer_norm else nn.Identity()
        self.down_proj = nn.Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[tiles, tokens, C]`` to the same shape."""
        return self.down_proj(self.norm(F.silu(self.gate_proj(x)) * self.up_proj(x)))


_MLPS: dict[str, type[nn.Module]] = {"gelu": GeluMlp, "quick_gelu": QuickGeluMlp, "swiglu": SwiGluMlp}


class EvaBlock(GradientCheckpointingLayer):
    """Attention and MLP, each with a residual; the norm stands behind (post) or before (pre) them."""

    def __init__(self, config: InfiMMHDVisionConfig):
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = EvaAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _MLPS[config.mlp_type](config)

    def forward(self, x: torch.Tensor, rope: RopeTables) -> torch.Tensor:
        """Map ``[tiles, tokens, C]`` to the same shape."""
        if self.post_norm:
            x = x + self.norm1(self.attn(x, rope))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class EvaEmbeddings(nn.Module):
    """Patches, class token, learned positions, and CLIP's LayerNorm behind them."""

    def __init__(self, config: InfiMMHDVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Conv2d(
            config.num_channels, width, config.patch_size, stride=config.patch_size, bias=config.use_patch_bias
        )
        self.position_embedding = (
            nn.Parameter(torch.zeros(1, config.tokens_per_tile, width)) if config.use_absolute_position_embedding else None
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.use_embedding_norm else nn.Identity()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map ``[tiles, 3, S, S]`` to ``[tiles, 1 + (S / patch)**2, C]``; S may differ from the configuration's."""
        self._check(pixel_values)
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)  # [tiles, patches, C]
        x = torch.cat((self.class_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        if self.position_embedding is not None:
            grid_size = pixel_values.shape[-1] // self.patch_size
            x = x + resize_position_embedding(self.position_embedding, grid_size).to(x.dtype)
        return self.norm(x)

    def _check(self, pixel_values: torch.Tensor) -> None:
        shape = list(pixel_values.shape)
        fits = len(shape) == 4 and shape[1] == self.num_channels and shape[2] == shape[3] > 0
        if not fits or shape[3] % self.patch_size:
            raise ImageInputError(
                f"pixel_values has shape {shape}; expected [tiles, {self.num_channels}, S, S] with S a multiple of "
                f"{self.patch_size}"
            )


class InfiMMHDPreTrainedModel(PreTrainedModel):
    """What the tower and the whole model share: fresh weights, and the switch between backends."""

    config_class = InfiMMHDVisionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, QKVProjection):
            init.normal_(module.weight, std=std)
            for bias in (module.q_bias, module.k_bias, module.v_bias):
                if bias is not None:
                    init.zeros_(bias)
        elif isinstance(module, EvaEmbeddings):
            init.normal_(module.class_token, std=std)
            if module.position_embedding is not None:
                init.normal_(module.position_embedding, std=std)

    def set_backend(self, backend: str) -> None:
        """Switch every attention of the tower and of the gated blocks.

        Args:
            backend: "sdpa", "reference", "triton" or "auto"; see `InfiMMHDConfig`.

        Raises:
            ConfigurationError: the name is not known.
        """
        check_choice("backend", backend, BACKENDS)
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend
            if isinstance(module, InfiMMHDPreTrainedModel):
                module.config.backend = backend

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as Transformers does, but leave nothing half-written: a full disk leaves the folder as it was.

        Args:
            save_directory: folder to save in; other files in it stay.
            *args: see `transformers.PreTrainedModel.save_pretrained`.
            **kwargs: see there.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
            CheckpointError: another process is saving there.
        """
        shared = kwargs.get("distributed_checkpoint") or not kwargs.get("is_main_process", True)
        if shared or kwargs.get("push_to_hub"):
            # Several processes write into one folder, or the folder gives the repository its name.
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        with updated_folder(Path(save_directory), _WEIGHT_FILES) as partial:
            try:
                super().save_pretrained(partial, *args, **kwargs)
            except SafetensorError as error:
                raise OSError(f"{save_directory} cannot be written: {error}") from error


class EvaVisionTower(InfiMMHDPreTrainedModel):
    """A ViT that runs a batch of tiles and returns every token, class token first.

    Source: EVA-CLIP (arXiv 2303.15389), EVA-02 (arXiv 2303.11331), CLIP (arXiv 2103.00020).
    """

    _no_split_modules = ("EvaBlock",)

    def __init__(self, config: InfiMMHDVisionConfig):
        super().__init__(config)
        self.embeddings = EvaEmbeddings(config)
        self.blocks = nn.ModuleList([EvaBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.projection_dim) if config.projection_dim else None
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, feature_layer: int = -1) -> torch.Tensor:
        """Return the features after one block, without the final norm.

        Args:
            pixel_values: normalised tiles ``[tiles, 3, S, S]``, S a multiple of the patch size.
            feature_layer: -1 the last block, -2 the one before, ...; 0 the embeddings, n the output of the n-th block.

        Returns:
            ``[tiles, 1 + (S / patch)**2, C]``.

        Raises:
            ImageInputError: `pixel_values` has another shape.
        """
        depth = feature_layer if feature_layer >= 0 else len(self.blocks) + 1 + feature_layer
        x = self.embeddings(pixel_values)
        rope = self._rope(x)
        for block in self.blocks[:depth]:
            x = block(x, rope)
        return x

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """CLIP embedding of each tile: final norm of the class token, then the head if there is one.

        Args:
            features: last block's output ``[tiles, tokens, C]``.

        Returns:
            ``[tiles, projection_dim]``, or ``[tiles, C]`` without a head.
        """
        pooled = self.norm(features)[:, 0]
        return self.head(pooled) if self.head is not None else pooled

    def _rope(self, x: torch.Tensor) -> RopeTables:
        if not self.config.use_rope:
            return None
        config = self.config
        grid_size = math.isqrt(x.shape[1] - 1)
        return axial_rope(config.head_dim, grid_size, config.rope_reference_grid, config.rope_theta, x.device)
