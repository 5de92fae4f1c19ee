"""PyTorch's fused attention without a mask, run by run: on a CPU, where reading the intervals costs nothing.

A run is a stretch of neighbouring text tokens with the same interval. A prompt has one for each picture, a decoding step
one for each row; a dense mask would let every row pay for the pictures of all rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from infimm_fast.kernels.common.launch import can_read

# With more runs for each row, one call with a dense mask is cheaper.
MOST_RUNS = 16
# Up to so many tokens of all rows, Python reads the intervals faster than tensor operations compare them.
FEW_TOKENS = 256


class Run(NamedTuple):
    """Tokens ``[first, last)`` of a row see the keys ``[start, end)``; none if the interval is empty."""

    row: int
    first: int
    last: int
    start: int
    end: int


def find_runs(kv_range: torch.Tensor, num_keys: int) -> list[Run] | None:
    """Return the runs of all rows in order, or None where they cannot be read, are too many, or see nothing at all.

    Args:
        kv_range: int32 or int64 ``[B, T, 2]``.
        num_keys: S; intervals are clamped to it.
    """
    if kv_range.device.type != "cpu" or kv_range.numel() == 0 or not can_read(kv_range):
        return None
    rows, tokens = kv_range.shape[:2]
    runs = []
    if rows * tokens <= FEW_TOKENS:
        for row, intervals in enumerate(kv_range.tolist()):
            first = 0
            for token in range(1, tokens + 1):
                if token == tokens or intervals[token] != intervals[first]:
                    runs.append(_run(row, first, token, intervals[first], num_keys))
                    first = token
    else:
        changes = (kv_range[:, 1:] != kv_range[:, :-1]).any(-1).nonzero()  # [n, 2]: row, token before a change
        if len(changes) > MOST_RUNS * rows:
            return None
        firsts = [[0] for _ in range(rows)]
        for row, token in changes.tolist():
            firsts[row].append(token + 1)
        for row, ones in enumerate(firsts):
            intervals = kv_range[row, ones].tolist()
            for first, last, interval in zip(ones, [*ones[1:], tokens], intervals, strict=True):
                runs.append(_run(row, first, last, interval, num_keys))
    if len(runs) > MOST_RUNS * rows or not any(run.start < run.end for run in runs):
        return None
    return runs


def _run(row: int, first: int, last: int, interval: list[int], num_keys: int) -> Run:
    start, end = (min(max(bound, 0), num_keys) for bound in interval)
    return Run(row, first, last, start, max(start, end))


def attend_runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: list[Run], scale: float) -> torch.Tensor:
    """Return the attention of all runs, ``[B, T, Hq, D]``; differentiable.

    Args:
        q: ``[B, T, Hq, D]``.
        k: ``[S, Hkv, D]``.
        v: like `k`.
        runs: of `find_runs`, at least one of them not empty.
        scale: multiplies the scores.
    """
    rows, tokens = q.shape[:2]
    start, end = runs[0].start, runs[0].end
    length = end - start
    if len(runs) == rows and length:
        if all(run.start == start and run.end == end for run in runs):
            one = q if rows == 1 else q.reshape(1, rows * tokens, *q.shape[2:])
            return _attend(one, _keys(k, start, end)[None], _keys(v, start, end)[None], scale).reshape(q.shape)
        if all(run.start == start + run.row * length and run.end == run.start + length for run in runs):
            end = start + rows * length
            k, v = (_keys(x, start, end).unflatten(0, (rows, length)) for x in (k, v))
            return _attend(q, k, v, scale)
    parts: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    for run in runs:
        part = q[run.row, run.first : run.last][None]
        if run.start < run.end:
            part = _attend(part, k[run.start : run.end][None], v[run.start : run.end][None], scale)
        else:
            part = torch.zeros_like(part)
        parts[run.row].append(part)
    return torch.cat([torch.cat(one, dim=1) if len(one) > 1 else one[0] for one in parts])


def _keys(x: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Return ``x[start:end]``; a view costs as much as the checks of a whole call."""
    return x if start == 0 and end == x.shape[0] else x[start:end]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of ``[B, T, Hq, D]`` on ``[B, S, Hkv, D]``."""
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale, **grouped)
    return out.transpose(1, 2)
