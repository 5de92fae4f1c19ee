"""The backward kernels and their launcher: deterministic, without atomics.

``delta = sum(out * dout)`` for every query comes from sub-image attention's kernel. Then dq: one program for each tile
of rows, walking over its hull as the forward does; and dk and dv: one program for each block of keys and KV head,
walking over all batch rows. In each it first looks for the tokens whose intervals touch its keys; between the first and
the last of them it adds every tile, so that a batch row which does not touch the block costs a look at its intervals
only. Both recompute the probabilities from the log-sum-exp. Rows that see nothing are read as zeros, and with a
log-sum-exp of +inf.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from infimm_fast.kernels.common.delta import Tiling, launch_delta
from infimm_fast.kernels.common.launch import (
    LaunchConfig,
    capability,
    common_alignment,
    device_guard,
    rows_are_wide,
    rows_contiguous,
    unit_strides,
)
from infimm_fast.kernels.common.tiles import (
    LOG2_E,
    UNSPECIALISED,
    add_product,
    block_at,
    head_start,
    load_block,
    load_rows,
    load_statistics,
    load_tile,
    row_offsets,
    scale_tile,
    scores_of,
    store_rows,
    store_tile,
    walk,
    zero_tile,
)
from infimm_fast.kernels.interval.config import choose_config, tiling_of
from infimm_fast.kernels.interval.options import Options, Saved
from infimm_fast.kernels.interval.tiles import (
    hull_of,
    load_intervals,
    query_offsets,
    row_index,
    sees,
)

# Tokens whose intervals the dk and dv kernel looks at in one step.
SCAN_TOKENS = 256


@triton.jit
def add_keys(dq, q, grad, lse, delta, keys, values, start, count, first_key, last_key, scale_log2, T: tl.constexpr):
    """Add the share of BLOCK_N keys to dq."""
    k = load_block(keys, last_key - first_key, T, True)  # [BLOCK_N, D]
    v = load_block(values, last_key - first_key, T, True)
    key = first_key + tl.arange(0, T.BLOCK_N)
    # The exponential of a key that is not seen may overflow: drop it before it meets a product.
    p = tl.exp2(scores_of(q, k) * scale_log2 - lse[:, None])  # [BLOCK_M, BLOCK_N]
    p = tl.where(sees(key[None, :], start[:, None], count[:, None]), p, 0.0)
    ds = p * (scores_of(grad, v) - delta[:, None])
    return add_product(dq, ds, k)


@triton.jit(do_not_specialize=UNSPECIALISED)
def query_kernel(
    q_ptr, k_ptr, v_ptr, range_ptr, grad_ptr, lse_ptr, delta_ptr, scale, num_batches, num_tokens, num_kv_heads, num_keys,
    stride_qb, stride_qn, stride_qh, stride_gb, stride_gn, stride_gh, stride_kn, stride_kh, stride_vn, stride_vh, stride_rb,
    stride_rt, stride_re,
    dq_ptr, T: tl.constexpr,
):  # fmt: skip
    """Compute dq, contiguous, of BLOCK_M rows of one KV head."""
    num_rows = num_tokens * T.GROUP
    num_heads = num_kv_heads * T.GROUP
    num_tiles = tl.cdiv(num_rows, T.BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    kv_head = tl.program_id(0) // num_tiles % num_kv_heads
    batch = tl.program_id(0) // num_tiles // num_kv_heads
    zero = batch * 0

    token, member, inside = row_index(tile * T.BLOCK_M, num_rows, T.BLOCK_M, T.GROUP)
    start, count = load_intervals(range_ptr, batch, token, inside, num_keys, stride_rb, stride_rt, stride_re)
    low, high = hull_of(start, count, num_keys)
    q_ptr = head_start(q_ptr, batch, kv_head * T.GROUP, zero, stride_qb, stride_qn, stride_qh, T.ALIGN)
    grad_ptr = head_start(grad_ptr, batch, kv_head * T.GROUP, zero, stride_gb, stride_gn, stride_gh, T.ALIGN)
    q = load_rows(q_ptr, query_offsets(token, member, stride_qn, stride_qh, T.ALIGN, T.WIDE), count > 0, T)
    grad = load_rows(grad_ptr, query_offsets(token, member, stride_gn, stride_gh, T.ALIGN, T.WIDE), count > 0, T)
    statistics = (batch.to(tl.int64) * num_heads + kv_head * T.GROUP) * num_tokens
    index = member * num_tokens + token
    lse, delta = load_statistics(lse_ptr + statistics, delta_ptr + statistics, index, count > 0)

    keys, values = walk(
        k_ptr, v_ptr, zero, kv_head, zero, 0, stride_kn, stride_kh, stride_yb=0, stride_yn=stride_vn,
        stride_yh=stride_vh, ROWS=T.BLOCK_N, T=T,
    )  # fmt: skip
    dq = zero_tile(T.BLOCK_M, T)
    for first_key in range(low, high, T.BLOCK_N):
        dq = add_keys(
            dq, q, grad, lse, delta, block_at(keys, first_key), block_at(values, first_key), start, count=count,
            first_key=first_key, last_key=high, scale_log2=scale * LOG2_E, T=T,
        )  # fmt: skip
    dq_ptr += (batch.to(tl.int64) * num_tokens * num_heads + kv_head * T.GROUP) * T.D
    dq = scale_tile(dq, scale)
    store_rows(dq_ptr, dq, query_offsets(token, member, num_heads * T.D, T.D, 1, T.WIDE), inside, T)


@triton.jit
def touching_tokens(
    range_ptr, batch, first_key, last_key, num_tokens, num_keys, stride_rb, stride_rt, stride_re, SCAN: tl.constexpr
):
    """Return the smallest range of tokens that holds all whose intervals touch ``[first_key, last_key)``."""
    first = num_tokens
    last = num_tokens * 0
    for scanned in range(0, num_tokens, SCAN):
        token = scanned + tl.arange(0, SCAN)
        start, count = load_intervals(range_ptr, batch, token, token < num_tokens, num_keys, stride_rb, stride_rt, stride_re)
        touches = (count > 0) & (start < last_key) & (start + count > first_key)
        first = tl.minimum(first, tl.min(tl.where(touches, token, num_tokens), axis=0))
        last = tl.maximum(last, tl.max(tl.where(touches, token + 1, 0), axis=0))
    return first, last


@triton.jit
def add_rows(
    dk, dv, k, v, q_ptr, grad_ptr, range_ptr, lse_ptr, delta_ptr, batch, key, first_row, num_tokens, num_keys, scale_log2,
    stride_qn, stride_qh, stride_gn, stride_gh, stride_rb, stride_rt, stride_re,
    T: tl.constexpr,
):  # fmt: skip
    """Add the share of BLOCK_M rows to dk and dv; everything is transposed, ``[keys, rows]``."""
    token, member, inside = row_index(first_row, num_tokens * T.GROUP, T.BLOCK_M, T.GROUP)
    start, count = load_intervals(range_ptr, batch, token, inside, num_keys, stride_rb, stride_rt, stride_re)
    q = load_rows(q_ptr, query_offsets(token, member, stride_qn, stride_qh, T.ALIGN, T.WIDE), count > 0, T)
    lse, delta = load_statistics(lse_ptr, delta_ptr, member * num_tokens + token, count > 0)
    p = tl.exp2(scores_of(k, q) * scale_log2 - lse[None, :])  # [BLOCK_N, BLOCK_M]
    p = tl.where(sees(key[:, None], start[None, :], count[None, :]), p, 0.0)
    grad = load_rows(grad_ptr, query_offsets(token, member, stride_gn, stride_gh, T.ALIGN, T.WIDE), count > 0, T)
    dv = add_product(dv, p, grad)
    ds = p * (scores_of(v, grad) - delta[None, :])
    return add_product(dk, ds, q), dv


@triton.jit(do_not_specialize=UNSPECIALISED)
def key_value_kernel(
    q_ptr, k_ptr, v_ptr, range_ptr, grad_ptr, lse_ptr, delta_ptr, scale, num_batches, num_tokens, num_kv_heads, num_keys,
    stride_qb, stride_qn, stride_qh, stride_gb, stride_gn, stride_gh, stride_kn, stride_kh, stride_vn, stride_vh, stride_rb,
    stride_rt, stride_re,
    dk_ptr, dv_ptr, T: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv, contiguous, of BLOCK_N keys of one KV head."""
    # Heads are neighbours: they read the same intervals.
    kv_head = tl.program_id(0) % num_kv_heads
    block = tl.program_id(0) // num_kv_heads
    zero = block * 0
    first_key = block * T.BLOCK_N
    last_key = tl.minimum(first_key + T.BLOCK_N, num_keys)
    keys_left = num_keys - first_key
    key = first_key + tl.arange(0, T.BLOCK_N)
    num_heads = num_kv_heads * T.GROUP
    k_ptr = head_start(k_ptr, zero, kv_head, first_key, 0, stride_kn, stride_kh, T.ALIGN)
    v_ptr = head_start(v_ptr, zero, kv_head, first_key, 0, stride_vn, stride_vh, T.ALIGN)
    k = load_tile(k_ptr, row_offsets(T.BLOCK_N, stride_kn, T.ALIGN, T.WIDE), keys_left, T, True)  # [BLOCK_N, D]
    v = load_tile(v_ptr, row_offsets(T.BLOCK_N, stride_vn, T.ALIGN, T.WIDE), keys_left, T, True)
    dk = zero_tile(T.BLOCK_N, T)
    dv = zero_tile(T.BLOCK_N, T)
    for batch_index in range(0, num_batches):
        batch = zero + batch_index
        first, last = touching_tokens(
            range_ptr, batch, first_key, last_key, num_tokens, num_keys, stride_rb, stride_rt, stride_re=stride_re,
            SCAN=SCAN,
        )  # fmt: skip
        row_q = head_start(q_ptr, batch, kv_head * T.GROUP, zero, stride_qb, stride_qn, stride_qh, T.ALIGN)
        row_grad = head_start(grad_ptr, batch, kv_head * T.GROUP, zero, stride_gb, stride_gn, stride_gh, T.ALIGN)
        statistics = (batch.to(tl.int64) * num_heads + kv_head * T.GROUP) * num_tokens
        for first_row in range(first * T.GROUP, last * T.GROUP, T.BLOCK_M):
            dk, dv = add_rows(
                dk, dv, k, v, row_q, row_grad, range_ptr, lse_ptr + statistics, delta_ptr=delta_ptr + statistics,
                batch=batch, key=key, first_row=first_row, num_tokens=num_tokens, num_keys=num_keys,
                scale_log2=scale * LOG2_E, stride_qn=stride_qn, stride_qh=stride_qh, stride_gn=stride_gn,
                stride_gh=stride_gh, stride_rb=stride_rb, stride_rt=stride_rt, stride_re=stride_re, T=T,
            )  # fmt: skip
    dk_ptr = head_start(dk_ptr, zero, kv_head, first_key, 0, num_kv_heads * T.D, T.D, 1)
    dv_ptr = head_start(dv_ptr, zero, kv_head, first_key, 0, num_kv_heads * T.D, T.D, 1)
    o_out = row_offsets(T.BLOCK_N, num_kv_heads * T.D, 1, T.WIDE)
    store_tile(dk_ptr, scale_tile(dk, scale), o_out, keys_left, keys_left, T)
    store_tile(dv_ptr, dv, o_out, keys_left, keys_left, T)


