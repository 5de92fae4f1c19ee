"""The public function: semantics, checks and the choice of backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from infimm_fast.kernels.common.checks import KernelArgumentError, check_choice, check_same_kind, check_shape
from infimm_fast.kernels.subimage_attention.reference import apply_rope, subimage_attention_reference

BACKENDS = ("auto", "sdpa", "reference")


def subimage_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None,
    rope_prefix: int = 0,
    rope_interleaved: bool = True,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Full self-attention inside every tile of a batch of tiles.

    Args:
        q: queries ``[B, N, H, D]`` (tiles, tokens, heads, head dim); any strides.
        k: keys, like `q`.
        v: values, like `q`.
        scale: multiplies the scores; default ``D ** -0.5``.
        rope_cos: cosines ``[N - rope_prefix, D]`` of the tower's rotary position embedding, or None for no RoPE.
        rope_sin: sines, like `rope_cos`.
        rope_prefix: leading tokens that RoPE leaves alone (1 for a class token).
        rope_interleaved: RoPE pairs are channels ``(2i, 2i + 1)`` as in EVA02; False pairs ``(i, i + D / 2)`` as Qwen.
        return_lse: also return the log-sum-exp of the scaled scores (natural log, fp32, ``[B, H, N]``). It is not
            differentiable, and only the reference backend computes it.
        backend: ``"sdpa"`` for PyTorch's fused attention, ``"reference"`` for the plain statement with the score matrix
            in memory, ``"auto"`` for the best one available.

    Returns:
        ``[B, N, H, D]`` in the dtype of `q`, or the pair of it and the log-sum-exp.

    Raises:
        KernelArgumentError: shapes, dtypes or devices do not fit together, or the backend is not known.

    Source: ViT self-attention (arXiv 2010.11929); EVA-CLIP's towers (arXiv 2303.15389).
    """
    check_choice("backend", backend, BACKENDS)
    check_shape("q", q, (None, None, None, None), "[B, N, H, D]")
    check_shape("k", k, tuple(q.shape), "[B, N, H, D] of q")
    check_shape("v", v, tuple(q.shape), "[B, N, H, D] of q")
    check_same_kind("q", q, k=k, v=v)
    if (rope_cos is None) != (rope_sin is None):
        raise KernelArgumentError("rope_cos and rope_sin go together; only one of them was given")
    if rope_cos is not None and rope_sin is not None:
        table_shape = (q.shape[1] - rope_prefix, q.shape[3])
        check_shape("rope_cos", rope_cos, table_shape, "[N - rope_prefix, D]")
        check_shape("rope_sin", rope_sin, table_shape, "[N - rope_prefix, D]")
        q = apply_rope(q, rope_cos, rope_sin, rope_prefix, rope_interleaved)
        k = apply_rope(k, rope_cos, rope_sin, rope_prefix, rope_interleaved)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if return_lse and backend == "sdpa":
        raise KernelArgumentError("backend='sdpa' has no log-sum-exp to return; accepted with return_lse are reference, auto")
    if backend == "reference" or return_lse:
        out, lse = subimage_attention_reference(q, k, v, scale)
        return (out, lse.detach()) if return_lse else out
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)
