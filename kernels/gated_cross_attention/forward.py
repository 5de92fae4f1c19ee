"""The forward kernels and their launcher.

One program owns BLOCK_M rows (tokens times the heads of one KV head's group) of one batch row. It reads their intervals,
walks over the hull of those that are not empty, and masks inside it; keys outside the hull are never read. Few rows
(decode) leave most of a GPU idle, so there the hull is cut into equal splits, each a program that writes a normalised
partial result, and a second kernel combines them in a fixed order. How many splits there are depends on shapes only;
where they begin is worked out on the device, so a captured CUDA graph follows intervals that change in place.
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
    head_strides,
    rows_are_wide,
    rows_contiguous,
)
from infimm_fast.kernels.common.tiles import (
    LN_2,
    LOG2_E,
    add_product,
    head_start,
    load_tile,
    row_offsets,
    scale_tile,
    scores_of,
    zero_tile,
)
from infimm_fast.kernels.gated_cross_attention.config import DECODE_TOKENS, choose_config, choose_splits
from infimm_fast.kernels.gated_cross_attention.tiles import (
    hull_of,
    load_intervals,
    load_rows,
    query_offsets,
    row_index,
    sees,
    store_rows,
)


@triton.jit
def attend_block(
    q,
    acc,
    m,
    total,
    k_ptr,
    v_ptr,
    o_key,
    o_value,
    start,
    count,
    first_key,
    last_key,
    scale_log2,
    D: tl.constexpr,
    COVER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One step of the online softmax over BLOCK_N keys; each row sees those of its own interval."""
    k = load_tile(k_ptr, o_key, last_key - first_key, D, COVER, True)  # [BLOCK_N, D]
    key = first_key + tl.arange(0, BLOCK_N)
    visible = sees(key[None, :], start[:, None], count[:, None])
    scores = tl.where(visible, scores_of(q, k, COVER), float("-inf"))  # [BLOCK_M, BLOCK_N]
    m_new = tl.maximum(m, tl.max(scores, axis=1) * scale_log2)
    # A row that has seen nothing yet: -inf minus -inf would be NaN.
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores * scale_log2 - m_finite[:, None])
    alpha = tl.exp2(m - m_finite)
    v = load_tile(v_ptr, o_value, last_key - first_key, D, COVER, True)
    acc = add_product(scale_tile(acc, alpha[:, None], COVER), p, v, COVER)
    return acc, m_new, total * alpha + tl.sum(p, axis=1)


