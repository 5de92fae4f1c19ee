"""The torch operators: schemas, shapes, autograd, and the composite that serves CPU tensors. Torch only.

``infimm_fast::subimage_attention`` takes q, k, v apart, ``infimm_fast::subimage_attention_packed`` takes them in one
tensor; they are two operators because autograd would otherwise build the packed gradient out of three zero-filled ones.
Both return ``(out, lse)``; the log-sum-exp is not differentiable. The backward passes are operators too, so that
compiled and checkpointed graphs hold them as single nodes. Triton is imported when an operator runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from infimm_fast.kernels.common.launch import resolve_backend
from infimm_fast.kernels.common.operators import attention_outputs, fresh, refuse_vmap
from infimm_fast.kernels.subimage.options import SCHEMA, Options, Saved
from infimm_fast.kernels.subimage.reference import apply_rope, rotate_pairs, visible_mask

# Fields of the options that hold tensors.
_TENSORS = ("rope_cos", "rope_sin", "seqlens", "cu_seqlens")


def drop_padding(seqlens: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Zero the tokens ``[B, N, H, D]`` at or past each tile's length, so that nothing stored there can spread."""
    if seqlens is None:
        return tensors
    index = torch.arange(tensors[0].shape[1], device=seqlens.device)
    padding = (index >= seqlens[:, None])[:, :, None, None]
    return tuple(tensor.masked_fill(padding, 0.0) for tensor in tensors)


def composite_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> torch.Tensor:
    """Attention by PyTorch's fused kernel; q and k are rotated already. Differentiable."""
    scale, seqlens, cu_seqlens, is_causal = options.scale, options.seqlens, options.cu_seqlens, options.is_causal
    q, k, v = (x.transpose(1, 2) for x in drop_padding(seqlens, q, k, v))
    if seqlens is None and cu_seqlens is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=is_causal).transpose(1, 2)
    mask = visible_mask(q.shape[2], q.device, seqlens, cu_seqlens, is_causal)
    assert mask is not None  # lengths were given
    # A query that sees nothing is shown every key, and its result is dropped: softmax over no key would be NaN.
    empty = ~mask.any(-1, keepdim=True)  # [B or 1, N, 1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask | empty)[:, None], scale=scale)
    return out.transpose(1, 2).masked_fill(empty[..., None], 0.0)


def composite_lse(q: torch.Tensor, k: torch.Tensor, options: Options) -> torch.Tensor:
    """Log-sum-exp of the scaled scores, fp32 ``[B, H, N]``; the scores of one tile at a time are in memory."""
    mask = _mask(q, options)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    for tile in range(q.shape[0]):
        lse[tile] = torch.logsumexp(_scores(q[tile], k[tile], options.scale, _mask_of(mask, tile)), dim=-1)
    return lse


def _mask(q: torch.Tensor, options: Options) -> torch.Tensor | None:
    return visible_mask(q.shape[1], q.device, options.seqlens, options.cu_seqlens, options.is_causal)


def _mask_of(mask: torch.Tensor | None, tile: int) -> torch.Tensor | None:
    return None if mask is None else mask[tile if mask.shape[0] > 1 else 0]


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Scaled scores ``[H, N, N]`` of one tile in at least fp32, -inf where the mask hides a key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("nhd,mhd->hnm", q.to(wide), k.to(wide)) * scale
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def rotate(x: torch.Tensor, options: Options) -> torch.Tensor:
    """Turn queries or keys ``[B, N, H, D]`` by their angles, if there is RoPE; differentiable."""
    cos, sin = options.rope_cos, options.rope_sin
    return x if cos is None or sin is None else apply_rope(x, cos, sin, options.rope_prefix, options.rope_interleaved)


def _rotate_back(x: torch.Tensor, options: Options) -> torch.Tensor:
    """Apply the transposed rotation; a quarter turn transposed is its negative."""
    cos, sin, prefix, interleaved = options.rope_cos, options.rope_sin, options.rope_prefix, options.rope_interleaved
    if cos is None or sin is None:
        return x
    head, tail = x[:, :prefix], x[:, prefix:]
    turned = tail * cos[:, None].to(x.dtype) - rotate_pairs(tail * sin[:, None].to(x.dtype), interleaved)
    return torch.cat((head, turned), dim=1)


