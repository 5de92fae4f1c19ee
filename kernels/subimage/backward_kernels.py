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
    block_at,
    head_start,
    load_block,
    load_first,
    load_rows_at,
    load_statistics,
    locate,
    outer_product,
    row_offsets,
    row_products,
    scale_tile,
    scores_of,
    store_tile,
    walk,
    zero_tile,
)


@triton.jit
def add_queries(dk, dv, k, v, queries, grads, lse_ptr, delta_ptr, key_index, start, length, scale_log2, T: tl.constexpr):
    """Add the share of BLOCK_M queries to dk and dv; everything is transposed, ``[keys, queries]``."""
    q = load_block(queries, length - start, T, T.MASKED)  # [BLOCK_M, D]
    query_index = start + tl.arange(0, T.BLOCK_M)
    lse, delta = load_statistics(lse_ptr, delta_ptr, query_index, query_index < length)
    p = tl.exp2(scores_of(k, q) * scale_log2 - lse[None, :])  # [BLOCK_N, BLOCK_M]
    if T.CAUSAL:
        p = tl.where(key_index[:, None] <= query_index[None, :], p, 0.0)
    grad = load_block(grads, length - start, T, T.MASKED)
    dv = add_product(dv, p, grad)
    ds = p * (scores_of(v, grad) - delta[None, :])
    return add_product(dk, ds, q), dv


