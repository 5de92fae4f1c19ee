"""What the operators of the gated residual take beside their tensors, and what the backward computes. Torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