def _composite_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv; probabilities of one tile at a time are in memory, in at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grad, q, k, v = drop_padding(options.seqlens, grad, q, k, v)
    q, k = rotate(q, options).to(wide), rotate(k, options).to(wide)
    grad, v = grad.to(wide), v.to(wide)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    mask = _mask(q, options)
    for tile in range(q.shape[0]):
        scores = _scores(q[tile], k[tile], options.scale, _mask_of(mask, tile))  # [H, N, N]
        p = torch.softmax(scores, dim=-1).nan_to_num(0.0)
        dv[tile] = torch.einsum("hnm,nhd->mhd", p, grad[tile])
        dp = torch.einsum("nhd,mhd->hnm", grad[tile], v[tile])
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * options.scale
        dq[tile] = torch.einsum("hnm,mhd->nhd", ds, k[tile])
        dk[tile] = torch.einsum("hnm,nhd->mhd", ds, q[tile])
    return _rotate_back(dq, options), _rotate_back(dk, options), dv


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    if resolve_backend(options.backend, q) == "triton":
        from infimm_fast.kernels.subimage.forward import launch_forward

        return launch_forward(q, k, v, options)
    q, k = rotate(q, options), rotate(k, options)
    out = composite_forward(q, k, v, options).contiguous()
    q, k = drop_padding(options.seqlens, q, k)
    return out, composite_lse(q, k, options)


def _backward(grad: torch.Tensor, saved: Saved, options: Options, gradients: tuple[torch.Tensor, ...]) -> None:
    """Fill dq, dk and dv."""
    if resolve_backend(options.backend, saved.q) == "triton":
        from infimm_fast.kernels.subimage.backward import launch_backward

        launch_backward(grad, saved, options, gradients)
        return
    for target, value in zip(gradients, _composite_backward(grad, *saved[:3], options), strict=True):
        target.copy_(value)


@torch.library.custom_op(
    "infimm_fast::subimage_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)",
)
def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(q, k, v, Options(*options))


@torch.library.custom_op(
    "infimm_fast::subimage_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(grad: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    saved = Saved(*rest[:5])
    gradients = tuple(fresh(x) for x in saved[:3])
    _backward(grad, saved, Options(*rest[5:]), gradients)
    return gradients


@torch.library.custom_op(
    "infimm_fast::subimage_attention_packed",
    mutates_args=(),
    schema=f"(Tensor qkv, {SCHEMA}) -> (Tensor, Tensor)",
)
def _attention_packed(qkv: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = qkv.unbind(2)
    return _forward(q, k, v, Options(*options))


@torch.library.custom_op(
    "infimm_fast::subimage_attention_packed_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {SCHEMA}) -> Tensor",
)
def _attention_packed_backward(
    grad: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *options: Any
) -> torch.Tensor:
    gradient = fresh(qkv)
    q, k, v = qkv.unbind(2)
    _backward(grad, Saved(q, k, v, out, lse), Options(*options), gradient.unbind(2))
    return gradient


@_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_outputs(q)


@_attention_packed.register_fake
def _(qkv: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_outputs(qkv[:, :, 0])


@_attention_backward.register_fake
def _(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return fresh(q), fresh(k), fresh(v)


@_attention_packed_backward.register_fake
def _(grad: torch.Tensor, qkv: torch.Tensor, *rest: Any) -> torch.Tensor:
    return fresh(qkv)


def _keep(ctx: Any, tensors: tuple[torch.Tensor, ...], options: Options, output: tuple[torch.Tensor, ...]) -> None:
    """Save what the backward needs, the tensors among the options like the others."""
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, *(getattr(options, name) for name in _TENSORS))
    ctx.options = options._replace(rope_cos=None, rope_sin=None, seqlens=None, cu_seqlens=None)


def _kept(ctx: Any) -> tuple[list[torch.Tensor], Options]:
    """Return the saved tensors, the outputs at their end, and the options."""
    saved = ctx.saved_tensors  # read once: checkpointing recomputes them at every access, and refuses a second one
    first = len(saved) - len(_TENSORS)
    return saved[:first], ctx.options._replace(**dict(zip(_TENSORS, saved[first:], strict=True)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _keep(ctx, inputs[:3], Options(*inputs[3:]), output)


def _setup_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _keep(ctx, inputs[:1], Options(*inputs[1:]), output)


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    tensors, options = _kept(ctx)
    return (*_attention_backward(grad, *tensors, *options), *[None] * len(options))


def _differentiate_packed(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    tensors, options = _kept(ctx)
    return (_attention_packed_backward(grad, *tensors, *options), *[None] * len(options))


_attention.register_autograd(_differentiate, setup_context=_setup)
_attention_packed.register_autograd(_differentiate_packed, setup_context=_setup_packed)
refuse_vmap(
    _attention,
    _attention_packed,
    _attention_backward,
    _attention_packed_backward,
    reason="infimm_fast's attention cannot be vmapped; fold the mapped axis into the tiles, its first axis",
)
