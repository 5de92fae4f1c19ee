"""The maths of sub-image attention in plain PyTorch: the oracle that every backend is compared with."""

from __future__ import annotations

import torch


def rotate_pairs(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return the quarter-turned partner of every pair of channels, ``(a, b) -> (-b, a)``.

    Args:
        x: ``[..., D]``.
        interleaved: pairs are neighbours ``(2i, 2i + 1)`` (EVA02); otherwise ``(i, i + D / 2)`` (Qwen).
    """
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack((-second, first), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, prefix: int = 0, interleaved: bool = True
) -> torch.Tensor:
    """Rotate all tokens but the first `prefix` ones by their angles.

    Args:
        x: queries or keys ``[B, N, H, D]``.
        cos: ``[N - prefix, D]``, one angle for each token and channel.
        sin: like `cos`.
        prefix: leading tokens left alone (the class token).
        interleaved: see `rotate_pairs`.

    Returns:
        ``[B, N, H, D]`` in the dtype of `x`; the rotation itself runs in at least float32.
    """
    head, tail = x[:, :prefix], x[:, prefix:]
    wide = torch.promote_types(x.dtype, torch.float32)
    tail_wide = tail.to(wide)
    rotated = tail_wide * cos[:, None].to(wide) + rotate_pairs(tail_wide, interleaved) * sin[:, None].to(wide)
    return torch.cat((head, rotated.to(x.dtype)), dim=1)


def subimage_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the whole score matrix in memory; softmax in at least float32, probabilities rounded before P V.

    Args:
        q: ``[B, N, H, D]``, already rotated if the tower has RoPE.
        k: like `q`.
        v: like `q`.
        scale: multiplies the scores.

    Returns:
        The output ``[B, N, H, D]`` in the dtype of `q` and the log-sum-exp of the scaled scores ``[B, H, N]``.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k).to(wide) * scale  # [B, H, N, N]
    lse = torch.logsumexp(scores, dim=-1)
    probabilities = torch.softmax(scores, dim=-1).to(q.dtype)
    return torch.einsum("bhnm,bmhd->bnhd", probabilities, v), lse
