"""The launcher of the backward kernels; gradients are written through strides, into one packed tensor if asked."""

from __future__ import annotations

from typing import Any

import torch
import triton

from infimm_fast.kernels.common.delta import DELTA_ROWS, delta_kernel
from infimm_fast.kernels.common.launch import (
    LaunchConfig,
    capability,
    common_alignment,
    device_guard,
    head_strides,
    rows_are_wide,
    rows_contiguous,
)
from infimm_fast.kernels.subimage.backward_kernels import key_value_kernel, query_kernel
from infimm_fast.kernels.subimage.config import choose_config
from infimm_fast.kernels.subimage.rotate import launch_rotate


def launch_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    rope_cos: torch.Tensor | None,
    rope_sin: torch.Tensor | None,
    rope_prefix: int,
    rope_interleaved: bool,
    lengths: torch.Tensor | None,
    packed: bool,
    max_tokens: int,
    is_causal: bool,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    config_kv: LaunchConfig | None = None,
    config_q: LaunchConfig | None = None,
) -> None:
    """Fill dq, dk and dv.

    Args:
        grad: gradient of the output, ``[B, N, H, D]``, any strides.
        q: as given to the forward, and so are `k`, `v` and the arguments from `scale` to `is_causal`.
        k: see `q`.
        v: see `q`.
        out: the forward's output.
        lse: the forward's log-sum-exp, fp32 ``[B, H, N]``.
        scale: see `launch_forward`, like all arguments up to `is_causal`.
        rope_cos: see `launch_forward`.
        rope_sin: see `launch_forward`.
        rope_prefix: see `launch_forward`.
        rope_interleaved: see `launch_forward`.
        lengths: see `launch_forward`.
        packed: see `launch_forward`.
        max_tokens: see `launch_forward`.
        is_causal: see `launch_forward`.
        dq: written, ``[B, N, H, D]``, last axis contiguous; may be a view of a packed gradient.
        dk: like `dq`.
        dv: like `dq`.
        config_kv: overrides `choose_config` for dk and dv.
        config_q: overrides `choose_config` for dq.
    """
    if q.numel() == 0:
        return
    batch, tokens, heads, head_dim = q.shape
    grad, q, k, v = (rows_contiguous(tensor) for tensor in (grad, q, k, v))
    if rope_cos is not None and rope_sin is not None:
        rope_cos, rope_sin = rope_cos.contiguous(), rope_sin.contiguous()
        q, k = (_rotated(x, rope_cos, rope_sin, rope_prefix, rope_interleaved) for x in (q, k))
    if packed:
        # Rows outside every packed sequence belong to no program.
        for gradient in (dq, dk, dv):
            gradient.zero_()
    delta = torch.empty_like(lse)
    choose: dict[str, Any] = {"head_dim": head_dim, "dtype": q.dtype, "max_len": max_tokens, "capability": capability(q)}
    config_kv = config_kv or choose_config("backward_kv", **choose, peel=lengths is None)
    config_q = config_q or choose_config("backward_q", **choose, peel=lengths is None)
    sequences = lengths.shape[0] - 1 if packed and lengths is not None else batch
    align = common_alignment(q, k, v, grad, out, dq, dk, dv)
    largest = max(config_kv.block_m, config_kv.block_n, config_q.block_m, config_q.block_n, DELTA_ROWS)
    shared: dict[str, Any] = {
        "D": head_dim,
        "ALIGN": align,
        "WIDE": rows_are_wide(largest, q, k, v, grad, out, dq, dk, dv),
        "PACKED": packed,
    }

    def strides(*tensors: torch.Tensor) -> list[int]:
        return [stride // align for tensor in tensors for stride in head_strides(tensor)]

    def grid(block: int, peel: bool) -> tuple[int]:
        return ((triton.cdiv(max_tokens - peel, block) + peel) * heads * sequences,)

    def masked(block: int, peel: bool) -> bool:
        return is_causal or lengths is not None or (max_tokens - peel) % block != 0

    sizes = (tokens, max_tokens, heads)
    with device_guard(q):
        delta_kernel[grid(DELTA_ROWS, False)](
            out,
            grad,
            lengths,
            *sizes,
            *strides(out, grad),
            delta,
            COVER=config_q.cover,
            BLOCK_M=DELTA_ROWS,
            num_warps=4,
            **shared,
        )
        inputs = (q, k, v, grad, lse, delta, lengths, scale, *sizes)
        key_value_kernel[grid(config_kv.block_n, config_kv.peel)](
            *inputs,
            *strides(q, k, v, grad, dk, dv),
            dk,
            dv,
            MASKED=masked(config_kv.block_m, config_kv.peel),
            **_constants(config_kv, is_causal),
            **shared,
        )
        query_kernel[grid(config_q.block_m, config_q.peel)](
            *inputs,
            *strides(q, k, v, grad, dq),
            dq,
            MASKED=masked(config_q.block_n, config_q.peel),
            **_constants(config_q, is_causal),
            **shared,
        )
    if rope_cos is not None and rope_sin is not None:
        for x in (dq, dk):
            launch_rotate(x, rope_cos, rope_sin, rope_prefix, rope_interleaved, out=x, transpose=True)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, prefix: int, interleaved: bool) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_rotate(x, cos, sin, prefix, interleaved, out=out)
    return out


def _constants(config: LaunchConfig, is_causal: bool) -> dict[str, Any]:
    return {
        "COVER": config.cover,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PEEL": int(config.peel),
        "CAUSAL": is_causal,
        **config.options(),
    }