@triton.jit(
    do_not_specialize=[
        "num_batches",
        "num_tokens",
        "num_kv_heads",
        "num_keys",
        "num_splits",
        "stride_qb",
        "stride_qn",
        "stride_qh",
        "stride_kn",
        "stride_kh",
        "stride_vn",
        "stride_vh",
        "stride_rb",
        "stride_rt",
        "stride_re",
    ]
)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    range_ptr,
    scale,
    num_batches,
    num_tokens,
    num_kv_heads,
    num_keys,
    num_splits,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_rb,
    stride_rt,
    stride_re,
    out_ptr,
    lse_ptr,
    D: tl.constexpr,
    COVER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """BLOCK_M rows of one KV head over one split of their hull; out and lse hold the splits one after the other."""
    num_rows = num_tokens * GROUP
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    # Tiles of one head are neighbours, so that they share its keys and values in L2.
    split = tl.program_id(0) % num_splits
    tile = tl.program_id(0) // num_splits % num_tiles
    kv_head = tl.program_id(0) // num_splits // num_tiles % num_kv_heads
    batch = tl.program_id(0) // num_splits // num_tiles // num_kv_heads

    token, member, inside = row_index(tile * BLOCK_M, num_rows, BLOCK_M, GROUP)
    start, count = load_intervals(range_ptr, batch, token, inside, num_keys, stride_rb, stride_rt, stride_re)
    low, high = hull_of(start, count, num_keys)
    share = tl.cdiv(tl.cdiv(high - low, BLOCK_N), num_splits) * BLOCK_N
    split_start = low + split * share
    split_end = tl.minimum(split_start + share, high)

    q_ptr = head_start(q_ptr, batch, kv_head * GROUP, batch * 0, stride_qb, stride_qn, stride_qh, ALIGN)
    o_query = query_offsets(token, member, stride_qn, stride_qh, ALIGN, WIDE)
    q = load_rows(q_ptr, o_query, count > 0, D, COVER)  # [BLOCK_M, D]
    k_ptr = head_start(k_ptr, batch * 0, kv_head, batch * 0, 0, stride_kn, stride_kh, ALIGN)
    v_ptr = head_start(v_ptr, batch * 0, kv_head, batch * 0, 0, stride_vn, stride_vh, ALIGN)
    step_k = stride_kn.to(tl.int64) * ALIGN
    step_v = stride_vn.to(tl.int64) * ALIGN
    o_key = row_offsets(BLOCK_N, stride_kn, ALIGN, WIDE)  # [BLOCK_N, 1]
    o_value = row_offsets(BLOCK_N, stride_vn, ALIGN, WIDE)
    scale_log2 = scale * LOG2_E
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = zero_tile(BLOCK_M, COVER)
    for first_key in range(split_start, split_end, BLOCK_N):
        acc, m, total = attend_block(
            q, acc, m, total, k_ptr + first_key * step_k, v_ptr + first_key * step_v, o_key, o_value, start, count,
            first_key, split_end, scale_log2, D, COVER, BLOCK_N,
        )  # fmt: skip

    num_heads = num_kv_heads * GROUP
    # A row that has seen nothing has a maximum of -inf and an accumulator of 0.
    total = tl.where(total > 0, total, 1.0)
    acc = scale_tile(acc, (1.0 / total)[:, None], COVER)
    lse = (m + tl.log2(total)) * LN_2
    index = (split * num_batches + batch).to(tl.int64)
    out_ptr += (index * num_tokens * num_heads + kv_head * GROUP) * D
    store_rows(out_ptr, acc, query_offsets(token, member, num_heads * D, D, 1, WIDE), inside, D, COVER)
    lse_ptr += (index * num_heads + kv_head * GROUP) * num_tokens
    tl.store(lse_ptr + member * num_tokens + token, lse, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_heads"])
def combine_kernel(
    part_ptr,
    part_lse_ptr,
    num_rows,
    num_tokens,
    num_heads,
    out_ptr,
    lse_ptr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weigh the SPLITS partial results of one token and head by their log-sum-exps."""
    row = tl.program_id(0).to(tl.int64)  # over [B, T, H]
    token = row // num_heads % num_tokens
    lse_row = (row // num_heads // num_tokens * num_heads + row % num_heads) * num_tokens + token  # over [B, H, T]
    split = tl.arange(0, SPLITS).to(tl.int64)
    o_d = tl.arange(0, WIDTH)
    part_lse = tl.load(part_lse_ptr + split * num_rows + lse_row)  # [SPLITS]
    part = tl.load(
        part_ptr + (split * num_rows + row)[:, None] * D + o_d[None, :], mask=(o_d < D)[None, :], other=0.0
    )  # [SPLITS, WIDTH]
    largest = tl.max(part_lse, axis=0)
    weights = tl.exp2((part_lse - tl.where(largest == float("-inf"), 0.0, largest)) * LOG2_E)
    total = tl.sum(weights, axis=0)
    total = tl.where(total > 0, total, 1.0)
    out = tl.sum(weights[:, None] * part, axis=0) / total
    tl.store(out_ptr + row * D + o_d, out.to(out_ptr.dtype.element_ty), mask=o_d < D)
    tl.store(lse_ptr + lse_row, largest + tl.log2(total) * LN_2)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_range: torch.Tensor,
    scale: float,
    config: LaunchConfig | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward kernel, and for a few tokens the one that combines its splits.

    Args:
        q: ``[B, T, Hq, D]``; strides of B, T and Hq as they come.
        k: ``[S, Hkv, D]``; strides of S and Hkv as they come.
        v: like `k`.
        kv_range: int32 or int64 ``[B, T, 2]``, any strides.
        scale: multiplies the scores; positive.
        config: overrides `choose_config`.
        splits: overrides `choose_splits`; a power of two.

    Returns:
        The output, contiguous ``[B, T, Hq, D]`` in the dtype of `q`, and the log-sum-exp, fp32 ``[B, Hq, T]``.
    """
    q, k, v = rows_contiguous(q), rows_contiguous(k)[None], rows_contiguous(v)[None]
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    group = heads // kv_heads
    decode = tokens <= DECODE_TOKENS
    if config is None:
        kernel = "decode" if decode else "forward"
        config = choose_config(kernel, head_dim, q.dtype, tokens * group, capability(q))
    programs = triton.cdiv(tokens * group, config.block_m) * kv_heads * batch
    if splits is None:
        splits = choose_splits(programs, keys, config.block_n) if decode else 1
    align = common_alignment(q, k, v)
    strides = [stride // align for stride in (*head_strides(q), *head_strides(k)[1:], *head_strides(v)[1:])]
    parts: tuple[torch.Tensor, ...] = (out, lse)
    if splits > 1:
        parts = tuple(torch.empty((splits, *x.shape), dtype=torch.float32, device=q.device) for x in parts)
    with device_guard(q):
        forward_kernel[(programs * splits,)](
            q,
            k,
            v,
            kv_range,
            scale,
            batch,
            tokens,
            kv_heads,
            keys,
            splits,
            *strides,
            *kv_range.stride(),
            *parts,
            D=head_dim,
            COVER=config.cover,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            GROUP=group,
            ALIGN=align,
            WIDE=rows_are_wide(tokens, q, out) or rows_are_wide(config.block_n, k, v),
            **config.options(),
        )
        if splits > 1:
            combine_kernel[(lse.numel(),)](
                *parts,
                lse.numel(),
                tokens,
                heads,
                out,
                lse,
                D=head_dim,
                WIDTH=triton.next_power_of_2(head_dim),
                SPLITS=splits,
                num_warps=4,
            )
    return out, lse
