"""The backward kernels: deterministic, without atomics.

Two kernels: dk and dv, one program for each block of keys walking over the queries; dq, one program for each block of
queries walking over the keys. Both recompute the probabilities from the
log-sum-exp. PEEL is the forward's: accumulators start from the first token's share, and the first key (or query) is a
program of its own without tensor cores. Padded queries are read as zeros and with a log-sum-exp of +inf, so their
probabilities vanish.
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
    D: tl.constexpr, COVER: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add the share of BLOCK_M queries to dk and dv; everything is transposed, ``[keys, queries]``."""
    q = load_tile(q_ptr, o_query, length - start, D, COVER, MASKED)  # [BLOCK_M, D]
    lse, delta = load_statistics(lse_ptr, delta_ptr, start, length, BLOCK_M)
    p = tl.exp2(scores_of(k, q, COVER) * scale_log2 - lse[None, :])  # [BLOCK_N, BLOCK_M]
    if CAUSAL:
        p = tl.where(key_index[:, None] <= start + tl.arange(0, BLOCK_M)[None, :], p, 0.0)
    grad = load_tile(grad_ptr, o_grad, length - start, D, COVER, MASKED)
    dv = add_product(dv, p, grad, COVER)
    ds = p * (scores_of(v, grad, COVER) - delta[None, :])
    return add_product(dk, ds, q, COVER), dv


