"""Our attention as an attention implementation of Transformers.

After `infimm_fast.register_auto()` any model with Transformers' attention interface takes
``attn_implementation="infimm_fast"``, or ``{"vision_config": "infimm_fast"}`` for its vision tower alone. Self-attention
without a mask, which is what vision towers have, runs on `subimage_attention`. Cross-attention whose mask shows each text
token one interval of keys, as in Idefics and Mllama, runs on `interval_attention`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from infimm_fast.integrations.interval_masks import pack_intervals, read_mask
from infimm_fast.kernels import KernelArgumentError, interval_attention, subimage_attention
from infimm_fast.kernels.common.launch import can_read, resolve_backend, triton_obstacle

NAME = "infimm_fast"

# Arguments that change the result and that our kernels do not know.
_FOREIGN = ("softcap", "position_bias", "s_aux", "cache", "head_mask")

# Attentions whose layer puts zeros over what tokens without any visible key receive.
_EMPTY_ROWS_ARE_DROPPED = ("IdeficsAttention",)


def register_attention(name: str = NAME, backend: str = "auto") -> None:
    """Make Transformers know our attention under a name; called with the defaults by `infimm_fast.register_auto`.

    Args:
        name: what to pass as ``attn_implementation``; it must not contain "flash".
        backend: backend of `infimm_fast.kernels.subimage_attention` and `interval_attention`. With one by name,
            cross-attention that the op cannot express raises instead of running on SDPA. Self-attention with a mask or
            a cache runs on SDPA all the same, since the text layers of a model share one name with its cross-attention.
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
    kv_range: torch.Tensor | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function, on our kernels where they can express the call and on SDPA elsewhere.

    A dense mask of cross-attention is turned into intervals once for each mask tensor, which makes the host wait for the
    device. Under `torch.compile`, `torch.export` and graph capture that is impossible, and SDPA takes the mask; there, pass
    the intervals along. Models hand keyword arguments that they do not know on to their attention::

        # Mllama: cross_attention_mask [B, T, images, tiles]; a tile has num_vision_tokens = 1601 keys.
        tiles = cross_attention_mask.bool().flatten(2)[:, None]
        tiles = tiles | ~tiles.any(-1, keepdim=True)  # Mllama shows everything to a token without a picture
        kv_range = intervals_of_mask(tiles) * num_vision_tokens
        model(**inputs, kv_range=kv_range)

        # Idefics: image_attention_mask [B, T, images]; a picture has image_seq_len keys.
        kv_range = intervals_of_mask(image_attention_mask.bool()[:, None]) * image_seq_len

    Args:
        module: the attention module. It is cross-attention if its ``is_cross_attention`` says so or, without that
            attribute, the name of its class.
        query: ``[B, Hq, T, D]``, usually a view of ``[B, T, Hq, D]``, which is what the kernels read.
        key: ``[B, Hkv, S, D]``.
        value: like `key`.
        attention_mask: None or a dense mask, see `interval_masks.intervals_of_mask`.
        dropout: probability; anything but 0 goes to SDPA.
        scaling: of the scores; None for ``D ** -0.5``.
        is_causal: as passed by the model; the module's attribute of that name is not trusted (Idefics' cross-attention
            says True).
        kv_range: int ``[B, T, 2]``, the half-open interval of the row's own keys that each token sees; in place of the mask
            of cross-attention, which is not looked at then. Self-attention ignores it.
        backend: see `register_attention`.
        **kwargs: what the model passes on; meant for other implementations.

    Returns:
        ``[B, T, Hq, D]`` and None in place of the weights.

    Raises:
        KernelArgumentError: cross-attention with `kv_range` or on a backend by name, and the op cannot express the call.
    """
    sdpa = functools.partial(sdpa_attention_forward, module, query, key, value, attention_mask, dropout, scaling)
    is_causal = bool(is_causal)
    obstacle = _obstacle(key, value, dropout, kwargs)
    if not _is_cross_attention(module):
        kv_range = None
        obstacle = obstacle or _self_attention_obstacle(query, key, attention_mask)
    elif kv_range is None and backend == "auto" and not _triton_runs(query):
        # The op would run on SDPA too, and would join the rows of the batch under one large mask first.
        return sdpa(is_causal, **kwargs)
    else:
        demand = f"backend={backend!r}" if kv_range is None else "kv_range"
        if obstacle is None and kv_range is None:
            kv_range, obstacle = _find_intervals(module, query, key, attention_mask, is_causal)
        if obstacle is not None and demand != "backend='auto'":
            raise KernelArgumentError(
                f"cross-attention with {obstacle} cannot serve {demand}; accepted is one interval of keys for each token, "
                "without dropout and without arguments that change the scores"
            )
    if obstacle is not None:
        if not torch.compiler.is_compiling():
            _warn_once(obstacle)
        return sdpa(is_causal, **kwargs)
    query, key, value = _autocast(query, key, value)
    if kv_range is not None:
        return batched_interval_attention(query, key, value, kv_range, scale=scaling, backend=backend), None
    out = subimage_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scaling,
        is_causal=is_causal,
        backend=backend,
    )
    return out, None


def batched_interval_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_range: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`interval_attention` on tensors in the layout of Transformers: each row has S keys of its own.

    Keys and values are packed without a copy if memory holds them as ``[B, S, Hkv, D]``, which is what projections write,
    or as ``[B, Hkv, S, D]``, which is what caches write (not on the SDPA backend), or if B is 1; else with one copy.

    Args:
        query: ``[B, Hq, T, D]``.
        key: ``[B, Hkv, S, D]``.
        value: like `key`.
        kv_range: int ``[B, T, 2]``, half-open, indices into the row's own keys; B and T may be 1 to broadcast.
        scale: of the scores; None for ``D ** -0.5``.
        backend: of `interval_attention`.

    Returns:
        ``[B, T, Hq, D]``.

    Raises:
        KernelArgumentError: the shapes do not fit together, or the op does not take the call.
    """
    (batch, _, length, _), (_, kv_heads, num_keys, _) = query.shape, key.shape
    if kv_range.dim() != 3 or kv_range.shape[0] not in (1, batch) or kv_range.shape[1] not in (1, length):
        raise KernelArgumentError(f"kv_range has shape {list(kv_range.shape)}; expected [B, T, 2] = [{batch}, {length}, 2]")
    # Where each head's keys lie apart, a head becomes a row. SDPA's mask would grow with the square of the rows.
    apart = batch > 1 and _heads_lie_apart(key) and _heads_lie_apart(value) and resolve_backend(backend, query) != "sdpa"
    split = kv_heads if apart else 1
    q, k, v = (x.unflatten(1, (split, -1)).transpose(2, 3).flatten(0, 1) for x in (query, key, value))
    kv_range = kv_range.expand(batch, length, 2).repeat_interleave(split, dim=0)
    out = interval_attention(
        q,  # [B * split, T, Hq / split, D]
        k.flatten(0, 1),  # [B * split * S, Hkv / split, D]
        v.flatten(0, 1),
        pack_intervals(kv_range, num_keys),
        scale=scale,
        backend=backend,
    )
    return out.unflatten(0, (batch, split)).transpose(1, 2).flatten(2, 3)


