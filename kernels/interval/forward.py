"""The forward kernel and the launcher of every forward.

One program owns BLOCK_M rows (tokens times the heads of one KV head's group) of one batch row. It reads their intervals,
walks over the hull of those that are not empty, and masks inside it; keys outside the hull are never read. Few tokens
(decode) go to `decode.py`, which splits the keys.
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
from infimm_fast.kernels.common.tiles import UNSPECIALISED, head_start, load_rows, store_rows, walk
from infimm_fast.kernels.interval.config import DECODE_TOKENS, choose_config, choose_split, tiling_of
from infimm_fast.kernels.interval.decode import launch_decode
from infimm_fast.kernels.interval.options import Options
from infimm_fast.kernels.interval.tiles import (
    attend_keys,
    hull_of,
    load_intervals,
    query_offsets,
    row_index,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, range_ptr, scale, num_tokens, num_kv_heads, num_keys,
    stride_qb, stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_rb, stride_rt, stride_re,
    out_ptr, lse_ptr, T: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one batch row and KV head over their whole hull."""
    num_rows = num_tokens * T.GROUP
    num_tiles = tl.cdiv(num_rows, T.BLOCK_M)
    # Tiles of one head are neighbours, so that they share its keys and values in L2.
    tile = tl.program_id(0) % num_tiles
    kv_head = tl.program_id(0) // num_tiles % num_kv_heads
    batch = tl.program_id(0) // num_tiles // num_kv_heads

    token, member, inside = row_index(tile * T.BLOCK_M, num_rows, T.BLOCK_M, T.GROUP)
    start, count = load_intervals(range_ptr, batch, token, inside, num_keys, stride_rb, stride_rt, stride_re)
    low, high = hull_of(start, count, num_keys)
    q_ptr = head_start(q_ptr, batch, kv_head * T.GROUP, batch * 0, stride_qb, stride_qn, stride_qh, T.ALIGN)
    o_query = query_offsets(token, member, stride_qn, stride_qh, T.ALIGN, T.WIDE)
    q = load_rows(q_ptr, o_query, count > 0, T)  # [BLOCK_M, D]
    keys, values = walk(
        k_ptr, v_ptr, batch * 0, kv_head, batch * 0, 0, stride_kn, stride_kh, stride_yb=0, stride_yn=stride_vn,
        stride_yh=stride_vh, ROWS=T.BLOCK_N, T=T,
    )  # fmt: skip
    out, lse = attend_keys(q, keys, values, start, count, low, high, scale, T=T)
    num_heads = num_kv_heads * T.GROUP
    out_ptr += (batch.to(tl.int64) * num_tokens * num_heads + kv_head * T.GROUP) * T.D
    store_rows(out_ptr, out, query_offsets(token, member, num_heads * T.D, T.D, 1, T.WIDE), inside, T)
    if lse_ptr is not None:
        lse_ptr += (batch.to(tl.int64) * num_heads + kv_head * T.GROUP) * num_tokens
        tl.store(lse_ptr + member * num_tokens + token, lse, mask=inside)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_range: torch.Tensor,
    options: Options,
    *,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward kernel, or for a few tokens and enough keys those of decode.

    Args:
        q: ``[B, T, Hq, D]``; strides of B, T and Hq as they come.
        k: ``[S, Hkv, D]``; strides of S and Hkv as they come.
        v: like `k`.
        kv_range: int32 or int64 ``[B, T, 2]``, any strides.
        options: the operator's; `backend` does not matter.
        config: overrides `choose_config`.

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
    if config is None:
        kernel = "decode" if tokens <= DECODE_TOKENS else "forward"
        config = choose_config(kernel, head_dim, q.dtype, tokens * group, capability(q), batch=batch)
    split = choose_split(batch, tokens, group, kv_heads, keys, config)
    if split is not None:
        launch_decode(q, k, v, kv_range, options, out=out, lse=lse, config=config, split=split)
        return out, lse
    align = common_alignment(q, k, v)
    strides = [*unit_strides(align, q), *unit_strides(align, k)[1:], *unit_strides(align, v)[1:]]
    wide = rows_are_wide(tokens, q, out) or rows_are_wide(config.block_n, k, v)
    tiling = tiling_of(config, head_dim=head_dim, group=group, align=align, wide=wide)
    with device_guard(q):
        forward_kernel[(triton.cdiv(tokens * group, config.block_m) * kv_heads * batch,)](
            q, k, v, kv_range, options.scale, tokens, kv_heads, keys, *strides, *kv_range.stride(), out, lse, tiling,
            **config.options(),
        )  # fmt: skip
    return out, lse
