"""The torch operator: schema, shapes, autograd, and the composite that serves CPU tensors. Torch only.

``infimm_fast::gated_residual`` returns ``(out, normed)``; without a LayerNorm the second is empty. Its backward is an
operator too, so that compiled and checkpointed graphs hold it as a single node. Triton is imported when an operator
runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from infimm_fast.kernels.common.launch import resolve_backend
from infimm_fast.kernels.common.operators import refuse_vmap
from infimm_fast.kernels.residual.options import Gradients, Options, Saved, Tensors
from infimm_fast.kernels.residual.reference import gated_sum, row_factors

# Parts of both schemas.
_VECTORS = "Tensor gate, Tensor? keep, Tensor? norm_weight"
_OPTIONS = "float norm_eps, str backend"


def composite_forward(tensors: Tensors, norm_eps: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the sum and its LayerNorm or None, the latter by PyTorch's fused function; differentiable."""
    x, y, gate, keep, norm_weight, norm_bias = tensors
    wide = torch.promote_types(x.dtype, torch.float32)
    # Nothing to convert: the fewest operations, whose calls take as long as the work of one token.
    plain = x.dtype == gate.dtype == wide
    out = torch.addcmul(x, torch.tanh(gate), y) if plain and keep is None else gated_sum(x, y, gate, keep)
    if norm_weight is None or norm_bias is None:
        return out, None
    if plain and norm_weight.dtype == wide:
        return out, F.layer_norm(out, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    normed = F.layer_norm(out.to(wide), x.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), norm_eps)
    return out, normed.to(x.dtype)


def _norm_backward(
    grad_normed: torch.Tensor, out: torch.Tensor, norm_weight: torch.Tensor, norm_eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of LayerNorm's input, weight and bias, in at least fp32."""
    wide = torch.promote_types(out.dtype, torch.float32)
    variance, mean = torch.var_mean(out.to(wide), dim=-1, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + norm_eps)
    normal, grad_normed = (out.to(wide) - mean) * rstd, grad_normed.to(wide)
    scaled = grad_normed * norm_weight.to(wide)
    through = scaled - scaled.mean(-1, keepdim=True) - normal * (scaled * normal).mean(-1, keepdim=True)
    return through * rstd, (grad_normed * normal).flatten(0, -2).sum(0), grad_normed.flatten(0, -2).sum(0)


def _gate_backward(
    grad: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, keep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dy and dgate in at least fp32; `grad` is the whole gradient of the sum."""
    wide, factor = grad.dtype, row_factors(y, keep)
    y = y.to(wide)
    if factor is not None:
        grad = torch.where(factor != 0, grad * factor, 0.0)
        y = torch.where(factor != 0, y, 0.0)
    slope = torch.tanh(gate.to(wide))
    dgate = (grad * y).flatten(0, -2).sum(0) * (1.0 - slope.square())
    return grad * slope, dgate if gate.shape[0] > 1 else dgate.sum(0, keepdim=True)


def _fresh(x: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    """Allocate a contiguous tensor like `x`, or an empty one."""
    return x.new_empty(x.shape if wanted else (0,))


@torch.library.custom_op(
    "infimm_fast::gated_residual",
    mutates_args=(),
    schema=f"(Tensor x, Tensor y, {_VECTORS}, Tensor? norm_bias, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _residual(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tensors, options = Tensors(*arguments[:6]), Options(*arguments[6:])
    if resolve_backend(options.backend, tensors.x) == "triton":
        from infimm_fast.kernels.residual.forward import launch_forward

        return launch_forward(tensors, options)
    out, normed = composite_forward(tensors, options.norm_eps)
    return out.contiguous(), normed.contiguous() if normed is not None else _fresh(tensors.x, False)


@torch.library.custom_op(
    "infimm_fast::gated_residual_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor grad_normed, Tensor y, {_VECTORS}, Tensor out, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _residual_backward(grad: torch.Tensor, grad_normed: torch.Tensor, *rest: Any) -> Gradients:
    """Return the gradients; without a LayerNorm dx, which is `grad`, and the last two are empty."""
    saved, options = Saved(*rest[:5]), Options(*rest[5:])
    gradients = _gradients(saved)
    if resolve_backend(options.backend, saved.y) == "triton":
        from infimm_fast.kernels.residual.backward import launch_backward

        launch_backward(grad, grad_normed, saved, options, gradients=gradients)
        return gradients
    dx, dy, dgate, dweight, dbias = gradients
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if saved.norm_weight is not None:
        through, weight_sums, bias_sums = _norm_backward(grad_normed, saved.out, saved.norm_weight, options.norm_eps)
        grad = grad + through
        dx.copy_(grad)
        dweight.copy_(weight_sums)
        dbias.copy_(bias_sums)
    for target, value in zip((dy, dgate), _gate_backward(grad, saved.y, saved.gate, saved.keep), strict=True):
        target.copy_(value)
    return gradients


def _gradients(saved: Saved) -> Gradients:
    """Allocate the gradients."""
    normed = saved.norm_weight is not None
    vector = saved.gate if saved.norm_weight is None else saved.norm_weight
    return Gradients(
        _fresh(saved.y, normed), _fresh(saved.y), _fresh(saved.gate), _fresh(vector, normed), _fresh(vector, normed)
    )


@_residual.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = Tensors(*arguments[:6])
    return _fresh(tensors.x), _fresh(tensors.x, tensors.norm_weight is not None)


@_residual_backward.register_fake
def _(grad: torch.Tensor, grad_normed: torch.Tensor, *rest: Any) -> Gradients:
    return _gradients(Saved(*rest[:5]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, y, gate, keep, norm_weight, _, *ctx.options = inputs
    out, normed = output
    if norm_weight is None:
        ctx.mark_non_differentiable(normed)
        out = normed  # not needed; the empty one is saved in its place
    ctx.save_for_backward(y, gate, keep, norm_weight, out)


def _differentiate(ctx: Any, grad: torch.Tensor, grad_normed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx, dy, dgate, dweight, dbias = _residual_backward(grad, grad_normed, *saved, *ctx.options)
    if saved[3] is None:
        return grad, dy, dgate, None, None, None, None, None
    return dx, dy, dgate, None, dweight, dbias, None, None


_residual.register_autograd(_differentiate, setup_context=_setup)
refuse_vmap(
    _residual,
    _residual_backward,
    reason="infimm_fast's gated residual cannot be vmapped; fold the mapped axis into the batch, the first axis of x",
)
