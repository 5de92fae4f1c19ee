"""What the torch operators of all ops share. Torch only."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


def fresh(x: torch.Tensor) -> torch.Tensor:
    """Allocate a contiguous tensor like `x`."""
    return x.new_empty(x.shape)


def attention_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate what attention of queries ``[B, N, H, D]`` returns: the output, and the log-sum-exp, fp32 ``[B, H, N]``."""
    batch, tokens, heads, _ = q.shape
    return fresh(q), q.new_empty((batch, heads, tokens), dtype=torch.float32)


def refuse_vmap(*operators: Any, reason: str) -> None:
    """Make `torch.vmap` of custom operators raise `NotImplementedError`, which says what to do in its place."""

    def refuse(info: Any, in_dims: Any, *arguments: Any) -> NoReturn:
        raise NotImplementedError(reason)

    for operator in operators:
        operator.register_vmap(refuse)
