"""The torch operators: schemas, shapes, autograd, and the composite that serves CPU tensors. Torch only.

``infimm_fast::subimage_attention`` takes q, k, v apart, ``infimm_fast::subimage_attention_packed`` takes them in one
tensor; they are two operators because autograd would otherwise build the packed gradient out of three zero-filled ones.
Both return ``(out, lse)``; the log-sum-exp is not differentiable. The backward passes are operators too, so that
compiled and checkpointed graphs hold them as single nodes. Triton is imported when an operator runs.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F

from infimm_fast.kernels.common.launch import resolve_backend
from infimm_fast.kernels.subimage.reference import apply_rope, rotate_pairs, visible_mask

_OPTIONS = (
    "float scale, Tensor? rope_cos, Tensor? rope_sin, int rope_prefix, bool rope_interleaved, Tensor? seqlens, "
    "Tensor? cu_seqlens, SymInt max_seqlen, bool is_causal, str backend"
)
# What follows the tensors in both operators, in the order of the schema.
Options = tuple[
    float,
    torch.Tensor | None,
    torch.Tensor | None,
    int,
    bool,
    torch.Tensor | None,
    torch.Tensor | None,
    int,
    bool,
    str,
]


def drop_padding(seqlens: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Zero the tokens ``[B, N, H, D]`` at or past each tile's length, so that nothing stored there can spread."""
    if seqlens is None:
        return tensors
    index = torch.arange(tensors[0].shape[1], device=seqlens.device)
    padding = (index >= seqlens[:, None])[:, :, None, None]
    return tuple(tensor.masked_fill(padding, 0.0) for tensor in tensors)


def composite_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    seqlens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    """Attention by PyTorch's fused kernel; q and k are rotated already. Differentiable."""
    q, k, v = (x.transpose(1, 2) for x in drop_padding(seqlens, q, k, v))
    if seqlens is None and cu_seqlens is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=is_causal).transpose(1, 2)
    mask = visible_mask(q.shape[2], q.device, seqlens, cu_seqlens, is_causal)
    assert mask is not None  # lengths were given
    # A query that sees nothing is shown every key, and its result is dropped: softmax over no key would be NaN.
    empty = ~mask.any(-1, keepdim=True)  # [B or 1, N, 1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask | empty)[:, None], scale=scale)
    return out.transpose(1, 2).masked_fill(empty[..., None], 0.0)


def composite_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    seqlens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    """Log-sum-exp of the scaled scores, fp32 ``[B, H, N]``; the scores of one tile at a time are in memory."""
    mask = visible_mask(q.shape[1], q.device, seqlens, cu_seqlens, is_causal)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    for tile in range(q.shape[0]):
        lse[tile] = torch.logsumexp(_scores(q[tile], k[tile], scale, _mask_of(mask, tile)), dim=-1)
    return lse


def _mask_of(mask: torch.Tensor | None, tile: int) -> torch.Tensor | None:
    return None if mask is None else mask[tile if mask.shape[0] > 1 else 0]


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Scaled scores ``[H, N, N]`` of one tile in at least fp32, -inf where the mask hides a key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("nhd,mhd->hnm", q.to(wide), k.to(wide)) * scale
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def _rotate(x: torch.Tensor, options: Options) -> torch.Tensor:
    _, cos, sin, prefix, interleaved, *_ = options
    return x if cos is None or sin is None else apply_rope(x, cos, sin, prefix, interleaved)


def _rotate_back(x: torch.Tensor, options: Options) -> torch.Tensor:
    """Apply the transposed rotation; a quarter turn transposed is its negative."""
    _, cos, sin, prefix, interleaved, *_ = options
    if cos is None or sin is None:
        return x
    head, tail = x[:, :prefix], x[:, prefix:]
    turned = tail * cos[:, None].to(x.dtype) - rotate_pairs(tail * sin[:, None].to(x.dtype), interleaved)
    return torch.cat((head, turned), dim=1)


