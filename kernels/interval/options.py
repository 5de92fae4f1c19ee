"""What the operators of interval attention take beside their tensors."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """What follows the tensors in both operators, in the order of the schema.

    Attributes:
        scale: multiplies the scores, positive.
        backend: what was asked for, or what it was resolved to.
    """

    scale: float
    backend: str = "auto"
