"""The Perceiver resampler: a fixed number of visual tokens out of each tile's features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from infimm_fast.kernels import interval_attention
from infimm_fast.kernels.common.launch import resolve_backend
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.modeling_gated_cross_attention import GatedFeedForward


class PerceiverAttention(nn.Module):
    """Latents attend to a tile's features and to themselves; a LayerNorm for each of the two, no biases."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, layer_norm_eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.backend = "sdpa"
        self.norm_media = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.norm_latents = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.kv_proj = nn.Linear(hidden_size, 2 * num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, latents: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
        """Map latents ``[tiles, latents, C]`` and features ``[tiles, tokens, C]`` to the shape of the latents."""
        latents, media = self.norm_latents(latents), self.norm_media(media)
        q = self.q_proj(latents).unflatten(-1, (self.num_heads, self.head_dim))  # [tiles, latents, H, D]
        key_value = self.kv_proj(torch.cat((media, latents), dim=1))
        k, v = key_value.unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)  # [tiles, tokens + latents, H, D]
        return self.o_proj(self._attend(q, k, v).flatten(2))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if resolve_backend(self.backend, q) == "sdpa":
            # Tiles are equally long, so SDPA needs no mask; the packed op's SDPA form would pay for tiles x tiles.
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        tiles, tokens = k.shape[:2]
        start = torch.arange(tiles, device=q.device) * tokens
        interval = torch.stack((start, start + tokens), dim=-1)[:, None].expand(-1, q.shape[1], -1)  # [tiles, latents, 2]
        return interval_attention(q, k.flatten(0, 1), v.flatten(0, 1), interval, backend=self.backend)


class PerceiverLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a residual."""

    def __init__(self, config: InfiMMHDConfig):
        super().__init__()
        width, eps = config.vision_config.hidden_size, config.resampler_layer_norm_eps
        self.attn = PerceiverAttention(width, config.resampler_heads, config.resampler_head_dim, eps)
        self.ff = GatedFeedForward(width, int(width * config.resampler_ff_mult), eps)

    def forward(self, latents: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
        """Map latents ``[tiles, latents, C]`` to the same shape, reading features ``[tiles, tokens, C]``."""
        latents = latents + self.attn(latents, media)
        return latents + self.ff(latents)


class PerceiverResampler(nn.Module):
    """Learned latents read a tile's features in several layers, and take their place.

    The attention of one tile is one interval of the packed keys, the tile's features followed by the latents, so the fused
    kernels of the gated blocks serve it too.

    Args:
        config: the model's configuration; `resampler_layers` and its neighbours.

    Source: Flamingo (arXiv 2204.14198, section 3.1.1), OpenFlamingo (arXiv 2308.01390).
    """

    def __init__(self, config: InfiMMHDConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.latents = nn.Parameter(torch.zeros(config.resampler_latents, width))
        self.layers = nn.ModuleList([PerceiverLayer(config) for _ in range(config.resampler_layers)])
        self.norm = nn.LayerNorm(width, eps=config.resampler_layer_norm_eps)

    def forward(self, media: torch.Tensor) -> torch.Tensor:
        """Map features ``[tiles, tokens, C]`` to visual tokens ``[tiles, latents, C]``."""
        latents = self.latents.expand(media.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, media)
        return self.norm(latents)