def launch_backward(
    grad: torch.Tensor,
    saved: Saved,
    options: Options,
    gradients: tuple[torch.Tensor, ...],
    configs: Mapping[str, LaunchConfig] | None = None,
) -> None:
    """Fill the gradients.

    Args:
        grad: gradient of the output, ``[B, T, Hq, D]``, any strides.
        saved: of the forward.
        options: of the forward.
        gradients: dq ``[B, T, Hq, D]``, dk and dv ``[S, Hkv, D]``, written; contiguous.
        configs: override `choose_config`, by kernel: "backward_kv" for dk and dv, "backward_q" for dq.
    """
    q, k, v, kv_range, out, lse = saved
    grad, q, k, v = (rows_contiguous(x) for x in (grad, q, k[None], v[None]))
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    dq, dk, dv = gradients
    if q.numel() == 0:
        dk.zero_()
        dv.zero_()
        return
    group = heads // kv_heads
    configs = configs or {}
    choose: dict[str, Any] = {"head_dim": head_dim, "dtype": q.dtype, "rows": tokens * group}
    config_kv = configs.get("backward_kv") or choose_config("backward_kv", **choose, capability=capability(q))
    config_q = configs.get("backward_q") or choose_config("backward_q", **choose, capability=capability(q))
    align = common_alignment(q, k, v, grad, out)
    wide = rows_are_wide(tokens, q, grad, out) or rows_are_wide(max(config_kv.block_n, config_q.block_n), k, v)

    tiling = partial(tiling_of, head_dim=head_dim, group=group, align=align, wide=wide)
    key_strides = [*unit_strides(align, k)[1:], *unit_strides(align, v)[1:]]
    with device_guard(q):
        of_delta = Tiling(head_dim, config_q.cover, align, wide)
        delta = launch_delta(out, grad, of_delta, sequences=batch, max_tokens=tokens)
        inputs: tuple[Any, ...] = (q, k, v, kv_range, grad, lse, delta, options.scale, batch, tokens, kv_heads, keys)
        inputs += (*unit_strides(align, q, grad), *key_strides, *kv_range.stride())
        query_kernel[(triton.cdiv(tokens * group, config_q.block_m) * kv_heads * batch,)](
            *inputs, dq, tiling(config_q), **config_q.options()
        )
        if keys:
            key_value_kernel[(triton.cdiv(keys, config_kv.block_n) * kv_heads,)](
                *inputs, dk, dv, tiling(config_kv), SCAN=SCAN_TOKENS, **config_kv.options()
            )
