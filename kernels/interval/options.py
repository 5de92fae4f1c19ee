"""What the operators of interval attention take. Torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Saved(NamedTuple):
    """What the backward needs of the forward: its tensors, the output, and the log-sum-exp, in the order of the schema."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_range: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


class Options(NamedTuple):
    """What follows the tensors in both operators, in the order of the schema.

    Attributes:
        scale: multiplies the scores, positive.
        backend: what was asked for, or what it was resolved to.
    """

    scale: float
    backend: str = "auto"
