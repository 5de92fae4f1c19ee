"""The gated cross-attention block, and how a Transformers decoder takes it in."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels import interval_attention
from infimm_fast.models.infimm_hd.visual_context import KeyValue, VisualContext


class VisualCrossAttention(nn.Module):
    """LayerNorm, queries from text, keys and values from packed visual tokens, output projection; no biases."""

    def __init__(self, hidden_size: int, visual_size: int, num_heads: int, head_dim: int, layer_norm_eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.backend = "sdpa"
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.kv_proj = nn.Linear(visual_size, 2 * num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def project_visual(self, features: torch.Tensor) -> KeyValue:
        """Return keys and values ``[S, heads, head_dim]`` of packed visual tokens ``[S, visual_size]``."""
        keys, values = self.kv_proj(features).view(-1, 2, self.num_heads, self.head_dim).unbind(1)
        return keys, values

    def forward(self, x: torch.Tensor, kv_range: torch.Tensor, features: torch.Tensor, key_value: KeyValue | None):
        """Map text states ``[B, T, C]`` to the attention's output ``[B, T, C]``, before gate and residual."""
        if key_value is None or self.backend == "reference":
            key_value = self.project_visual(features)
        q = self.q_proj(self.norm(x)).unflatten(-1, (self.num_heads, self.head_dim))  # [B, T, H, D]
        out = interval_attention(q, *key_value, kv_range, backend=self.backend)
        return self.o_proj(out.flatten(2))


def project_visual_at_once(attentions: Sequence[VisualCrossAttention], features: torch.Tensor) -> tuple[KeyValue, ...]:
    """Return keys and values of all blocks from one matrix product; they are views with a long token stride.

    Args:
        attentions: the blocks' attentions.
        features: packed visual tokens ``[S, visual_size]``.

    Returns:
        For each block, keys and values ``[S, heads, head_dim]``.
    """
    projections = [attention.kv_proj for attention in attentions]
    if any(type(linear) is not nn.Linear or hasattr(linear, "_hf_hook") for linear in projections):
        # Quantised and adapted projections have no plain weight to join, and those that a hook of accelerate brings in are
        # on the meta device until they are called.
        return tuple(attention.project_visual(features) for attention in attentions)
    projected = F.linear(features, torch.cat([linear.weight for linear in projections]))
    shape = (len(attentions), 2, attentions[0].num_heads, attentions[0].head_dim)
    blocks = projected.unflatten(1, shape).unbind(1)  # each [S, 2, heads, head_dim]
    return tuple((block[:, 0], block[:, 1]) for block in blocks)


class GatedFeedForward(nn.Module):
    """LayerNorm and two layers with the exact (erf) GELU between them; no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, layer_norm_eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, T, C]`` to the same shape, before gate and residual."""
        return self.transform(self.norm(x))

    def transform(self, normed: torch.Tensor) -> torch.Tensor:
        """Map the LayerNorm's output to the feed-forward's."""
        return self.down_proj(F.gelu(self.up_proj(normed)))


