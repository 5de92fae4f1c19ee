"""The forward kernel and its launcher.

One program owns BLOCK_M queries of one head of one tile and walks over the keys with an online softmax in base 2. PEEL
takes the first token out of the tiles: a tower with a class token has 1 + 1024 tokens, and at 128 x 64 the odd one
would cost a ninth block of queries and a seventeenth block of keys. Peeled, every online softmax starts from the first
key (maximum q.k, sum 1, accumulator v), and the first query is a program of its own that uses no tensor cores.

Keys are masked only if the last block can be incomplete. Then all blocks are: a second copy of the loop body for the
last one costs up to 56 registers, which spills on some GPUs and on the others decides whether two programs fit on a
multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
    LN_2,
    LOG2_E,
    UNSPECIALISED,
    add_weighted_rows,
    attend_scores,
    block_at,
    head_start,
    load_block,
    load_first,
    load_tile,
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
from infimm_fast.kernels.subimage.config import choose_config, tiling_of
from infimm_fast.kernels.subimage.options import Options
from infimm_fast.kernels.subimage.rotate import contiguous_tables, rotate_tile, rotated


@triton.jit
def attend_block(q, acc, m, total, keys, values, query_index, start, length, scale_log2, T: tl.constexpr):
    """One step of the online softmax over BLOCK_N keys; without MASKED all of them are visible to every query."""
    k = load_block(keys, length - start, T, T.MASKED)  # [BLOCK_N, D]
    scores = scores_of(q, k)  # [BLOCK_M, BLOCK_N]
    if T.MASKED:
        key_index = start + tl.arange(0, T.BLOCK_N)[None, :]
        visible = key_index < length
        if T.CAUSAL:
            visible = visible & (key_index <= query_index[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    return attend_scores(acc, m, total, scores, values, length - start, scale_log2, T=T, MASKED=T.MASKED, EMPTY_ROWS=False)


@triton.jit
def attend_first_query(q, acc, m, total, keys, values, length, scale_log2, T: tl.constexpr):
    """The online softmax of one query over keys 1, 2, ... on plain fp32 arithmetic."""
    for start in range(1, length, T.BLOCK_N):
        k = load_block(block_at(keys, start), length - start, T, True)  # [BLOCK_N, D]
        visible = start + tl.arange(0, T.BLOCK_N) < length
        scores = tl.where(visible, row_products(k, q) * scale_log2, float("-inf"))  # [BLOCK_N]
        m_new = tl.maximum(m, tl.max(scores, axis=0))
        p = tl.exp2(scores - m_new)
        alpha = tl.exp2(m - m_new)
        v = load_block(block_at(values, start), length - start, T, True)
        acc = add_weighted_rows(scale_tile(acc, alpha), p, v)
        total = total * alpha + tl.sum(p, axis=0)
        m = m_new
    return acc, m, total


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, lengths_ptr, scale, num_tokens, max_tokens, num_heads, rope_prefix,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    out_ptr, lse_ptr, T: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head; with PEEL, block 0 is the first query alone."""
    num_blocks = tl.cdiv(max_tokens - T.PEEL, T.BLOCK_M) + T.PEEL
    block, batch, head, first, length, stored = locate(
        tl.program_id(0), num_blocks, num_heads, num_tokens, lengths_ptr, T.PACKED
    )
    if lse_ptr is not None:
        lse_ptr += (batch.to(tl.int64) * num_heads + head) * num_tokens + first
    keys, values = walk(
        k_ptr, v_ptr, batch, head, first, stride_kb, stride_kn, stride_kh, stride_yb=stride_vb, stride_yn=stride_vn,
        stride_yh=stride_vh, ROWS=T.BLOCK_N, T=T,
    )  # fmt: skip
    width = num_heads * T.D
    o_out = row_offsets(T.BLOCK_M, width, 1, T.WIDE)
    scale_log2 = scale * LOG2_E
    out_ptr = head_start(out_ptr, batch, head, first, num_tokens * width.to(tl.int64), width, T.D, 1)

    if T.PEEL and block == 0:
        o_one = row_offsets(1, stride_qn, T.ALIGN, T.WIDE)
        q_ptr = head_start(q_ptr, batch, head, first, stride_qb, stride_qn, stride_qh, T.ALIGN)
        q_first = load_tile(q_ptr, o_one, length, T, True)  # [1, D]
        if cos_ptr is not None:
            q_first = rotate_tile(q_first, q_ptr, o_one, length, first - rope_prefix, cos_ptr, sin_ptr, T)
        k_first = load_first(keys, length, T)  # [1, D]
        v_first = load_first(values, length, T)
        m_first = tl.sum(row_products(k_first, q_first), axis=0) * scale_log2
        acc_first = outer_product(tl.full([1], 1.0, tl.float32), v_first)
        end = tl.minimum(length, 1) if T.CAUSAL else length
        acc_first, m_first, total_first = attend_first_query(
            q_first, acc_first, m_first, m_first * 0.0 + 1.0, keys, values, end, scale_log2, T=T
        )
        acc_first = scale_tile(acc_first, 1.0 / total_first)
        store_tile(out_ptr, acc_first, row_offsets(1, width, 1, T.WIDE), stored, length, T)
        if lse_ptr is not None:
            lse_first = tl.where(length > 0, (m_first + tl.log2(total_first)) * LN_2, float("-inf"))
            tl.store(lse_ptr, lse_first, mask=stored > 0)
    else:
        row = (block - T.PEEL) * T.BLOCK_M + T.PEEL
        query_index = row + tl.arange(0, T.BLOCK_M)
        o_query = row_offsets(T.BLOCK_M, stride_qn, T.ALIGN, T.WIDE)
        q_ptr = head_start(q_ptr, batch, head, first + row, stride_qb, stride_qn, stride_qh, T.ALIGN)
        q = load_tile(q_ptr, o_query, length - row, T, True)  # [BLOCK_M, D]
        if cos_ptr is not None:
            q = rotate_tile(q, q_ptr, o_query, length - row, first + row - rope_prefix, cos_ptr, sin_ptr, T)
        if T.PEEL:
            k_first = load_first(keys, length, T)  # [1, D]
            v_first = load_first(values, length, T)
            m = row_products(q, k_first) * scale_log2
            total = tl.full([T.BLOCK_M], 1.0, tl.float32)
            acc = outer_product(total, v_first)
        else:
            m = tl.full([T.BLOCK_M], float("-inf"), tl.float32)
            total = tl.full([T.BLOCK_M], 0.0, tl.float32)
            acc = zero_tile(T.BLOCK_M, T)

        # A block of padding only has nothing to attend to: no iteration at all.
        key_end = tl.where(row < length, length, 0)
        if T.CAUSAL:
            key_end = tl.minimum(key_end, row + T.BLOCK_M)
        for start in range(T.PEEL, key_end, T.BLOCK_N):
            acc, m, total = attend_block(
                q,
                acc,
                m,
                total,
                block_at(keys, start),
                block_at(values, start),
                query_index,
                start,
                length=length,
                scale_log2=scale_log2,
                T=T,
            )

        acc = scale_tile(acc, (1.0 / total)[:, None])
        out_ptr += row.to(tl.int64) * width
        store_tile(out_ptr, acc, o_out, stored - row, length - row, T)
        if lse_ptr is not None:
            lse = tl.where(query_index < length, (m + tl.log2(total)) * LN_2, float("-inf"))
            tl.store(lse_ptr + query_index, lse, mask=query_index < stored)


