"""The public function: semantics, checks and the choice of backend."""

from __future__ import annotations

import math
from typing import overload

import torch

from infimm_fast.kernels.common.checks import (
    SUPPORTED_DTYPES,
    KernelArgumentError,
    check_same_kind,
    check_shape,
)
from infimm_fast.kernels.common.launch import dtype_obstacle, settle_backend
from infimm_fast.kernels.residual import ops
from infimm_fast.kernels.residual.config import width_obstacle
from infimm_fast.kernels.residual.options import Tensors
from infimm_fast.kernels.residual.reference import gated_residual_reference


@overload
def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, keep: torch.Tensor | None = None, *, norm_weight: None = None,
    norm_bias: None = None, norm_eps: float = 1e-5, backend: str = "auto",
) -> torch.Tensor: ...  # fmt: skip


@overload
def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, keep: torch.Tensor | None = None, *, norm_weight: torch.Tensor,
    norm_bias: torch.Tensor, norm_eps: float = 1e-5, backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    keep: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Add a gated branch to the hidden states, ``out = x + keep * tanh(gate) * y``, and normalise the sum in the same pass.

    Everything is computed in fp32 (fp64 for fp64) and rounded once. The LayerNorm is that of ``out`` as it is stored,
    so that a pass of its own would give the same numbers.

    Args:
        x: hidden states ``[B, ..., C]``, fp16, bf16 or fp32 (fp64 not in Triton); any strides. Tensors are read in place
            if their last axis is contiguous and the axes between the first and the last have one common stride.
        y: the branch, like `x`.
        gate: ``[C]``, one for each channel, or ``[1]``, one for all; any of these dtypes, also another than that of `x`.
        keep: bool, integer or floating point ``[B]``, a factor for each batch row; a constant, it gets no gradient. A
            row whose factor is 0 passes unchanged to the bit: what `y` holds there, NaN included, reaches neither the
            result nor any gradient, and its gradient is 0.
        norm_weight: ``[C]``, LayerNorm's weight, in any of these dtypes; None for no LayerNorm.
        norm_bias: LayerNorm's bias, like `norm_weight`; both or neither.
        norm_eps: added to the variance, positive.
        backend: ``"triton"`` for the fused kernel (CUDA; CPU under ``TRITON_INTERPRET=1``; C up to 8192),
            ``"sdpa"`` for PyTorch's own functions, ``"reference"`` for the plain statement, ``"auto"`` for Triton
            where it can run and the composite elsewhere.

    Returns:
        ``out``, or with a LayerNorm the pair ``(out, normed)``, in the shape and dtype of `x`.

    Raises:
        KernelArgumentError: an argument does not fit the others, or the backend does not take it.
        BackendUnavailableError: ``"triton"`` was asked for and cannot run here.

    Source: the tanh gates of Flamingo (arXiv 2204.14198, section 3.1.2), one for each channel in InfiMM-HD (arXiv
    2403.01487, section 3); LayerNorm (arXiv 1607.06450).
    """
    norm_eps = float(norm_eps)
    tensors = Tensors(x, y, gate, keep, norm_weight, norm_bias)
    _check(tensors, norm_eps)
    chosen = settle_backend(backend, x, lambda: dtype_obstacle(x) or width_obstacle(x.shape[-1]))
    if chosen == "triton":
        out, normed = torch.ops.infimm_fast.gated_residual(*tensors, norm_eps, chosen)
    elif chosen == "reference":
        out, normed = gated_residual_reference(*tensors, norm_eps)
    else:
        out, normed = ops.composite_forward(tensors, norm_eps)
    return out if norm_weight is None else (out, normed)


def _check(tensors: Tensors, norm_eps: float) -> None:
    x, y, gate, keep, norm_weight, norm_bias = tensors
    if x.dim() < 2 or x.shape[-1] == 0:
        raise KernelArgumentError(f"x has shape {list(x.shape)}; expected [B, ..., C] with at least one channel")
    check_same_kind("x", x, y=y)
    check_shape("y", y, tuple(x.shape), "[B, ..., C] of x")
    channels = x.shape[-1]
    if gate.dim() != 1 or gate.shape[0] not in (1, channels):
        raise KernelArgumentError(f"gate has shape {list(gate.shape)}; expected [C] = [{channels}] or [1]")
    if (norm_weight is None) != (norm_bias is None):
        raise KernelArgumentError("norm_weight and norm_bias go together; only one of them was given")
    vectors = {"gate": gate}
    if norm_weight is not None and norm_bias is not None:
        check_shape("norm_weight", norm_weight, (channels,), "[C]")
        check_shape("norm_bias", norm_bias, (channels,), "[C]")
        check_same_kind("norm_weight", norm_weight, norm_bias=norm_bias)
        vectors["norm_weight"] = norm_weight
    for name, vector in vectors.items():
        if vector.dtype not in SUPPORTED_DTYPES or vector.device != x.device:
            raise KernelArgumentError(f"{name} is {vector.dtype} on {vector.device}; expected floating point on {x.device}")
    if keep is not None:
        check_shape("keep", keep, (x.shape[0],), "[B]")
        if keep.is_complex() or keep.device != x.device:
            raise KernelArgumentError(
                f"keep is {keep.dtype} on {keep.device}; expected bool, integer or floating point on {x.device}"
            )
    if not 0.0 < norm_eps < math.inf:
        raise KernelArgumentError(f"norm_eps={norm_eps} is not accepted; it must be a positive number")
