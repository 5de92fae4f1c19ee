"""The gated residual on text states: a prompt and a decoding batch of a 13B decoder, hidden sizes of others, odd sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from infimm_fast.kernels.common.cases import (
    BENCH,
    GATE,
    PROFILE,
    SMALL,
    TUNE,
    Case,
    Cost,
    Inputs,
    Job,
    Op,
    Outputs,
    Rules,
)
from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.common.numerics import outlier_normal
from infimm_fast.kernels.residual.api import gated_residual
from infimm_fast.kernels.residual.config import choose_config
from infimm_fast.kernels.residual.options import Gradients, Options, Saved, Tensors
from infimm_fast.kernels.residual.reference import gated_residual_reference

LEAVES = ("x", "y", "gate", "norm_weight", "norm_bias")
# Hidden sizes of decoders: small ones, 7B, 13B, 70B.
CHANNELS = (1024, 2048, 4096, 5120, 8192)
# The LayerNorm's backward of 8192 channels holds three fp32 sums beside its row, 16 of each for each of 512 threads, and no
# thread of so many may have more than 128 registers. On 90 it is 54 with triton 3.6.
_SPILLS = {
    "bfloat16": {80: 50, 89: 50, 90: 54, 100: 46, 120: 60},
    "float32": {80: 195, 89: 195, 90: 195, 100: 173, 120: 162},
}


def _make_cases() -> Iterator[Case]:
    prompt, step = {"rows": 1, "tokens": 2048, "width": 5120}, {"rows": 1, "tokens": 64, "width": 5120}
    yield Case("2048 tokens", prompt, importance=2)
    yield Case("2048 tokens, with backward", prompt, backward=True, importance=2, uses=(BENCH, TUNE, PROFILE))
    yield Case("64 tokens", step, importance=2)
    for width in CHANNELS:
        for name, plain in (("plain", 1), ("normed", 0)):
            sizes = {"rows": 2, "tokens": 2048, "width": width, "plain": plain, "keep": 1, "wide_vectors": 1}
            yield Case(f"{name}, {width} channels", sizes, backward=True, uses=(GATE,))
    kept = {"rows": 3, "tokens": 7, "width": 1000, "plain": 1, "keep": 1}
    yield Case("small", kept, backward=True, uses=(SMALL,))
    yield Case("small, norm", {"rows": 2, "tokens": 13, "width": 776}, backward=True, uses=(SMALL,))


class GatedResidual(Op):
    """``x + tanh(gate) * y`` on ``[rows, tokens, width]``, and the LayerNorm of the sum.

    Sizes: rows, tokens, width; as flags plain (no LayerNorm), keep (every second row is not kept), wide_vectors (gate and
    parameters in fp32, as in mixed precision).
    """

    name = "gated_residual"
    outputs = ("out", "normed")
    leaves = LEAVES
    kernels: ClassVar = {"forward": "forward_kernel", "backward": "backward_kernel"}
    cases = tuple(_make_cases())
    spills: ClassVar = {
        ("backward", dtype, CHANNELS[-1], arch): count for dtype, counts in _SPILLS.items() for arch, count in counts.items()
    }

    def make_inputs(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Return states, branch, gate, the norm's parameters, and the gradients that arrive at the results."""
        sizes = case.sizes
        shape, width = (sizes["rows"], sizes["tokens"], sizes["width"]), sizes["width"]
        shapes = {name: shape if name in ("x", "y") else (width,) for name in LEAVES}
        dtypes = {name: torch.float32 if sizes.get("wide_vectors") and name not in ("x", "y") else dtype for name in LEAVES}
        inputs: Inputs = {
            name: outlier_normal(*shapes[name], dtype=dtypes[name], device=device, seed=seed + index)
            for index, name in enumerate(LEAVES)
        }
        for name in self.leaves_of(case):
            inputs[name].requires_grad_(case.backward)
        inputs["keep"] = torch.arange(shape[0], device=device) % 2 == 0 if sizes.get("keep") else None
        inputs["gradients"] = tuple(
            outlier_normal(*shape, dtype=dtype, device=device, seed=seed + len(LEAVES) + index)
            for index in range(len(self.outputs_of(case)))
        )
        return inputs

    def outputs_of(self, case: Case) -> tuple[str, ...]:
        """Return the outputs that a case has."""
        return self.outputs[:1] if case.sizes.get("plain") else self.outputs

    def leaves_of(self, case: Case) -> tuple[str, ...]:
        """Return the leaves of a case; without a LayerNorm there are no parameters."""
        return LEAVES[:3] if case.sizes.get("plain") else LEAVES

    def call(self, case: Case, inputs: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
        """Return the sum and, unless the case is plain, its LayerNorm."""
        x, y, gate, weight, bias = (inputs[name] for name in LEAVES)
        if case.sizes.get("plain"):
            return (gated_residual(x, y, gate, inputs["keep"], backend=backend),)
        return gated_residual(x, y, gate, inputs["keep"], norm_weight=weight, norm_bias=bias, backend=backend)

    def reference(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the plain statement's results."""
        leaves = [inputs[name].detach().to(dtype).requires_grad_(case.backward) for name in self.leaves_of(case)]
        norm = dict(zip(("norm_weight", "norm_bias"), leaves[3:], strict=False))
        x, y, gate = leaves[:3]
        found = [one for one in gated_residual_reference(x, y, gate, inputs["keep"], **norm) if one is not None]
        outputs = dict(zip(self.outputs, (one.detach() for one in found), strict=False))
        if not case.backward:
            return outputs
        gradients = torch.autograd.grad(found, leaves, [one.to(dtype) for one in inputs["gradients"]])
        return outputs | dict(zip(LEAVES, gradients, strict=False))

    def checked(self, case: Case, results: tuple[torch.Tensor, ...]) -> Outputs:
        """Return outputs and gradients by name."""
        return dict(zip((*self.outputs_of(case), *self.leaves_of(case)), results, strict=False))

    def cost(self, case: Case, dtype: torch.dtype, kernel: str | None = None) -> Cost:
        """Return x, y, out and normed of a forward, and of a backward two gradients in, out and y, two gradients out."""
        values = case.sizes["rows"] * case.sizes["tokens"] * case.sizes["width"]
        kernels = self.kernels_of(case) if kernel is None else (kernel,)
        flops = sum({"forward": 10, "backward": 20}[one] for one in kernels)
        tensors = sum({"forward": 4, "backward": 6}[one] for one in kernels)
        return Cost(flops * values, tensors * values * dtype.itemsize)

    def kernels_of(self, case: Case) -> tuple[str, ...]:
        """Return forward, and backward if there is one."""
        return ("forward", "backward") if case.backward else ("forward",)

    def width(self, case: Case) -> int:
        """Return the channels."""
        return case.sizes["width"]

    def config(self, job: Job) -> LaunchConfig:
        """Return the shipped configuration, the same for both kernels."""
        return choose_config(job.case.sizes["width"])

    def launch(self, job: Job, inputs: Inputs, config: LaunchConfig) -> Any:
        """Run one launcher; the other kernel of a backward job has the shipped configuration."""
        from infimm_fast.kernels.residual.backward import launch_backward
        from infimm_fast.kernels.residual.forward import launch_forward

        x, y, gate, weight, bias = (inputs[name].detach() for name in LEAVES)
        keep, options = inputs["keep"], Options()
        if job.case.sizes.get("plain"):
            weight = bias = None
        backward = job.kernel == "backward"
        forward_config = self.config(job) if backward else config
        tensors = Tensors(x, y, gate, keep, weight, bias)
        results = inputs.get("forward") or launch_forward(tensors, options, config=forward_config)
        if not backward:
            return results
        gradients = Gradients(*(torch.empty_like(inputs[name]) for name in LEAVES))
        grad, grad_normed = inputs["gradients"][0], inputs["gradients"][-1]
        saved = Saved(y, gate, keep, weight, results[0])
        launch_backward(grad, grad_normed, saved, options, gradients=gradients, config=config)
        if weight is None:
            gradients = gradients._replace(dx=grad)
        return *results[: len(self.outputs_of(job.case))], *gradients[: len(self.leaves_of(job.case))]

    def rules(self, job: Job, config: LaunchConfig) -> Rules:
        """Rows are read and written whole."""
        return Rules(no_elements=job.dtype != "float32", mostly_wide=job.kernel == "forward")


OP = GatedResidual()