class GatedCrossAttentionBlock(nn.Module):
    """``x + tanh(g_a) * cross_attention(x)``, then ``x + tanh(g_f) * feed_forward(x)``.

    Args:
        hidden_size: width of the text states.
        visual_size: width of the visual tokens.
        num_heads: attention heads.
        head_dim: width of a head.
        ff_mult: hidden width of the feed-forward over `hidden_size`.
        gate: "vector" for a gate for each channel, "scalar" for one.
        layer_norm_eps: epsilon of both LayerNorms.

    Source: Flamingo (arXiv 2204.14198, section 3.1.2); InfiMM-HD (arXiv 2403.01487, section 3).
    """

    def __init__(
        self,
        hidden_size: int,
        visual_size: int,
        num_heads: int = 12,
        head_dim: int = 64,
        ff_mult: float = 1.0,
        gate: str = "vector",
        layer_norm_eps: float = 1e-5,
    ):
        super().__init__()
        gate_size = hidden_size if gate == "vector" else 1
        self.attn = VisualCrossAttention(hidden_size, visual_size, num_heads, head_dim, layer_norm_eps)
        self.attn_gate = nn.Parameter(torch.zeros(gate_size))
        self.ff = GatedFeedForward(hidden_size, int(hidden_size * ff_mult), layer_norm_eps)
        self.ff_gate = nn.Parameter(torch.zeros(gate_size))

    def forward(
        self,
        x: torch.Tensor,
        kv_range: torch.Tensor,
        has_image: torch.Tensor,
        features: torch.Tensor,
        key_value: KeyValue | None = None,
    ) -> torch.Tensor:
        """Mix visual tokens into text states.

        Args:
            x: text states ``[B, T, hidden_size]``.
            kv_range: int ``[B, T, 2]``, the half-open interval of visual tokens of each text token.
            has_image: bool ``[B]``; a row without any picture passes unchanged, feed-forward included.
            features: packed visual tokens ``[S, visual_size]``.
            key_value: their keys and values from ``attn.project_visual``, to save projecting them here.

        Returns:
            ``[B, T, hidden_size]``.
        """
        keep = has_image[:, None, None].to(x.dtype)
        x = x + keep * self.attn_gate.tanh() * self.attn(x, kv_range, features, key_value)
        return x + keep * self.ff_gate.tanh() * self.ff(x)


@dataclass(frozen=True)
class CrossAttentionInputs:
    """What the gated blocks of one forward pass share; travels to them as a keyword argument of the decoder layers.

    Attributes:
        context: the encoded pictures.
        kv_range: ``[B, T, 2]``.
        has_image: bool ``[B]``.
    """

    context: VisualContext
    kv_range: torch.Tensor
    has_image: torch.Tensor

    def apply(self, block: GatedCrossAttentionBlock, index: int, x: torch.Tensor) -> torch.Tensor:
        """Run the `index`-th gated block on ``x [B, T, C]``."""
        key_value = self.context.key_values[index] if self.context.key_values is not None else None
        return block(x, self.kv_range, self.has_image, self.context.features, key_value)


@functools.cache
def _gated_layer_class(layer_class: Any) -> Any:
    """Return `layer_class` with a gated block in front; weights and hooks of the original stay as they are."""

    class GatedLayer(layer_class):
        def forward(
            self,
            hidden_states: torch.Tensor,
            *args: Any,
            cross_attention: CrossAttentionInputs | None = None,
            **kwargs: Any,
        ) -> Any:
            if cross_attention is not None and self.gated_cross_attention is not None:
                hidden_states = cross_attention.apply(
                    self.gated_cross_attention, self.gated_cross_attention_index, hidden_states
                )
            return super().forward(hidden_states, *args, **kwargs)

    GatedLayer.__name__ = GatedLayer.__qualname__ = f"Gated{layer_class.__name__}"
    return GatedLayer


def insert_gated_cross_attention(decoder: nn.Module, blocks: dict[int, GatedCrossAttentionBlock]) -> None:
    """Put gated blocks before some layers of a Transformers decoder, in place.

    The decoder then takes ``cross_attention=CrossAttentionInputs(...)`` beside its usual arguments. Its own parameters
    keep their names; a block becomes ``layers.<n>.gated_cross_attention``.

    Args:
        decoder: a decoder with a plain ``layers`` list that passes unknown keyword arguments on to its layers
            (``LlamaModel``, ``MistralModel``, ``Qwen2Model``, ...).
        blocks: 0-based layer index -> block.

    Raises:
        ConfigurationError: there is no such list.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigurationError(
            f"{type(decoder).__name__} has no plain list of layers; accepted are decoders with a ModuleList named layers"
        )
    order = sorted(blocks)
    layer: Any
    for index, layer in enumerate(layers):
        layer.__class__ = _gated_layer_class(type(layer))  # type: ignore[arg-type]
        layer.gated_cross_attention = blocks.get(index)
        layer.gated_cross_attention_index = order.index(index) if index in blocks else None
