"""What the operators of the gated residual take, and what the backward computes. Torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tensors(NamedTuple):
    """The tensors of the forward, in the order of the schema.

    Attributes:
        x: ``[B, ..., C]``, any strides.
        y: like `x`.
        gate: ``[C]`` or ``[1]``.
        keep: ``[B]``, or None for all ones.
        norm_weight: ``[C]``, or None for no LayerNorm.
        norm_bias: like `norm_weight`.
    """

    x: torch.Tensor
    y: torch.Tensor
    gate: torch.Tensor
    keep: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None


class Saved(NamedTuple):
    """What the backward needs of the forward: some of its `Tensors`, and the sum `out`, which only a LayerNorm's reads."""

    y: torch.Tensor
    gate: torch.Tensor
    keep: torch.Tensor | None
    norm_weight: torch.Tensor | None
    out: torch.Tensor


class Options(NamedTuple):
    """What follows the tensors in both operators, in the order of the schema.

    Attributes:
        norm_eps: added to the variance, positive.
        backend: what was asked for, or what it was resolved to.
    """

    norm_eps: float = 1e-5
    backend: str = "auto"


class Gradients(NamedTuple):
    """What the backward computes; without a LayerNorm `dx` is the incoming gradient, and it and the last two are empty.

    Attributes:
        dx: in the shape of x.
        dy: like `dx`.
        dgate: in the shape of the gate.
        dweight: ``[C]``.
        dbias: ``[C]``.
    """

    dx: torch.Tensor
    dy: torch.Tensor
    dgate: torch.Tensor
    dweight: torch.Tensor
    dbias: torch.Tensor
