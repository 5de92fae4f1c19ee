"""The launcher of the backward kernels; gradients are written through strides, into one packed tensor if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from infimm_fast.kernels.common.delta import DELTA_ROWS, Tiling, launch_delta
from infimm_fast.kernels.common.launch import (
    LaunchConfig,
    capability,
    common_alignment,
    device_guard,
    rows_are_wide,
    rows_contiguous,
    unit_strides,
)
from infimm_fast.kernels.subimage.backward_kernels import key_value_kernel, query_kernel
from infimm_fast.kernels.subimage.config import choose_config, tiling_of
from infimm_fast.kernels.subimage.options import Options, Saved
from infimm_fast.kernels.subimage.rotate import contiguous_tables, launch_rotate, rotated


def launch_backward(
    grad: torch.Tensor,
    saved: Saved,
    options: Options,
    gradients: tuple[torch.Tensor, ...],
    configs: Mapping[str, LaunchConfig] | None = None,
) -> None:
    """Fill the gradients.

    Args:
        grad: gradient of the output, ``[B, N, H, D]``, any strides.
        saved: of the forward.
        options: of the forward.
        gradients: dq, dk and dv, written; each ``[B, N, H, D]``, last axis contiguous, views of a packed gradient too.
        configs: override `choose_config`, by kernel: "backward_kv" for dk and dv, "backward_q" for dq.
    """
    q, k, v, out, lse = saved
    if q.numel() == 0:
        return
    batch, tokens, heads, head_dim = q.shape
    lengths, max_tokens = options.lengths, options.max_seqlen or tokens
    dq, dk, dv = gradients
    grad, q, k, v = (rows_contiguous(tensor) for tensor in (grad, q, k, v))
    options = contiguous_tables(options)
    q, k = rotated(q, options), rotated(k, options)
    if options.packed:
        # Rows outside every packed sequence belong to no program.
        for gradient in gradients:
            gradient.zero_()
    configs = configs or {}
    choose: dict[str, Any] = {"head_dim": head_dim, "dtype": q.dtype, "max_len": max_tokens, "capability": capability(q)}
    config_kv = configs.get("backward_kv") or choose_config("backward_kv", **choose, peel=lengths is None)
    config_q = configs.get("backward_q") or choose_config("backward_q", **choose, peel=lengths is None)
    align = common_alignment(q, k, v, grad, out, dq, dk, dv)
    largest = max(config_kv.block_m, config_kv.block_n, config_q.block_m, config_q.block_n, DELTA_ROWS)
    wide = rows_are_wide(largest, *(q, k, v, grad, out, dq, dk, dv))
    rows: dict[str, Any] = {"head_dim": head_dim, "align": align, "wide": wide}
    tiling_kv = tiling_of(config_kv, options, max_tokens, config_kv.block_m, **rows)
    tiling_q = tiling_of(config_q, options, max_tokens, config_q.block_n, **rows)
    sequences = options.sequences(batch)

    def grid(block: int, peel: int) -> tuple[int]:
        return ((triton.cdiv(max_tokens - peel, block) + peel) * heads * sequences,)

    with device_guard(q):
        of_delta = Tiling(head_dim, config_q.cover, align, wide, options.packed)
        delta = launch_delta(out, grad, of_delta, sequences=sequences, max_tokens=max_tokens, lengths=lengths)
        inputs = (q, k, v, grad, lse, delta, lengths, options.scale, tokens, max_tokens, heads)
        key_value_kernel[grid(config_kv.block_n, tiling_kv.PEEL)](
            *inputs, *unit_strides(align, q, k, v, grad, dk, dv), dk, dv, tiling_kv, **config_kv.options()
        )
        query_kernel[grid(config_q.block_m, tiling_q.PEEL)](
            *inputs, *unit_strides(align, q, k, v, grad, dq), dq, tiling_q, **config_q.options()
        )
    if options.rope_cos is not None:
        for x in (dq, dk):
            launch_rotate(x, options, out=x, transpose=True)
