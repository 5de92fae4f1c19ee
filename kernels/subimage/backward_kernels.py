"""The backward kernels: deterministic, without atomics.

Two kernels: dk and dv, one program for each block of keys walking over the queries; dq, one program for each block of
queries walking over the keys. Both recompute the probabilities from the log-sum-exp. PEEL is the forward's: accumulators
start from the first token's share, and the first key (or query) is a program of its own without tensor cores. Padded
queries are read as zeros and with a log-sum-exp of +inf, so their probabilities vanish.
"""

from __future__ import annotations

import triton
import triton.language as tl

from infimm_fast.kernels.common.tiles import (
    LOG2_E,
    UNSPECIALISED,
    add_product,
    add_weighted_rows,
    head_start,
    load_tile,
    locate,
    outer_product,
    row_offsets,
    row_products,
    scale_tile,
    scores_of,
    store_tile,
    zero_tile,
)


@triton.jit
def load_statistics(lse_ptr, delta_ptr, start, length, ROWS: tl.constexpr):
    """Return base-2 log-sum-exp and delta, each ``[ROWS]``; +inf and 0 past `length`."""
    index = start + tl.arange(0, ROWS)
    inside = index < length
    lse = tl.load(lse_ptr + index, mask=inside, other=float("inf"))
    return lse * LOG2_E, tl.load(delta_ptr + index, mask=inside, other=0.0)


@triton.jit
def add_queries(
    dk, dv, k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, o_query, o_grad, key_index, start, length, scale_log2,
    T: tl.constexpr,
):  # fmt: skip
    """Add the share of BLOCK_M queries to dk and dv; everything is transposed, ``[keys, queries]``."""
    q = load_tile(q_ptr, o_query, length - start, T, T.MASKED)  # [BLOCK_M, D]
    lse, delta = load_statistics(lse_ptr, delta_ptr, start, length, T.BLOCK_M)
    p = tl.exp2(scores_of(k, q) * scale_log2 - lse[None, :])  # [BLOCK_N, BLOCK_M]
    if T.CAUSAL:
        p = tl.where(key_index[:, None] <= start + tl.arange(0, T.BLOCK_M)[None, :], p, 0.0)
    grad = load_tile(grad_ptr, o_grad, length - start, T, T.MASKED)
    dv = add_product(dv, p, grad)
    ds = p * (scores_of(v, grad) - delta[None, :])
    return add_product(dk, ds, q), dv


