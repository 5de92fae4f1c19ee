"""Gate, residual and the next LayerNorm, in one pass or in several."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from infimm_fast.benchmarks.cases import item_size
from infimm_fast.benchmarks.inputs import random_tensor
from infimm_fast.benchmarks.registry import (
    Case,
    Inputs,
    Op,
    Outputs,
    Plan,
    Run,
    needs_cuda,
    register_implementation,
    register_op,
)
from infimm_fast.kernels import gated_residual
from infimm_fast.kernels.residual.reference import gated_residual_reference

NAME = "gated_residual"
_NAMES = ("x", "y", "gate", "norm_weight", "norm_bias")


@register_op
class GatedResidual(Op):
    """``x + tanh(gate) * y`` on text states ``[1, T, C]``, and the LayerNorm of the sum."""

    name = NAME
    section = "ops"
    outputs = ("out", "normed")
    leaves = _NAMES

    def cases(self, plan: Plan) -> list[Case]:
        """Return a long prompt with and without the backward pass, and a decoding batch."""
        width = plan.config.text_config.hidden_size
        long, short = (128, 4) if plan.tiny else (2048, 64)
        return [
            self._make_case(f"{long} tokens", plan, long, width, backward=False),
            self._make_case(f"{long} tokens, with backward", plan, long, width, backward=True),
            self._make_case(f"{short} tokens", plan, short, width, backward=False),
        ]

    def _make_case(self, name: str, plan: Plan, tokens: int, width: int, backward: bool) -> Case:
        values = tokens * width
        # Forward: x, y, out, normed. Backward besides: two gradients in, out and y again, two gradients out.
        return Case(
            name=name,
            sizes={"tokens": tokens, "width": width},
            dtype=plan.dtype,
            flops=(30 if backward else 10) * values,
            bytes=(10 if backward else 4) * values * item_size(plan.dtype),
            importance=2,
            backward=backward,
        )

    def make_inputs(self, case: Case, device: torch.device, seed: int) -> Inputs:
        """Return states, branch, gate, the norm's parameters, and the gradients that arrive at both results."""
        tokens, width = case.sizes["tokens"], case.sizes["width"]
        shapes = {"x": (1, tokens, width), "y": (1, tokens, width)} | dict.fromkeys(_NAMES[2:], (width,))
        kind = {"dtype": case.torch_dtype, "device": device}
        inputs: Inputs = {
            name: random_tensor(*shape, **kind, seed=seed + index).requires_grad_(case.backward)  # type: ignore[arg-type]
            for index, (name, shape) in enumerate(shapes.items())
        }
        seeds = (seed + len(shapes), seed + len(shapes) + 1)
        inputs["gradients"] = tuple(random_tensor(*shapes["x"], **kind, seed=one) for one in seeds)  # type: ignore[arg-type]
        return inputs

    def reference(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the plain statement's results."""
        x, y, gate, weight, bias = leaves = [
            inputs[name].detach().to(dtype).requires_grad_(case.backward) for name in _NAMES
        ]
        out, normed = gated_residual_reference(x, y, gate, None, weight, bias)
        assert normed is not None
        results = {"out": out.detach(), "normed": normed.detach()}
        if not case.backward:
            return results
        gradients = torch.autograd.grad((out, normed), leaves, [one.to(dtype) for one in inputs["gradients"]])
        return results | dict(zip(_NAMES, gradients, strict=True))


def naive(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One PyTorch function after the other, as models write it."""
    out = x + gate.tanh() * y
    return out, F.layer_norm(out, out.shape[-1:], norm_weight, norm_bias)


@register_implementation(NAME, "naive")
def _naive(case: Case, inputs: Inputs) -> Run:
    return lambda: naive(*(inputs[name] for name in _NAMES))


@register_implementation(NAME, "naive compiled", setup_seconds=10)
def _compiled(case: Case, inputs: Inputs) -> Run:
    compiled = torch.compile(naive, dynamic=False)
    return lambda: compiled(*(inputs[name] for name in _NAMES))


@register_implementation(NAME, "liger layer norm", requires=needs_cuda)
def _liger(case: Case, inputs: Inputs) -> Run:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # type: ignore[import-not-found]

    x, y, gate, weight, bias = (inputs[name] for name in _NAMES)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out = x + gate.tanh() * y
        return out, LigerLayerNormFunction.apply(out, weight, bias, 1e-5)

    return run


def _ours(case: Case, inputs: Inputs, backend: str) -> Run:
    x, y, gate, weight, bias = (inputs[name] for name in _NAMES)
    return lambda: gated_residual(x, y, gate, norm_weight=weight, norm_bias=bias, backend=backend)


@register_implementation(NAME, "infimm_fast sdpa", ours=True)
def _composite(case: Case, inputs: Inputs) -> Run:
    return _ours(case, inputs, "sdpa")


@register_implementation(NAME, "infimm_fast", ours=True, requires=needs_cuda)
def _triton(case: Case, inputs: Inputs) -> Run:
    return _ours(case, inputs, "triton")
