"""The contiguous entries with their constants, out of the tables that also serve the launchers.

TensorRT plugins and AOTInductor packages are made of them.
"""

from __future__ import annotations

from typing import Any

import torch

from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.common.offline import TYPE_NAMES, KernelSource
from infimm_fast.kernels.interval.config import DECODE_TOKENS
from infimm_fast.kernels.interval.config import choose_config as choose_cross_config
from infimm_fast.kernels.subimage.config import choose_config as choose_subimage_config

# Rows of queries that stand for their bucket in `choose_cross_config`: a step of decoding, a short prompt, a prompt.
CROSS_ROWS = {"decode": 1, "short": 64, "prompt": 512}
# Any length: no token is peeled off, and the last block of keys is masked.
ANY_LENGTH = 4096


def subimage_config(head_dim: int, dtype: torch.dtype, tokens: int | None, sm: int) -> tuple[LaunchConfig, bool]:
    """Return the configuration for tiles of `tokens` tokens (None: any number), and whether keys are masked."""
    config = choose_subimage_config("forward", head_dim, dtype, tokens or ANY_LENGTH, sm, peel=tokens is not None)
    return config, tokens is None or (tokens - config.peel) % config.block_n != 0


def subimage_source(
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    tokens: int | None,
    sm: int,
    scale: float,
    packed: bool,
    causal: bool = False,
) -> KernelSource:
    """Return the contiguous entry of sub-image attention.

    Its grid has ``(cdiv(N - PEEL, BLOCK_M) + PEEL) * H * B`` programs.

    Args:
        heads: H.
        head_dim: D, a multiple of 8 up to 128.
        dtype: float16, bfloat16 or float32.
        tokens: N where it is known, None for any.
        sm: compute capability, 90 for a Hopper.
        scale: multiplies the scores.
        packed: one tensor ``[B, N, 3, H, D]`` in place of three ``[B, N, H, D]``.
        causal: a token sees no later token of its tile.
    """
    from infimm_fast.export.to_kernels.subimage_entries import subimage_attention_entry, subimage_attention_packed_entry

    config, masked = subimage_config(head_dim, dtype, tokens, sm)
    inputs = ("qkv_ptr",) if packed else ("q_ptr", "k_ptr", "v_ptr")
    kernel = subimage_attention_packed_entry if packed else subimage_attention_entry
    name = f"*{TYPE_NAMES[dtype]}"
    constants = {
        "H": heads,
        "SCALE": scale,
        **tile_constants(config, head_dim),
        "PEEL": int(config.peel),
        "MASKED": masked or causal,
        "CAUSAL": causal,
    }
    return _source(kernel, dict.fromkeys(inputs, name) | {"num_tokens": "i32", "out_ptr": name}, constants, config)


def cross_attention_source(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    index: torch.dtype,
    sm: int,
    scale: float,
    rows: int = CROSS_ROWS["prompt"],
) -> KernelSource:
    """Return the contiguous entry of gated cross-attention; keys are not split over programs.

    Its grid has ``cdiv(T * GROUP, BLOCK_M) * Hkv * B`` programs.

    Args:
        heads: Hq.
        kv_heads: Hkv.
        head_dim: D, a multiple of 8 up to 128.
        dtype: float16, bfloat16 or float32.
        index: of ``kv_range``, int32 or int64.
        sm: compute capability, 90 for a Hopper.
        scale: multiplies the scores.
        rows: queries that read one KV head in one batch row; only its bucket decides.
    """
    from infimm_fast.export.to_kernels.interval_entries import interval_attention_entry

    config = choose_cross_config("decode" if rows <= DECODE_TOKENS else "forward", head_dim, dtype, rows, sm)
    name = f"*{TYPE_NAMES[dtype]}"
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), name) | {"range_ptr": f"*{TYPE_NAMES[index]}"}
    signature |= {"num_tokens": "i32", "num_keys": "i32", "out_ptr": name}
    constants = {"H": heads, "SCALE": scale, **tile_constants(config, head_dim), "GROUP": heads // kv_heads}
    return _source(interval_attention_entry, signature, constants, config)


def tile_constants(config: LaunchConfig, head_dim: int) -> dict[str, Any]:
    """Return the constants that every attention kernel takes."""
    return {"D": head_dim, "COVER": config.cover, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}


def _source(kernel: Any, signature: dict[str, str], constants: dict[str, Any], config: LaunchConfig) -> KernelSource:
    aligned = frozenset(name for name, kind in signature.items() if kind.startswith("*"))
    signature = signature | dict.fromkeys(constants, "constexpr")
    return KernelSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, aligned, config.options())
