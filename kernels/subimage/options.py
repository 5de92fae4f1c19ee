"""What the operators of sub-image attention take. Torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Saved(NamedTuple):
    """What the backward needs of the forward: its tensors, the output, and the log-sum-exp, in the order of the schema."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


class Options(NamedTuple):
    """What follows the tensors in every operator, in the order of the schema.

    Attributes:
        scale: multiplies the scores, positive.
        rope_cos: cosines ``[N - rope_prefix, D]``, or None for no RoPE.
        rope_sin: sines, like `rope_cos`.
        rope_prefix: leading tokens that are not rotated.
        rope_interleaved: see `reference.rotate_pairs`.
        seqlens: valid tokens of each tile, int32 or int64 ``[B]``; excludes `cu_seqlens`.
        cu_seqlens: offsets of packed sequences, int32 or int64 ``[sequences + 1]``; B is 1.
        max_seqlen: upper bound of a sequence's length; 0 for N.
        is_causal: a token sees no later token of its tile.
        backend: what was asked for, or what it was resolved to.
    """

    scale: float
    rope_cos: torch.Tensor | None = None
    rope_sin: torch.Tensor | None = None
    rope_prefix: int = 0
    rope_interleaved: bool = True
    seqlens: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0
    is_causal: bool = False
    backend: str = "auto"

    @property
    def lengths(self) -> torch.Tensor | None:
        """What the kernels read about lengths, one number a tile or one offset more than sequences; None if all are N."""
        return self.seqlens if self.cu_seqlens is None else self.cu_seqlens

    @property
    def packed(self) -> bool:
        """Whether the tokens are sequences end to end."""
        return self.cu_seqlens is not None

    def sequences(self, batch: int) -> int:
        """Return how many sequences, packed or one a tile, `batch` tiles hold."""
        return batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


SCHEMA = (
    "float scale, Tensor? rope_cos, Tensor? rope_sin, int rope_prefix, bool rope_interleaved, Tensor? seqlens, "
    "Tensor? cu_seqlens, SymInt max_seqlen, bool is_causal, str backend"
)