@triton.jit
def store_gradient(
    ptr, tile, batch, head, first, stored, length, stride_b, stride_n, stride_h, ROWS: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Store rows from `first` on, of which `stored` exist and `length` are no padding."""
    ptr = head_start(ptr, batch, head, first, stride_b, stride_n, stride_h, T.ALIGN)
    store_tile(ptr, tile, row_offsets(ROWS, stride_n, T.ALIGN, T.WIDE), stored, length, T)


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
    queries, grads = walk(
        q_ptr, grad_ptr, batch, head, first, stride_qb, stride_qn, stride_qh, stride_yb=stride_gb, stride_yn=stride_gn,
        stride_yh=stride_gh, ROWS=T.BLOCK_M, T=T,
    )  # fmt: skip
    scale_log2 = scale * LOG2_E

    if T.PEEL and block == 0:
        k_one = load_rows_at(k_ptr, batch, head, first, stride_kb, stride_kn, stride_kh, length, ROWS=1, T=T)  # [1, D]
        v_one = load_rows_at(v_ptr, batch, head, first, stride_vb, stride_vn, stride_vh, length, ROWS=1, T=T)
        dk_one = zero_tile(1, T)
        dv_one = zero_tile(1, T)
        for start in range(0, length, T.BLOCK_M):
            q_some = load_block(block_at(queries, start), length - start, T, True)
            grad_some = load_block(block_at(grads, start), length - start, T, True)
            query_index = start + tl.arange(0, T.BLOCK_M)
            lse, delta = load_statistics(lse_ptr, delta_ptr, query_index, query_index < length)
            p_one = tl.exp2(row_products(q_some, k_one) * scale_log2 - lse)  # [BLOCK_M]
            ds_one = p_one * (row_products(grad_some, v_one) - delta)
            dv_one = add_weighted_rows(dv_one, p_one, grad_some)
            dk_one = add_weighted_rows(dk_one, ds_one, q_some)
        dk_one = scale_tile(dk_one, scale)
        store_gradient(
            dk_ptr, dk_one, batch, head, first, stored, length, stride_xb, stride_n=stride_xn, stride_h=stride_xh,
            ROWS=1, T=T,
        )  # fmt: skip
        store_gradient(
            dv_ptr, dv_one, batch, head, first, stored, length, stride_yb, stride_n=stride_yn, stride_h=stride_yh,
            ROWS=1, T=T,
        )  # fmt: skip
    else:
        row = (block - T.PEEL) * T.BLOCK_N + T.PEEL
        key_index = row + tl.arange(0, T.BLOCK_N)
        k = load_rows_at(
            k_ptr, batch, head, first + row, stride_kb, stride_kn, stride_kh, length - row, ROWS=T.BLOCK_N, T=T
        )  # [BLOCK_N, D]
        v = load_rows_at(v_ptr, batch, head, first + row, stride_vb, stride_vn, stride_vh, length - row, ROWS=T.BLOCK_N, T=T)
        if T.PEEL and not T.CAUSAL:
            q_first = load_first(queries, length, T)  # [1, D]
            grad_first = load_first(grads, length, T)
            lse_first, delta_first = load_statistics(lse_ptr, delta_ptr, 0, length > 0)
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
                dk, dv, k, v, block_at(queries, start), block_at(grads, start), lse_ptr, delta_ptr, key_index=key_index,
                start=start, length=length, scale_log2=scale_log2, T=T,
            )  # fmt: skip
        dk = scale_tile(dk, scale)
        store_gradient(
            dk_ptr, dk, batch, head, first + row, stored - row, length - row, stride_xb, stride_n=stride_xn,
            stride_h=stride_xh, ROWS=T.BLOCK_N, T=T,
        )  # fmt: skip
        store_gradient(
            dv_ptr, dv, batch, head, first + row, stored - row, length - row, stride_yb, stride_n=stride_yn,
            stride_h=stride_yh, ROWS=T.BLOCK_N, T=T,
        )  # fmt: skip


@triton.jit
def add_keys(dq, q, grad, lse, delta, keys, values, query_index, start, length, scale_log2, T: tl.constexpr):
    """Add the share of BLOCK_N keys to dq."""
    k = load_block(keys, length - start, T, T.MASKED)  # [BLOCK_N, D]
    v = load_block(values, length - start, T, T.MASKED)
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
    keys, values = walk(
        k_ptr, v_ptr, batch, head, first, stride_kb, stride_kn, stride_kh, stride_yb=stride_vb, stride_yn=stride_vn,
        stride_yh=stride_vh, ROWS=T.BLOCK_N, T=T,
    )  # fmt: skip
    scale_log2 = scale * LOG2_E

    if T.PEEL and block == 0:
        q_one = load_rows_at(q_ptr, batch, head, first, stride_qb, stride_qn, stride_qh, length, ROWS=1, T=T)  # [1, D]
        grad_one = load_rows_at(grad_ptr, batch, head, first, stride_gb, stride_gn, stride_gh, length, ROWS=1, T=T)
        lse_one, delta_one = load_statistics(lse_ptr, delta_ptr, 0, length > 0)
        dq_one = zero_tile(1, T)
        end = tl.minimum(length, 1) if T.CAUSAL else length
        for start in range(0, end, T.BLOCK_N):
            k_some = load_block(block_at(keys, start), end - start, T, True)
            v_some = load_block(block_at(values, start), end - start, T, True)
            p_one = tl.exp2(row_products(k_some, q_one) * scale_log2 - lse_one)  # [BLOCK_N]
            p_one = tl.where(start + tl.arange(0, T.BLOCK_N) < end, p_one, 0.0)
            ds_one = p_one * (row_products(v_some, grad_one) - delta_one)
            dq_one = add_weighted_rows(dq_one, ds_one, k_some)
        dq_one = scale_tile(dq_one, scale)
        store_gradient(
            dq_ptr, dq_one, batch, head, first, stored, length, stride_xb, stride_n=stride_xn, stride_h=stride_xh,
            ROWS=1, T=T,
        )  # fmt: skip
    else:
        row = (block - T.PEEL) * T.BLOCK_M + T.PEEL
        query_index = row + tl.arange(0, T.BLOCK_M)
        q = load_rows_at(
            q_ptr, batch, head, first + row, stride_qb, stride_qn, stride_qh, length - row, ROWS=T.BLOCK_M, T=T
        )  # [BLOCK_M, D]
        grad = load_rows_at(
            grad_ptr, batch, head, first + row, stride_gb, stride_gn, stride_gh, length - row, ROWS=T.BLOCK_M, T=T
        )
        lse, delta = load_statistics(lse_ptr, delta_ptr, query_index, query_index < length)
        if T.PEEL:
            k_first = load_first(keys, length, T)  # [1, D]
            v_first = load_first(values, length, T)
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
                dq, q, grad, lse, delta, block_at(keys, start), block_at(values, start), query_index, start=start,
                length=length, scale_log2=scale_log2, T=T,
            )  # fmt: skip
        dq = scale_tile(dq, scale)
        store_gradient(
            dq_ptr, dq, batch, head, first + row, stored - row, length - row, stride_xb, stride_n=stride_xn,
            stride_h=stride_xh, ROWS=T.BLOCK_M, T=T,
        )  # fmt: skip