@triton.jit(do_not_specialize=UNSPECIALISED)
def key_value_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, lengths_ptr, scale, num_tokens, max_tokens, num_heads,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_gb, stride_gn,
    stride_gh, stride_xb, stride_xn, stride_xh, stride_yb, stride_yn, stride_yh,
    dk_ptr, dv_ptr,
    D: tl.constexpr, COVER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PEEL: tl.constexpr,
    MASKED: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Compute dk (strides x) and dv (strides y) of BLOCK_N keys; with PEEL, block 0 is the first key alone."""
    num_blocks = tl.cdiv(max_tokens - PEEL, BLOCK_N) + PEEL
    block, batch, head, first, length, stored = locate(
        tl.program_id(0), num_blocks, num_heads, num_tokens, lengths_ptr, PACKED
    )
    statistics = (batch.to(tl.int64) * num_heads + head) * num_tokens + first
    lse_ptr += statistics
    delta_ptr += statistics
    q_ptr = head_start(q_ptr, batch, head, first, stride_qb, stride_qn, stride_qh, ALIGN)
    grad_ptr = head_start(grad_ptr, batch, head, first, stride_gb, stride_gn, stride_gh, ALIGN)
    step_q = stride_qn.to(tl.int64) * ALIGN
    step_g = stride_gn.to(tl.int64) * ALIGN
    o_query = row_offsets(BLOCK_M, stride_qn, ALIGN, WIDE)  # [BLOCK_M, 1]
    o_grad = row_offsets(BLOCK_M, stride_gn, ALIGN, WIDE)
    scale_log2 = scale * LOG2_E

    if PEEL and block == 0:
        k_ptr = head_start(k_ptr, batch, head, first, stride_kb, stride_kn, stride_kh, ALIGN)
        v_ptr = head_start(v_ptr, batch, head, first, stride_vb, stride_vn, stride_vh, ALIGN)
        k_one = load_tile(k_ptr, row_offsets(1, stride_kn, ALIGN, WIDE), length, D, COVER, True)  # [1, D]
        v_one = load_tile(v_ptr, row_offsets(1, stride_vn, ALIGN, WIDE), length, D, COVER, True)
        dk_one = zero_tile(1, COVER)
        dv_one = zero_tile(1, COVER)
        for start in range(0, length, BLOCK_M):
            q_some = load_tile(q_ptr + start * step_q, o_query, length - start, D, COVER, True)
            grad_some = load_tile(grad_ptr + start * step_g, o_grad, length - start, D, COVER, True)
            lse, delta = load_statistics(lse_ptr, delta_ptr, start, length, BLOCK_M)
            p_one = tl.exp2(row_products(q_some, k_one, COVER) * scale_log2 - lse)  # [BLOCK_M]
            ds_one = p_one * (row_products(grad_some, v_one, COVER) - delta)
            dv_one = add_weighted_rows(dv_one, p_one, grad_some, COVER)
            dk_one = add_weighted_rows(dk_one, ds_one, q_some, COVER)
        dk_ptr = head_start(dk_ptr, batch, head, first, stride_xb, stride_xn, stride_xh, ALIGN)
        dv_ptr = head_start(dv_ptr, batch, head, first, stride_yb, stride_yn, stride_yh, ALIGN)
        dk_one = scale_tile(dk_one, scale, COVER)
        store_tile(dk_ptr, dk_one, row_offsets(1, stride_xn, ALIGN, WIDE), stored, length, D, COVER)
        store_tile(dv_ptr, dv_one, row_offsets(1, stride_yn, ALIGN, WIDE), stored, length, D, COVER)
    else:
        row = (block - PEEL) * BLOCK_N + PEEL
        key_index = row + tl.arange(0, BLOCK_N)
        k_ptr = head_start(k_ptr, batch, head, first + row, stride_kb, stride_kn, stride_kh, ALIGN)
        v_ptr = head_start(v_ptr, batch, head, first + row, stride_vb, stride_vn, stride_vh, ALIGN)
        k = load_tile(k_ptr, row_offsets(BLOCK_N, stride_kn, ALIGN, WIDE), length - row, D, COVER, True)  # [BLOCK_N, D]
        v = load_tile(v_ptr, row_offsets(BLOCK_N, stride_vn, ALIGN, WIDE), length - row, D, COVER, True)
        if PEEL and not CAUSAL:
            q_first = load_tile(q_ptr, row_offsets(1, stride_qn, ALIGN, WIDE), length, D, COVER, True)  # [1, D]
            grad_first = load_tile(grad_ptr, row_offsets(1, stride_gn, ALIGN, WIDE), length, D, COVER, True)
            lse_first = tl.load(lse_ptr, mask=length > 0, other=float("inf")) * LOG2_E
            delta_first = tl.load(delta_ptr, mask=length > 0, other=0.0)
            p_first = tl.exp2(row_products(k, q_first, COVER) * scale_log2 - lse_first)  # [BLOCK_N]
            dv = outer_product(p_first, grad_first, COVER)
            ds_first = p_first * (row_products(v, grad_first, COVER) - delta_first)
            dk = outer_product(ds_first, q_first, COVER)
        else:
            dk = zero_tile(BLOCK_N, COVER)
            dv = zero_tile(BLOCK_N, COVER)

        query_end = tl.where(row < length, length, 0)
        query_start = PEEL
        if CAUSAL:
            query_start += (row - PEEL) // BLOCK_M * BLOCK_M
        for start in range(query_start, query_end, BLOCK_M):
            dk, dv = add_queries(
                dk, dv, k, v, q_ptr + start * step_q, grad_ptr + start * step_g, lse_ptr, delta_ptr, o_query=o_query,
                o_grad=o_grad, key_index=key_index, start=start, length=length, scale_log2=scale_log2, D=D,
                COVER=COVER, BLOCK_M=BLOCK_M, MASKED=MASKED, CAUSAL=CAUSAL,
            )  # fmt: skip
        dk_ptr = head_start(dk_ptr, batch, head, first + row, stride_xb, stride_xn, stride_xh, ALIGN)
        dv_ptr = head_start(dv_ptr, batch, head, first + row, stride_yb, stride_yn, stride_yh, ALIGN)
        dk = scale_tile(dk, scale, COVER)
        store_tile(dk_ptr, dk, row_offsets(BLOCK_N, stride_xn, ALIGN, WIDE), stored - row, length - row, D, COVER)
        store_tile(dv_ptr, dv, row_offsets(BLOCK_N, stride_yn, ALIGN, WIDE), stored - row, length - row, D, COVER)


@triton.jit
def add_keys(
    dq, q, grad, lse, delta, k_ptr, v_ptr, o_key, o_value, query_index, start, length, scale_log2,
    D: tl.constexpr, COVER: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add the share of BLOCK_N keys to dq."""
    k = load_tile(k_ptr, o_key, length - start, D, COVER, MASKED)  # [BLOCK_N, D]
    v = load_tile(v_ptr, o_value, length - start, D, COVER, MASKED)
    p = tl.exp2(scores_of(q, k, COVER) * scale_log2 - lse[:, None])  # [BLOCK_M, BLOCK_N]
    if MASKED:
        # Padding reads as key 0 with score 0, whose exponential may overflow: drop it before it meets a product.
        key_index = start + tl.arange(0, BLOCK_N)[None, :]
        visible = key_index < length
        if CAUSAL:
            visible = visible & (key_index <= query_index[:, None])
        p = tl.where(visible, p, 0.0)
    ds = p * (scores_of(grad, v, COVER) - delta[:, None])
    return add_product(dq, ds, k, COVER)


