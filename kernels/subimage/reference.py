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


def visible_mask(
    tokens: int,
    device: torch.device,
    seqlens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor | None:
    """Return which query sees which key, bool ``[B or 1, N, N]``, or None if everyone sees everything.

    Args:
        tokens: N.
        device: where the mask is made.
        seqlens: ``[B]``; tokens at or past a tile's length neither see nor are seen.
        cu_seqlens: ``[sequences + 1]``; tokens see their own sequence. Tokens outside every sequence see nothing.
        is_causal: a token sees no later one.
    """
    if seqlens is None and cu_seqlens is None and not is_causal:
        return None
    index = torch.arange(tokens, device=device)
    mask = torch.ones(1, tokens, tokens, dtype=torch.bool, device=device)
    if seqlens is not None:
        valid = index < seqlens[:, None]  # [B, N]
        mask = valid[:, :, None] & valid[:, None, :]
    if cu_seqlens is not None:
        # 0 is before the first sequence, len(cu_seqlens) behind the last.
        sequence = torch.searchsorted(cu_seqlens.to(index.dtype), index, right=True)
        inside = (sequence > 0) & (sequence < cu_seqlens.shape[0])
        mask = ((sequence[:, None] == sequence[None, :]) & inside[:, None])[None]
    if is_causal:
        mask = mask & (index[:, None] >= index[None, :])
    return mask


def subimage_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    seqlens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the whole score matrix in memory; softmax in at least float32, probabilities rounded before P V.

    Args:
        q: ``[B, N, H, D]``, already rotated if the tower has RoPE.
        k: like `q`.
        v: like `q`.
        scale: multiplies the scores.
        seqlens: see `visible_mask`.
        cu_seqlens: see `visible_mask`.
        is_causal: see `visible_mask`.

    Returns:
        The output ``[B, N, H, D]`` in the dtype of `q` and the log-sum-exp of the scaled scores ``[B, H, N]``. A token
        that sees nothing has output 0 and log-sum-exp -inf.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k).to(wide) * scale  # [B, H, N, N]
    mask = visible_mask(q.shape[1], q.device, seqlens, cu_seqlens, is_causal)
    if mask is None:
        probabilities = torch.softmax(scores, dim=-1).to(q.dtype)
        return torch.einsum("bhnm,bmhd->bnhd", probabilities, v), torch.logsumexp(scores, dim=-1)
    mask = mask[:, None]  # [B or 1, 1, N, N]
    lse = torch.logsumexp(scores.masked_fill(~mask, float("-inf")), dim=-1)
    # A row without any visible key would be NaN: let it see all keys for the softmax, then drop what it must not see.
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask & ~empty, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0).to(q.dtype)
    return torch.einsum("bhnm,bmhd->bnhd", probabilities, v), lse
