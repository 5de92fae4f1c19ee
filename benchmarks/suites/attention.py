"""What attention of towers and of text competes with: the naive path, SDPA with its backends, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from infimm_fast.benchmarks.registry import BenchCase, Run, needs_cuda, register_implementation
from infimm_fast.kernels.common.cases import Inputs

# On [B, T, heads, head_dim] and [B, S, heads, head_dim].
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Maker = Callable[[BenchCase, torch.device], Attention]
# From the inputs of a case to q, k and v.
Parts = Callable[[BenchCase, Inputs], tuple[torch.Tensor, ...]]
FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLEX_MODES = {"flex": "default", "flex max-autotune": "max-autotune-no-cudagraphs"}
FLEX_PROPERTIES: dict[str, dict[str, Any]] = {
    "flex": {"requires": needs_cuda, "setup_seconds": 8.0},
    "flex max-autotune": {"requires": needs_cuda, "setup_seconds": 30.0, "main_only": True},
}


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


def register_attention(stage: str, parts: Parts, name: str, make: Maker, **properties: Any) -> None:
    """Make an attention an implementation of a stage; `make` returns it for a case, `properties` as for any other."""
    made = once_for_case(make)

    def prepare(case: BenchCase, inputs: Inputs) -> Run:
        attention = made(case, inputs["q"].device)
        if case.backward:
            # Views made before a CUDA graph is captured belong to another stream; autograd would have to wait for that.
            return lambda: attention(*parts(case, inputs))
        q, k, v = parts(case, inputs)
        return lambda: attention(q, k, v)

    register_implementation(stage, name, **properties)(prepare)