@triton.jit(do_not_specialize=UNSPECIALISED)
def key_value_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, lengths_ptr, scale, num_tokens, max_tokens, num_heads,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_gb, stride_gn,
    stride_gh, stride_xb, stride_xn, stride_xh, stride_yb, stride_yn, stride_yh,
    dk_ptr, dv_ptr, T: tl.constexpr,
):  # fmt: skip
    """Compute dk (strides x) and dv (strides y) of BLOCK_N keys; with PEEL, block 0 is the first key alone."""
    num_blocks = tl.cdiv(max_tokens - T.PEEL, T.BLOCK_N) + T.PEEL
    block, batch, head, first, length, stored = locate(
        tl.program_id(0), num_blocks, num_heads, num_tokens, lengths_ptr, T.PACKED
    )
    statistics = (batch.to(tl.int64) * num_heads + head) * num_tokens + first
    lse_ptr += statistics
    delta_ptr += statistics
    q_ptr = head_start(q_ptr, batch, head, first, stride_qb, stride_qn, stride_qh, T.ALIGN)
    grad_ptr = head_start(grad_ptr, batch, head, first, stride_gb, stride_gn, stride_gh, T.ALIGN)
    step_q = stride_qn.to(tl.int64) * T.ALIGN
    step_g = stride_gn.to(tl.int64) * T.ALIGN
    o_query = row_offsets(T.BLOCK_M, stride_qn, T.ALIGN, T.WIDE)  # [BLOCK_M, 1]
    o_grad = row_offsets(T.BLOCK_M, stride_gn, T.ALIGN, T.WIDE)
    scale_log2 = scale * LOG2_E

    if T.PEEL and block == 0:
        k_ptr = head_start(k_ptr, batch, head, first, stride_kb, stride_kn, stride_kh, T.ALIGN)
        v_ptr = head_start(v_ptr, batch, head, first, stride_vb, stride_vn, stride_vh, T.ALIGN)
        k_one = load_tile(k_ptr, row_offsets(1, stride_kn, T.ALIGN, T.WIDE), length, T, True)  # [1, D]
        v_one = load_tile(v_ptr, row_offsets(1, stride_vn, T.ALIGN, T.WIDE), length, T, True)
        dk_one = zero_tile(1, T)
        dv_one = zero_tile(1, T)
        for start in range(0, length, T.BLOCK_M):
            q_some = load_tile(q_ptr + start * step_q, o_query, length - start, T, True)
            grad_some = load_tile(grad_ptr + start * step_g, o_grad, length - start, T, True)
            lse, delta = load_statistics(lse_ptr, delta_ptr, start, length, T.BLOCK_M)
            p_one = tl.exp2(row_products(q_some, k_one) * scale_log2 - lse)  # [BLOCK_M]
            ds_one = p_one * (row_products(grad_some, v_one) - delta)
            dv_one = add_weighted_rows(dv_one, p_one, grad_some)
            dk_one = add_weighted_rows(dk_one, ds_one, q_some)
        dk_ptr = head_start(dk_ptr, batch, head, first, stride_xb, stride_xn, stride_xh, T.ALIGN)
        dv_ptr = head_start(dv_ptr, batch, head, first, stride_yb, stride_yn, stride_yh, T.ALIGN)
        dk_one = scale_tile(dk_one, scale)
        store_tile(dk_ptr, dk_one, row_offsets(1, stride_xn, T.ALIGN, T.WIDE), stored, length, T)
        store_tile(dv_ptr, dv_one, row_offsets(1, stride_yn, T.ALIGN, T.WIDE), stored, length, T)
    else:
        row = (block - T.PEEL) * T.BLOCK_N + T.PEEL
        key_index = row + tl.arange(0, T.BLOCK_N)
        k_ptr = head_start(k_ptr, batch, head, first + row, stride_kb, stride_kn, stride_kh, T.ALIGN)
        v_ptr = head_start(v_ptr, batch, head, first + row, stride_vb, stride_vn, stride_vh, T.ALIGN)
        k = load_tile(k_ptr, row_offsets(T.BLOCK_N, stride_kn, T.ALIGN, T.WIDE), length - row, T, True)  # [BLOCK_N, D]
        v = load_tile(v_ptr, row_offsets(T.BLOCK_N, stride_vn, T.ALIGN, T.WIDE), length - row, T, True)
        if T.PEEL and not T.CAUSAL:
            q_first = load_tile(q_ptr, row_offsets(1, stride_qn, T.ALIGN, T.WIDE), length, T, True)  # [1, D]
            grad_first = load_tile(grad_ptr, row_offsets(1, stride_gn, T.ALIGN, T.WIDE), length, T, True)
            lse_first = tl.load(lse_ptr, mask=length > 0, other=float("inf")) * LOG2_E
            delta_first = tl.load(delta_ptr, mask=length > 0, other=0.0)
            p_first = tl.exp2(row_products(k, q_first) * scale_log2 - lse_first)  # [BLOCK_N]
            dv = outer_product(p_first, grad_first)
            ds_first = p_first * (row_products(v, grad_first) - delta_first)
            dk = outer_product(ds_first, q_first)
        else:
            dk = zero_tile(T.BLOCK_N, T)
            dv = zero_tile(T.BLOCK_N, T)

        query_end = tl.where(row < length, length, 0)
        query_start = T.PEEL
        if T.CAUSAL:
            query_start += (row - T.PEEL) // T.BLOCK_M * T.BLOCK_M
        for start in range(query_start, query_end, T.BLOCK_M):
            dk, dv = add_queries(
                dk, dv, k, v, q_ptr + start * step_q, grad_ptr + start * step_g, lse_ptr, delta_ptr, o_query=o_query,
                o_grad=o_grad, key_index=key_index, start=start, length=length, scale_log2=scale_log2, T=T,
            )  # fmt: skip
        dk_ptr = head_start(dk_ptr, batch, head, first + row, stride_xb, stride_xn, stride_xh, T.ALIGN)
        dv_ptr = head_start(dv_ptr, batch, head, first + row, stride_yb, stride_yn, stride_yh, T.ALIGN)
        dk = scale_tile(dk, scale)
        store_tile(dk_ptr, dk, row_offsets(T.BLOCK_N, stride_xn, T.ALIGN, T.WIDE), stored - row, length - row, T)
        store_tile(dv_ptr, dv, row_offsets(T.BLOCK_N, stride_yn, T.ALIGN, T.WIDE), stored - row, length - row, T)