def _composite_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv; probabilities of one tile at a time are in memory, in at least fp32."""
    scale, _, _, _, _, seqlens, cu_seqlens, _, is_causal, _ = options
    wide = torch.promote_types(q.dtype, torch.float32)
    grad, q, k, v = drop_padding(seqlens, grad, q, k, v)
    q, k = _rotate(q, options).to(wide), _rotate(k, options).to(wide)
    grad, v = grad.to(wide), v.to(wide)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    mask = visible_mask(q.shape[1], q.device, seqlens, cu_seqlens, is_causal)
    for tile in range(q.shape[0]):
        p = torch.softmax(_scores(q[tile], k[tile], scale, _mask_of(mask, tile)), dim=-1).nan_to_num(0.0)  # [H, N, N]
        dv[tile] = torch.einsum("hnm,nhd->mhd", p, grad[tile])
        dp = torch.einsum("nhd,mhd->hnm", grad[tile], v[tile])
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[tile] = torch.einsum("hnm,mhd->nhd", ds, k[tile])
        dk[tile] = torch.einsum("hnm,nhd->mhd", ds, q[tile])
    return _rotate_back(dq, options), _rotate_back(dk, options), dv


def _lengths(options: Options) -> tuple[torch.Tensor | None, bool]:
    """Return what the Triton launchers call (lengths, packed)."""
    seqlens, cu_seqlens = options[5], options[6]
    return (cu_seqlens, True) if cu_seqlens is not None else (seqlens, False)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    scale, cos, sin, prefix, interleaved, seqlens, cu_seqlens, max_seqlen, is_causal, backend = options
    if resolve_backend(backend, q) == "triton":
        from infimm_fast.kernels.subimage.forward import launch_forward

        return launch_forward(q, k, v, scale, cos, sin, prefix, interleaved, *_lengths(options), max_seqlen, is_causal)
    q, k = _rotate(q, options), _rotate(k, options)
    out = composite_forward(q, k, v, scale, seqlens, cu_seqlens, is_causal).contiguous()
    q, k = drop_padding(seqlens, q, k)
    return out, composite_lse(q, k, scale, seqlens, cu_seqlens, is_causal)


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """Fill the gradients."""
    scale, cos, sin, prefix, interleaved, _, _, max_seqlen, is_causal, backend = options
    if resolve_backend(backend, q) == "triton":
        from infimm_fast.kernels.subimage.backward import launch_backward

        launch_backward(
            grad, q, k, v, out, lse, scale, cos, sin, prefix, interleaved, *_lengths(options), max_seqlen, is_causal,
            dq, dk, dv,
        )  # fmt: skip
        return
    for target, value in zip((dq, dk, dv), _composite_backward(grad, q, k, v, options), strict=True):
        target.copy_(value)


def _fresh(x: torch.Tensor) -> torch.Tensor:
    """Allocate a contiguous tensor like `x`."""
    return x.new_empty(x.shape)


def _outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads, _ = q.shape
    return _fresh(q), q.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op(
    "infimm_fast::subimage_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(q, k, v, options)


@torch.library.custom_op(
    "infimm_fast::subimage_attention_backward",
    mutates_args=(),
    schema=(f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"),
)
def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = _fresh(q), _fresh(k), _fresh(v)
    _backward(grad, q, k, v, out, lse, options, *gradients)
    return gradients


@torch.library.custom_op(
    "infimm_fast::subimage_attention_packed",
    mutates_args=(),
    schema=f"(Tensor qkv, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _attention_packed(qkv: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = qkv.unbind(2)
    return _forward(q, k, v, options)


@torch.library.custom_op(
    "infimm_fast::subimage_attention_packed_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_OPTIONS}) -> Tensor",
)
def _attention_packed_backward(
    grad: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *options: Any
) -> torch.Tensor:
    gradient = _fresh(qkv)
    q, k, v = qkv.unbind(2)
    dq, dk, dv = gradient.unbind(2)
    _backward(grad, q, k, v, out, lse, options, dq, dk, dv)
    return gradient


@_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(q)


@_attention_packed.register_fake
def _(qkv: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(qkv[:, :, 0])


@_attention_backward.register_fake
def _(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return _fresh(q), _fresh(k), _fresh(v)


@_attention_packed_backward.register_fake
def _(grad: torch.Tensor, qkv: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _fresh(qkv)


def _keep(ctx: Any, tensors: tuple[torch.Tensor, ...], options: Options, output: tuple[torch.Tensor, ...]) -> None:
    """Save what the backward needs; tensors among the options are saved like the others."""
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, *(x for x in options if isinstance(x, torch.Tensor)))
    ctx.options = tuple(None if isinstance(x, torch.Tensor) else x for x in options)
    ctx.tensor_options = tuple(i for i, x in enumerate(options) if isinstance(x, torch.Tensor))


def _kept(ctx: Any, count: int) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
    """Return the first `count` saved tensors and the options."""
    options = list(ctx.options)
    saved = ctx.saved_tensors  # read once: checkpointing recomputes them at every access, and refuses a second one
    for index, tensor in zip(ctx.tensor_options, saved[count:], strict=True):
        options[index] = tensor
    return saved[:count], tuple(options)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _keep(ctx, inputs[:3], inputs[3:], output)


def _setup_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _keep(ctx, inputs[:1], inputs[1:], output)


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    tensors, options = _kept(ctx, 5)
    return (*_attention_backward(grad, *tensors, *options), *[None] * len(options))


def _differentiate_packed(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    tensors, options = _kept(ctx, 3)
    return (_attention_packed_backward(grad, *tensors, *options), *[None] * len(options))


def _refuse_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
    raise NotImplementedError(
        "infimm_fast's attention cannot be vmapped; fold the mapped axis into the tiles, its first axis"
    )


_attention.register_autograd(_differentiate, setup_context=_setup)
_attention_packed.register_autograd(_differentiate_packed, setup_context=_setup_packed)
for _op in (_attention, _attention_packed, _attention_backward, _attention_packed_backward):
    _op.register_vmap(_refuse_vmap)
