"""The forward kernel and its launcher: one pass over the rows, LayerNorm included.

A program owns consecutive rows. It computes tanh(gate) once, then takes a step of BLOCK_M whole rows at a time, so that
the LayerNorm of a row finds it in registers. Rows that are not kept do not read y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infimm_fast.kernels.common.launch import (
    LaunchConfig,
    common_alignment,
    device_guard,
    head_strides,
    rows_contiguous,
)
from infimm_fast.kernels.common.tiles import UNSPECIALISED, load_rows, store_rows
from infimm_fast.kernels.residual.config import Tiling, choose_config, rows_of_programs
from infimm_fast.kernels.residual.options import Options, Tensors
from infimm_fast.kernels.residual.tiles import (
    add_gated,
    apply_affine,
    input_offsets,
    load_channels,
    load_slope,
    locate_rows,
    normalise,
    output_offsets,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    x_ptr, y_ptr, gate_ptr, keep_ptr, weight_ptr, bias_ptr, eps, num_rows, rows_per_batch, rows_per_program,
    stride_xb, stride_xn, stride_yb, stride_yn,
    out_ptr, normed_ptr, T: tl.constexpr,
):  # fmt: skip
    """``out = x + keep * tanh(gate) * y`` and, if there is a weight, its LayerNorm; both contiguous."""
    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    slope = load_slope(gate_ptr, T)  # [1, C]
    for start in range(first, last, T.BLOCK_M):
        row, m_row, keep = locate_rows(start, last, rows_per_batch, keep_ptr, T.BLOCK_M)
        x = load_rows(x_ptr, input_offsets(row, rows_per_batch, stride_xb, stride_xn, T.ALIGN), m_row, T)
        y = load_rows(y_ptr, input_offsets(row, rows_per_batch, stride_yb, stride_yn, T.ALIGN), keep != 0, T)
        out = add_gated(x, y, slope, keep)  # [BLOCK_M, C]
        store_rows(out_ptr, out, output_offsets(row, T.D), m_row, T)
        if weight_ptr is not None:
            normal, _ = normalise(out, eps, T)
            weight = load_channels(weight_ptr, T, 1)  # [1, C]
            bias = load_channels(bias_ptr, T, 1)
            normed = apply_affine(normal, weight, bias)
            store_rows(normed_ptr, normed, output_offsets(row, T.D), m_row, T)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``[B, ..., C]`` as ``[B, N, 1, C]``; copied if channels are not contiguous or rows have no common stride."""
    tensor = rows_contiguous(tensor)
    return (tensor.flatten(1, -2) if tensor.dim() > 2 else tensor[:, None]).unsqueeze(2)


def row_strides(align: int, *tensors: torch.Tensor) -> list[int]:
    """Return the strides of B and N of each ``[B, N, 1, C]`` tensor, in units of `align` elements."""
    return [stride // align for tensor in tensors for stride in head_strides(tensor)[:2]]


def contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    """Return a contiguous vector; None stays None."""
    return None if vector is None else vector.contiguous()


def launch_forward(
    tensors: Tensors, options: Options, *, config: LaunchConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward kernel.

    Args:
        tensors: the operator's.
        options: the operator's; `backend` does not matter.
        config: overrides `choose_config`.

    Returns:
        The sum and its LayerNorm, contiguous, in the shape and dtype of `x`; the second is empty if there is no weight.
    """
    x, y, *vectors = tensors
    channels = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape if tensors.norm_weight is not None else (0,), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out, normed
    x, y = as_rows(x), as_rows(y)
    config = config or choose_config(channels)
    rows = x.shape[0] * x.shape[1]
    programs, share = rows_of_programs("forward", rows, config.block_m)
    align = common_alignment(x, y)
    tiling = Tiling(channels, config.cover, config.block_m, GATE_STRIDE=int(tensors.gate.shape[0] > 1), ALIGN=align)
    with device_guard(x):
        forward_kernel[(programs,)](
            x, y, *map(contiguous, vectors), options.norm_eps, rows, x.shape[1], share,
            *row_strides(align, x, y), out, normed, tiling, **config.options(),
        )  # fmt: skip
    return out, normed
