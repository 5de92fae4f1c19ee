"""What attention of towers and of text competes with: the naive path, SDPA with its backends, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from infimm_fast.benchmarks.registry import BenchCase

# On [B, T, heads, head_dim] and [B, S, heads, head_dim].
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Maker = Callable[[BenchCase, torch.device], Attention]
FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLEX_MODES = {"flex": "default", "flex max-autotune": "max-autotune-no-cudagraphs"}


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Scores, mask and probabilities in memory, as models without a fused attention do it."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    scores = scores if mask is None else scores + mask
    return (scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def sdpa(mask: torch.Tensor | None = None, backend: SDPBackend | None = None) -> Attention:
    """PyTorch's fused attention, as it chooses or with one backend forced."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attention


def flex(mode: str, block_mask: Any = None) -> Attention:
    """FlexAttention, compiled in one of `FLEX_MODES`, with a block mask made beforehand."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False, mode=FLEX_MODES[mode])

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask).transpose(1, 2)

    return attention


def flex_properties(mode: str) -> dict[str, Any]:
    """Return what compiling in one of `FLEX_MODES` means for an implementation."""
    return {"setup_seconds": 8.0} if mode == "flex" else {"setup_seconds": 30.0, "main_only": True}


def once_for_case(make: Maker) -> Maker:
    """Return `make` with its last result kept, so that all sets of inputs of a case share masks and compiled functions.

    A mask of its own for each set would make FlexAttention compile anew for each, and give up after eight.
    """
    last: list[tuple[BenchCase, Attention]] = []

    def made(case: BenchCase, device: torch.device) -> Attention:
        if not last or last[0][0] is not case:
            last[:] = [(case, make(case, device))]
        return last[0][1]

    return made