@triton.jit
def add_keys(
    dq, q, grad, lse, delta, k_ptr, v_ptr, o_key, o_value, query_index, start, length, scale_log2,
    T: tl.constexpr,
):  # fmt: skip
    """Add the share of BLOCK_N keys to dq."""
    k = load_tile(k_ptr, o_key, length - start, T, T.MASKED)  # [BLOCK_N, D]
    v = load_tile(v_ptr, o_value, length - start, T, T.MASKED)
    p = tl.exp2(scores_of(q, k) * scale_log2 - lse[:, None])  # [BLOCK_M, BLOCK_N]
    if T.MASKED:
        # Padding reads as key 0 with score 0, whose exponential may overflow: drop it before it meets a product.
        key_index = start + tl.arange(0, T.BLOCK_N)[None, :]
        visible = key_index < length
        if T.CAUSAL:
            visible = visible & (key_index <= query_index[:, None])
        p = tl.where(visible, p, 0.0)
    ds = p * (scores_of(grad, v) - delta[:, None])
    return add_product(dq, ds, k)


@triton.jit(do_not_specialize=UNSPECIALISED)
def query_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, lengths_ptr, scale, num_tokens, max_tokens, num_heads,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_gb, stride_gn,
    stride_gh, stride_xb, stride_xn, stride_xh,
    dq_ptr, T: tl.constexpr,
):  # fmt: skip
    """Compute dq (strides x) of BLOCK_M queries; with PEEL, block 0 is the first query alone."""
    num_blocks = tl.cdiv(max_tokens - T.PEEL, T.BLOCK_M) + T.PEEL
    block, batch, head, first, length, stored = locate(
        tl.program_id(0), num_blocks, num_heads, num_tokens, lengths_ptr, T.PACKED
    )
    statistics = (batch.to(tl.int64) * num_heads + head) * num_tokens + first
    lse_ptr += statistics
    delta_ptr += statistics
    k_ptr = head_start(k_ptr, batch, head, first, stride_kb, stride_kn, stride_kh, T.ALIGN)
    v_ptr = head_start(v_ptr, batch, head, first, stride_vb, stride_vn, stride_vh, T.ALIGN)
    step_k = stride_kn.to(tl.int64) * T.ALIGN
    step_v = stride_vn.to(tl.int64) * T.ALIGN
    o_key = row_offsets(T.BLOCK_N, stride_kn, T.ALIGN, T.WIDE)  # [BLOCK_N, 1]
    o_value = row_offsets(T.BLOCK_N, stride_vn, T.ALIGN, T.WIDE)
    scale_log2 = scale * LOG2_E

    if T.PEEL and block == 0:
        q_ptr = head_start(q_ptr, batch, head, first, stride_qb, stride_qn, stride_qh, T.ALIGN)
        grad_ptr = head_start(grad_ptr, batch, head, first, stride_gb, stride_gn, stride_gh, T.ALIGN)
        q_one = load_tile(q_ptr, row_offsets(1, stride_qn, T.ALIGN, T.WIDE), length, T, True)  # [1, D]
        grad_one = load_tile(grad_ptr, row_offsets(1, stride_gn, T.ALIGN, T.WIDE), length, T, True)
        lse_one = tl.load(lse_ptr, mask=length > 0, other=float("inf")) * LOG2_E
        delta_one = tl.load(delta_ptr, mask=length > 0, other=0.0)
        dq_one = zero_tile(1, T)
        end = tl.minimum(length, 1) if T.CAUSAL else length
        for start in range(0, end, T.BLOCK_N):
            k_some = load_tile(k_ptr + start * step_k, o_key, end - start, T, True)
            v_some = load_tile(v_ptr + start * step_v, o_value, end - start, T, True)
            p_one = tl.exp2(row_products(k_some, q_one) * scale_log2 - lse_one)  # [BLOCK_N]
            p_one = tl.where(start + tl.arange(0, T.BLOCK_N) < end, p_one, 0.0)
            ds_one = p_one * (row_products(v_some, grad_one) - delta_one)
            dq_one = add_weighted_rows(dq_one, ds_one, k_some)
        dq_ptr = head_start(dq_ptr, batch, head, first, stride_xb, stride_xn, stride_xh, T.ALIGN)
        dq_one = scale_tile(dq_one, scale)
        store_tile(dq_ptr, dq_one, row_offsets(1, stride_xn, T.ALIGN, T.WIDE), stored, length, T)
    else:
        row = (block - T.PEEL) * T.BLOCK_M + T.PEEL
        query_index = row + tl.arange(0, T.BLOCK_M)
        q_ptr = head_start(q_ptr, batch, head, first + row, stride_qb, stride_qn, stride_qh, T.ALIGN)
        grad_ptr = head_start(grad_ptr, batch, head, first + row, stride_gb, stride_gn, stride_gh, T.ALIGN)
        q = load_tile(q_ptr, row_offsets(T.BLOCK_M, stride_qn, T.ALIGN, T.WIDE), length - row, T, True)  # [BLOCK_M, D]
        grad = load_tile(grad_ptr, row_offsets(T.BLOCK_M, stride_gn, T.ALIGN, T.WIDE), length - row, T, True)
        lse, delta = load_statistics(lse_ptr, delta_ptr, row, length, T.BLOCK_M)
        if T.PEEL:
            k_first = load_tile(k_ptr, row_offsets(1, stride_kn, T.ALIGN, T.WIDE), length, T, True)  # [1, D]
            v_first = load_tile(v_ptr, row_offsets(1, stride_vn, T.ALIGN, T.WIDE), length, T, True)
            p_first = tl.exp2(row_products(q, k_first) * scale_log2 - lse)  # [BLOCK_M]
            ds_first = p_first * (row_products(grad, v_first) - delta)
            dq = outer_product(ds_first, k_first)
        else:
            dq = zero_tile(T.BLOCK_M, T)

        key_end = tl.where(row < length, length, 0)
        if T.CAUSAL:
            key_end = tl.minimum(key_end, row + T.BLOCK_M)
        for start in range(T.PEEL, key_end, T.BLOCK_N):
            dq = add_keys(
                dq, q, grad, lse, delta, k_ptr + start * step_k, v_ptr + start * step_v, o_key, o_value=o_value,
                query_index=query_index, start=start, length=length, scale_log2=scale_log2, T=T,
            )  # fmt: skip
        dq_ptr = head_start(dq_ptr, batch, head, first + row, stride_xb, stride_xn, stride_xh, T.ALIGN)
        dq = scale_tile(dq, scale)
        store_tile(dq_ptr, dq, row_offsets(T.BLOCK_M, stride_xn, T.ALIGN, T.WIDE), stored - row, length - row, T)