def _heads_lie_apart(x: torch.Tensor) -> bool:
    """Return whether ``x [B, H, S, D]`` is laid out in memory in that order."""
    return x.stride(0) == x.shape[1] * x.stride(1) and x.stride(1) == x.shape[2] * x.stride(2)


def _autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Cast as `torch.autocast` does for SDPA; norms of queries and keys leave them in another dtype than the values."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _is_cross_attention(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", "CrossAttention" in type(module).__name__))


def _triton_runs(query: torch.Tensor) -> bool:
    return resolve_backend("auto", query) == "triton" and triton_obstacle(query) is None


def _obstacle(key: torch.Tensor, value: torch.Tensor, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Return why no kernel can take a call, or None."""
    if dropout:
        return "attention dropout"
    if key.shape != value.shape:
        return "keys and values of different shapes"
    for name in _FOREIGN:
        if kwargs.get(name) is not None:
            return f"the argument {name}"
    return None


def _self_attention_obstacle(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    if mask is not None:
        return "an attention mask"
    if query.shape != key.shape:
        return "queries and keys of different shapes (a cache or grouped heads)"
    return None


def _find_intervals(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
) -> tuple[torch.Tensor | None, str | None]:
    """Return the interval of each token in cross-attention, or why there is none."""
    batch, length, num_keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        if is_causal:
            return None, "a causal mask"
        return torch.arange(2, device=query.device).mul(num_keys).view(1, 1, 2), None
    if mask.requires_grad:
        return None, "a learned mask"
    if not can_read(mask):
        return None, "a mask that cannot be read while compiling or capturing; pass kv_range"
    intervals = read_mask(mask)
    if intervals.kv_range is None or mask.shape[-1] != num_keys:
        return None, "a mask that is not one interval of keys for each token"
    if intervals.averages and type(module).__name__ not in _EMPTY_ROWS_ARE_DROPPED:
        return None, "tokens whose keys are all hidden by finite numbers"
    return intervals.kv_range.expand(batch, length, 2), None


@functools.cache
def _warn_once(obstacle: str) -> None:
    warnings.warn(f"attention with {obstacle} runs on SDPA, not on infimm_fast's kernel", stacklevel=3)
