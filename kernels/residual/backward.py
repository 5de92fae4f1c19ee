"""The backward kernel and its launcher: deterministic, without atomics.

A program owns consecutive rows, takes them in steps of BLOCK_M, and adds the gradients of gate, weight and bias up in
registers. Its sums are written apart from those of the others, and added in a fixed order afterwards. The statistics of
a row are computed again from the output, which has to be read for the gradient anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infimm_fast.kernels.common.launch import LaunchConfig, common_alignment, device_guard
from infimm_fast.kernels.common.tiles import UNSPECIALISED, load_rows, store_rows, zero_tile
from infimm_fast.kernels.residual.config import Tiling, choose_config, rows_of_programs
from infimm_fast.kernels.residual.forward import as_rows, contiguous, row_strides
from infimm_fast.kernels.residual.options import Gradients, Options, Saved
from infimm_fast.kernels.residual.tiles import (
    add_norm_gradient,
    add_products,
    add_tiles,
    input_offsets,
    keep_rows,
    load_channels,
    load_slope,
    locate_rows,
    multiply,
    normalise,
    output_offsets,
    scale_by_derivative,
    store_partial,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_kernel(
    grad_ptr, grad_normed_ptr, y_ptr, gate_ptr, keep_ptr, weight_ptr, out_ptr, eps, num_rows, rows_per_batch,
    rows_per_program,
    stride_gb, stride_gn, stride_nb, stride_nn, stride_yb, stride_yn,
    dx_ptr, dy_ptr, partial_ptr, T: tl.constexpr,
):  # fmt: skip
    """Compute dy, with a weight also dx, and this program's share of the gradients of gate, weight and bias."""
    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    slope = load_slope(gate_ptr, T)  # [1, C]
    dgate = zero_tile(T.BLOCK_M, T)
    if weight_ptr is not None:
        dweight = zero_tile(T.BLOCK_M, T)
        dbias = zero_tile(T.BLOCK_M, T)
    for start in range(first, last, T.BLOCK_M):
        row, m_row, keep = locate_rows(start, last, rows_per_batch, keep_ptr, T.BLOCK_M)
        y = load_rows(y_ptr, input_offsets(row, rows_per_batch, stride_yb, stride_yn, T.ALIGN), keep != 0, T)
        grad = load_rows(grad_ptr, input_offsets(row, rows_per_batch, stride_gb, stride_gn, T.ALIGN), m_row, T)
        if weight_ptr is not None:
            o_normed = input_offsets(row, rows_per_batch, stride_nb, stride_nn, T.ALIGN)
            grad_normed = load_rows(grad_normed_ptr, o_normed, m_row, T)  # [BLOCK_M, C]
            out = load_rows(out_ptr, output_offsets(row, T.D), m_row, T)
            weight = load_channels(weight_ptr, T, 1)  # [1, C]
            normal, rstd = normalise(out, eps, T)
            grad = add_norm_gradient(grad, grad_normed, normal, rstd, weight, T)
            store_rows(dx_ptr, grad, output_offsets(row, T.D), m_row, T)
            dweight = add_products(dweight, grad_normed, normal)
            dbias = add_tiles(dbias, grad_normed)
        grad = keep_rows(grad, keep)
        store_rows(dy_ptr, multiply(grad, slope), output_offsets(row, T.D), m_row, T)
        dgate = add_products(dgate, grad, y)
    store_partial(partial_ptr, 0, scale_by_derivative(dgate, slope), T)
    if weight_ptr is not None:
        store_partial(partial_ptr, 1, dweight, T)
        store_partial(partial_ptr, 2, dbias, T)


def launch_backward(
    grad: torch.Tensor,
    grad_normed: torch.Tensor,
    saved: Saved,
    options: Options,
    *,
    gradients: Gradients,
    config: LaunchConfig | None = None,
) -> None:
    """Fill the gradients. Without a LayerNorm only dy and dgate: dx is `grad` itself.

    Args:
        grad: gradient of the sum, ``[B, ..., C]``, any strides.
        grad_normed: gradient of the LayerNorm, like `grad`; not read without a weight.
        saved: of the forward.
        options: of the forward.
        gradients: written; dx and dy contiguous, in the shape of `y`.
        config: overrides `choose_config`.
    """
    y, gate, keep, norm_weight, out = saved
    normed = norm_weight is not None
    channels = y.shape[-1]
    dx, dy, *sums = gradients
    sums = sums if normed else sums[:1]
    if y.numel() == 0:
        for target in sums:
            target.zero_()
        return
    grad, y = as_rows(grad), as_rows(y)
    grad_normed = as_rows(grad_normed) if normed else grad
    config = config or choose_config(channels)
    rows = y.shape[0] * y.shape[1]
    programs, share = rows_of_programs("backward", rows, config.block_m)
    partials = torch.empty((len(sums), programs, channels), dtype=torch.float32, device=y.device)
    align = common_alignment(grad, grad_normed, y)
    tiling = Tiling(channels, config.cover, config.block_m, GATE_STRIDE=int(gate.shape[0] > 1), ALIGN=align)
    with device_guard(y):
        backward_kernel[(programs,)](
            grad, grad_normed, y, *map(contiguous, (gate, keep, norm_weight)), out, options.norm_eps, rows, y.shape[1],
            share, *row_strides(align, grad, grad_normed, y), dx, dy, partials, tiling, **config.options(),
        )  # fmt: skip
    for target, total in zip(sums, partials.sum(1), strict=True):
        target.copy_(total.sum() if target.shape[0] == 1 else total)