def launch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, *, config: LaunchConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward kernel.

    Args:
        q: ``[B, N, H, D]``; strides of B, N and H as they come.
        k: like `q`.
        v: like `q`.
        options: the operator's; `backend` does not matter.
        config: overrides `choose_config`.

    Returns:
        The output, contiguous ``[B, N, H, D]`` in the dtype of `q`, and the log-sum-exp, fp32 ``[B, H, N]``.
    """
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, tokens, heads, head_dim = q.shape
    lengths, max_tokens = options.lengths, options.max_seqlen or tokens
    # Rows outside every packed sequence belong to no program.
    out = (torch.zeros if options.packed else torch.empty)((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    if options.packed:
        lse.fill_(float("-inf"))
    if out.numel() == 0:
        return out, lse
    if config is None:
        flags = {"peel": lengths is None, "rope": options.rope_cos is not None}
        config = choose_config("forward", head_dim, q.dtype, max_tokens, capability(q), **flags)
    options = contiguous_tables(options)
    k = rotated(k, options)
    blocks = triton.cdiv(max_tokens - config.peel, config.block_m) + config.peel
    align = common_alignment(q, k, v)
    wide = rows_are_wide(max(config.block_m, config.block_n), q, k, v, out)
    tiling = tiling_of(config, options, max_tokens, config.block_n, head_dim=head_dim, align=align, wide=wide)
    tiling = tiling._replace(INTERLEAVED=options.rope_interleaved)
    with device_guard(q):
        forward_kernel[(blocks * heads * options.sequences(batch),)](
            q, k, v, options.rope_cos, options.rope_sin, lengths, options.scale, tokens, max_tokens, heads,
            options.rope_prefix, *unit_strides(align, q, k, v), out, lse, tiling, **config.options(),
        )  # fmt: skip
    return out, lse
