"""Gate, residual and the next LayerNorm, in one pass or in several."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from infimm_fast.benchmarks import registry
from infimm_fast.benchmarks.registry import BenchCase, OpStage, Plan, Run
from infimm_fast.kernels.common.cases import Case, Inputs
from infimm_fast.kernels.residual.cases import LEAVES, OP


def _cases(plan: Plan) -> list[BenchCase]:
    """Return a long prompt with and without the backward pass, and a decoding batch, at the preset's width."""
    long, short = (128, 4) if plan.tiny else (2048, 64)
    kinds = (
        (f"{long} tokens", long, False),
        (f"{long} tokens, with backward", long, True),
        (f"{short} tokens", short, False),
    )
    return [
        BenchCase.of_op(
            OP,
            Case(name, {"rows": 1, "tokens": tokens, "width": plan.config.text_config.hidden_size}, backward, importance=2),
            plan.dtype,
        )
        for name, tokens, backward in kinds
    ]


registry.register_stage(OpStage(OP, "ops", _cases))


def naive(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One PyTorch function after the other, as models write it."""
    out = x + gate.tanh() * y
    return out, F.layer_norm(out, out.shape[-1:], norm_weight, norm_bias)


@registry.register_implementation(OP.name, "naive")
def _naive(case: BenchCase, inputs: Inputs, run: Callable = naive) -> Run:
    return lambda: run(*(inputs[name] for name in LEAVES))


@registry.register_implementation(OP.name, "naive compiled", setup_seconds=10)
def _compiled(case: BenchCase, inputs: Inputs) -> Run:
    return _naive(case, inputs, torch.compile(naive, dynamic=False))


@registry.register_implementation(OP.name, "liger layer norm", requires=registry.needs_cuda)
def _liger(case: BenchCase, inputs: Inputs) -> Run:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # type: ignore[import-not-found]

    x, y, gate, weight, bias = (inputs[name] for name in LEAVES)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out = x + gate.tanh() * y
        return out, LigerLayerNormFunction.apply(out, weight, bias, 1e-5)

    return run
