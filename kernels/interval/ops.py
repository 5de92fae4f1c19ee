"""The torch operator: schema, shapes, autograd, and the composite that serves CPU tensors. Torch only.

``infimm_fast::interval_attention`` returns ``(out, lse)``; the log-sum-exp is not differentiable. Its backward is an
operator too, so that compiled and checkpointed graphs hold it as a single node. Triton is imported when an operator
runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from infimm_fast.kernels.common.launch import resolve_backend
from infimm_fast.kernels.common.operators import attention_outputs, fresh, refuse_vmap
from infimm_fast.kernels.interval.options import Options, Saved
from infimm_fast.kernels.interval.reference import interval_mask
from infimm_fast.kernels.interval.runs import attend_runs, find_runs


def composite_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_range: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention by PyTorch's fused kernel, differentiable.

    Without a mask where the intervals can be read; else batch and text are one query axis under one dense mask.
    """
    if (runs := find_runs(kv_range, k.shape[0])) is not None:
        return attend_runs(q, k, v, runs, scale)
    if k.shape[0] == 0:
        return torch.zeros_like(q)
    batch, length, heads, head_dim = q.shape
    kv_range = kv_range.clamp(0, k.shape[0]).reshape(batch * length, 2)
    nonempty = kv_range[:, 0] < kv_range[:, 1]
    # A token that sees nothing is shown key 0, and its result is dropped: softmax over no key would be NaN.
    start = torch.where(nonempty, kv_range[:, 0], 0)
    end = torch.where(nonempty, kv_range[:, 1], 1)
    mask = interval_mask(torch.stack((start, end), dim=-1), k.shape[0])  # [B * T, S]
    # A branch, since a traced head count may be symbolic, and the argument may not.
    grouped = {"enable_gqa": True} if heads != k.shape[1] else {}
    out = F.scaled_dot_product_attention(
        q.reshape(1, batch * length, heads, head_dim).transpose(1, 2),
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask[None, None],
        scale=scale,
        **grouped,
    )
    out = out.transpose(1, 2).reshape(batch, length, heads, head_dim)
    return out.masked_fill(~nonempty.view(batch, length, 1, 1), 0.0)


def composite_lse(q: torch.Tensor, k: torch.Tensor, kv_range: torch.Tensor, scale: float) -> torch.Tensor:
    """Log-sum-exp of the scaled scores, fp32 ``[B, Hq, T]``; the scores of one batch row at a time are in memory."""
    rows = [torch.logsumexp(_scores(*pair, k, scale), dim=-1) for pair in zip(q, kv_range, strict=True)]
    return torch.stack(rows).flatten(1, 2).float() if rows else q.new_empty((0, *q.shape[2:0:-1]), dtype=torch.float32)


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Return ``[..., Hq, D]`` as ``[..., Hkv, group, D]`` in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-2, (kv_heads, -1))


def _scores(q: torch.Tensor, kv_range: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled scores ``[Hkv, group, T, S]`` of one batch row in at least fp32, -inf where a key is not seen."""
    q = _grouped(q, k.shape[1])
    scores = torch.einsum("thgd,shd->hgts", q, k.to(q.dtype)) * scale
    return scores.masked_fill(~interval_mask(kv_range, k.shape[0]), float("-inf"))


def _composite_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_range: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv; the probabilities of one batch row at a time are in memory, in at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    wide_k, wide_v = k.to(wide), v.to(wide)
    dq, dk, dv = torch.empty_like(q, dtype=wide), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    # Whatever gradient arrives at a token that sees nothing stays there.
    bounds = kv_range.clamp(0, k.shape[0])
    grad = grad.masked_fill((bounds[..., 0] >= bounds[..., 1])[..., None, None], 0.0)
    for row in range(q.shape[0]):
        row_q, row_grad = _grouped(q[row], k.shape[1]), _grouped(grad[row], k.shape[1])
        p = torch.softmax(_scores(q[row], kv_range[row], k, scale), dim=-1).nan_to_num(0.0)  # [Hkv, group, T, S]
        dv += torch.einsum("hgts,thgd->shd", p, row_grad)
        dp = torch.einsum("thgd,shd->hgts", row_grad, wide_v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[row] = torch.einsum("hgts,shd->thgd", ds, wide_k).flatten(1, 2)
        dk += torch.einsum("hgts,thgd->shd", ds, row_q)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@torch.library.custom_op("infimm_fast::interval_attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_range: torch.Tensor, scale: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if resolve_backend(backend, q) == "triton":
        from infimm_fast.kernels.interval.forward import launch_forward

        return launch_forward(q, k, v, kv_range, Options(scale))
    return composite_forward(q, k, v, kv_range, scale).contiguous(), composite_lse(q, k, kv_range, scale)


@torch.library.custom_op(
    "infimm_fast::interval_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor kv_range, Tensor out, Tensor lse, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
def _attention_backward(grad: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    saved, options = Saved(*rest[:6]), Options(*rest[6:])
    gradients = tuple(fresh(x) for x in saved[:3])
    if resolve_backend(options.backend, saved.q) == "triton":
        from infimm_fast.kernels.interval.backward import launch_backward

        launch_backward(grad, saved, options, gradients)
        return gradients
    for target, value in zip(gradients, _composite_backward(grad, *saved[:4], options.scale), strict=True):
        target.copy_(value)
    return gradients


@_attention.register_fake
def _(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_outputs(q)


@_attention_backward.register_fake
def _(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return fresh(q), fresh(k), fresh(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return (*_attention_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None)


_attention.register_autograd(_differentiate, setup_context=_setup)
refuse_vmap(
    _attention,
    _attention_backward,
    reason="infimm_fast's cross-attention cannot be vmapped; fold the mapped axis into the batch, the first axis of q",
)
