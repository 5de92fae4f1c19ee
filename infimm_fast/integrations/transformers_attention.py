"""`subimage_attention` as an attention implementation of Transformers.

After `infimm_fast.register_auto()` any model with Transformers' attention interface takes
``attn_implementation="infimm_fast"``, or ``{"vision_config": "infimm_fast"}`` for its vision tower alone.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from infimm_fast.kernels import subimage_attention

NAME = "infimm_fast"

# Arguments that change the result and that our kernel does not know.
_FOREIGN = ("softcap", "position_bias", "s_aux", "cache", "head_mask")


def register_attention(name: str = NAME, backend: str = "auto") -> None:
    """Make Transformers know our attention under a name; called with the defaults by `infimm_fast.register_auto`.

    Args:
        name: what to pass as ``attn_implementation``; it must not contain "flash".
        backend: backend of `infimm_fast.kernels.subimage_attention`.
    """
    AttentionInterface.register(name, functools.partial(attention_forward, backend=backend))
    AttentionMaskInterface.register(name, attention_mask)


def attention_mask(*args: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> torch.Tensor | None:
    """Make the boolean mask of an attention; None means that every token sees every token.

    Transformers may also leave a causal mask out and rely on each module's ``is_causal``; that attribute is missing or
    wrong in several models, so that here a causal mask is always written out.
    """
    return sdpa_mask(*args, allow_is_causal_skip=False, **kwargs)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function, on our kernel where it can express the call and on SDPA elsewhere.

    Args:
        module: the attention module.
        query: ``[B, H, N, D]``, usually a view of ``[B, N, H, D]``, which is what the kernel reads.
        key: like `query`.
        value: like `query`.
        attention_mask: None, or a mask, which goes to SDPA.
        dropout: probability; anything but 0 goes to SDPA.
        scaling: of the scores; None for ``D ** -0.5``.
        is_causal: as passed by the model; the module's attribute of that name is not trusted.
        backend: see `register_attention`.
        **kwargs: what the model passes on; meant for other implementations.

    Returns:
        ``[B, N, H, D]`` and None in place of the weights.
    """
    obstacle = _obstacle(query, key, attention_mask, dropout, kwargs)
    if obstacle is not None:
        if not torch.compiler.is_compiling():
            _warn_once(obstacle)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, bool(is_causal), **kwargs)
    out = subimage_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scaling,
        is_causal=bool(is_causal),
        backend=backend,
    )
    assert isinstance(out, torch.Tensor)  # no log-sum-exp was asked for
    return out, None


def _obstacle(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> str | None:
    """Return why the kernel cannot take a call, or None."""
    if mask is not None:
        return "an attention mask"
    if query.shape != key.shape:
        return "queries and keys of different shapes (cross-attention, a cache or grouped heads)"
    if dropout:
        return "attention dropout"
    for name in _FOREIGN:
        if kwargs.get(name) is not None:
            return f"the argument {name}"
    return None


@functools.cache
def _warn_once(obstacle: str) -> None:
    warnings.warn(f"attention with {obstacle} runs on SDPA, not on infimm_fast's kernel", stacklevel=3)