@triton.jit(do_not_specialize=UNSPECIALISED)
def query_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, lengths_ptr, scale, num_tokens, max_tokens, num_heads,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_gb, stride_gn,
    stride_gh, stride_xb, stride_xn, stride_xh,
    dq_ptr,
    D: tl.constexpr, COVER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PEEL: tl.constexpr,
    MASKED: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Compute dq (strides x) of BLOCK_M queries; with PEEL, block 0 is the first query alone."""
    num_blocks = tl.cdiv(max_tokens - PEEL, BLOCK_M) + PEEL
    block, batch, head, first, length, stored = locate(
        tl.program_id(0), num_blocks, num_heads, num_tokens, lengths_ptr, PACKED
    )
    statistics = (batch.to(tl.int64) * num_heads + head) * num_tokens + first
    lse_ptr += statistics
    delta_ptr += statistics
    k_ptr = head_start(k_ptr, batch, head, first, stride_kb, stride_kn, stride_kh, ALIGN)
    v_ptr = head_start(v_ptr, batch, head, first, stride_vb, stride_vn, stride_vh, ALIGN)
    step_k = stride_kn.to(tl.int64) * ALIGN
    step_v = stride_vn.to(tl.int64) * ALIGN
    o_key = row_offsets(BLOCK_N, stride_kn, ALIGN, WIDE)  # [BLOCK_N, 1]
    o_value = row_offsets(BLOCK_N, stride_vn, ALIGN, WIDE)
    scale_log2 = scale * LOG2_E

    if PEEL and block == 0:
        q_ptr = head_start(q_ptr, batch, head, first, stride_qb, stride_qn, stride_qh, ALIGN)
        grad_ptr = head_start(grad_ptr, batch, head, first, stride_gb, stride_gn, stride_gh, ALIGN)
        q_one = load_tile(q_ptr, row_offsets(1, stride_qn, ALIGN, WIDE), length, D, COVER, True)  # [1, D]
        grad_one = load_tile(grad_ptr, row_offsets(1, stride_gn, ALIGN, WIDE), length, D, COVER, True)
        lse_one = tl.load(lse_ptr, mask=length > 0, other=float("inf")) * LOG2_E
        delta_one = tl.load(delta_ptr, mask=length > 0, other=0.0)
        dq_one = zero_tile(1, COVER)
        end = tl.minimum(length, 1) if CAUSAL else length
        for start in range(0, end, BLOCK_N):
            k_some = load_tile(k_ptr + start * step_k, o_key, end - start, D, COVER, True)
            v_some = load_tile(v_ptr + start * step_v, o_value, end - start, D, COVER, True)
            p_one = tl.exp2(row_products(k_some, q_one, COVER) * scale_log2 - lse_one)  # [BLOCK_N]
            p_one = tl.where(start + tl.arange(0, BLOCK_N) < end, p_one, 0.0)
            ds_one = p_one * (row_products(v_some, grad_one, COVER) - delta_one)
            dq_one = add_weighted_rows(dq_one, ds_one, k_some, COVER)
        dq_ptr = head_start(dq_ptr, batch, head, first, stride_xb, stride_xn, stride_xh, ALIGN)
        dq_one = scale_tile(dq_one, scale, COVER)
        store_tile(dq_ptr, dq_one, row_offsets(1, stride_xn, ALIGN, WIDE), stored, length, D, COVER)
    else:
        row = (block - PEEL) * BLOCK_M + PEEL
        query_index = row + tl.arange(0, BLOCK_M)
        q_ptr = head_start(q_ptr, batch, head, first + row, stride_qb, stride_qn, stride_qh, ALIGN)
        grad_ptr = head_start(grad_ptr, batch, head, first + row, stride_gb, stride_gn, stride_gh, ALIGN)
        q = load_tile(q_ptr, row_offsets(BLOCK_M, stride_qn, ALIGN, WIDE), length - row, D, COVER, True)  # [BLOCK_M, D]
        grad = load_tile(grad_ptr, row_offsets(BLOCK_M, stride_gn, ALIGN, WIDE), length - row, D, COVER, True)
        lse, delta = load_statistics(lse_ptr, delta_ptr, row, length, BLOCK_M)
        if PEEL:
            k_first = load_tile(k_ptr, row_offsets(1, stride_kn, ALIGN, WIDE), length, D, COVER, True)  # [1, D]
            v_first = load_tile(v_ptr, row_offsets(1, stride_vn, ALIGN, WIDE), length, D, COVER, True)
            p_first = tl.exp2(row_products(q, k_first, COVER) * scale_log2 - lse)  # [BLOCK_M]
            ds_first = p_first * (row_products(grad, v_first, COVER) - delta)
            dq = outer_product(ds_first, k_first, COVER)
        else:
            dq = zero_tile(BLOCK_M, COVER)

        key_end = tl.where(row < length, length, 0)
        if CAUSAL:
            key_end = tl.minimum(key_end, row + BLOCK_M)
        for start in range(PEEL, key_end, BLOCK_N):
            dq = add_keys(
                dq, q, grad, lse, delta, k_ptr + start * step_k, v_ptr + start * step_v, o_key, o_value=o_value,
                query_index=query_index, start=start, length=length, scale_log2=scale_log2, D=D, COVER=COVER,
                BLOCK_N=BLOCK_N, MASKED=MASKED, CAUSAL=CAUSAL,
            )  # fmt: skip
        dq_ptr = head_start(dq_ptr, batch, head, first + row, stride_xb, stride_xn, stride_xh, ALIGN)
        dq = scale_tile(dq, scale, COVER)
        store_tile(dq_ptr, dq, row_offsets(BLOCK_M, stride_xn, ALIGN, WIDE), stored - row, length - row, D, COVER)
