"""PyTorch's fused attention without a mask, run by run: on a CPU, where reading the intervals costs nothing.

A run is a stretch of neighbouring text tokens with the same interval. A prompt has one for each picture, a decoding step
one for each row; a dense mask would let every row pay for the pictures of all rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from infimm_fast.kernels.common.launch import can_read

# With more runs for each row, one call with a dense mask is cheaper.
MOST_RUNS = 16
# (row, first, last, start, end): tokens ``[first, last)`` of a row see the keys ``[start, end)``. A plain tuple, since a
# decoding step waits for every object that is made.
Run = tuple[int, int, int, int, int]
# Up to so many tokens of all rows, Python reads the intervals faster than tensor operations compare them.
FEW_TOKENS = 256


def find_runs(kv_range: torch.Tensor, num_keys: int) -> list[Run] | None:
    """Return the runs of all rows in order, or None where they cannot be read, are too many, or see nothing at all.

    Args:
        kv_range: int32 or int64 ``[B, T, 2]``.
        num_keys: S; intervals are clamped to it.
    """
    rows, tokens, _ = kv_range.shape
    if not (rows and tokens and kv_range.is_cpu and can_read(kv_range)):
        return None
    runs: list[Run] = []
    if rows * tokens <= FEW_TOKENS:
        for row, intervals in enumerate(kv_range.tolist()):
            first = 0
            while first < tokens:
                interval, last = intervals[first], first + 1
                while last < tokens and intervals[last] == interval:
                    last += 1
                start, end = interval
                if not 0 <= start <= end <= num_keys:
                    start, end = _clamp(start, end, num_keys)
                runs.append((row, first, last, start, end))
                first = last
    else:
        changes = (kv_range[:, 1:] != kv_range[:, :-1]).any(-1).nonzero()  # [n, 2]: row, token before a change
        if len(changes) > MOST_RUNS * rows:
            return None
        firsts = [[0] for _ in range(rows)]
        for row, token in changes.tolist():
            firsts[row].append(token + 1)
        for row, ones in enumerate(firsts):
            intervals = kv_range[row, ones].tolist()
            for first, last, (start, end) in zip(ones, [*ones[1:], tokens], intervals, strict=True):
                runs.append((row, first, last, *_clamp(start, end, num_keys)))
    if len(runs) > MOST_RUNS * rows:
        return None
    return runs if runs[0][3] < runs[0][4] or any(start < end for _, _, _, start, end in runs) else None


def _clamp(start: int, end: int, num_keys: int) -> tuple[int, int]:
    start = min(max(start, 0), num_keys)
    return start, min(max(start, end), num_keys)


def attend_runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: list[Run], scale: float) -> torch.Tensor:
    """Return the attention of all runs, ``[B, T, Hq, D]``; differentiable.

    Args:
        q: ``[B, T, Hq, D]``.
        k: ``[S, Hkv, D]``.
        v: like `k`.
        runs: of `find_runs`, at least one of them not empty.
        scale: multiplies the scores.
    """
    rows = q.shape[0]
    _, _, _, start, end = runs[0]
    length = end - start
    if len(runs) == rows and length:
        # From row to row: the keys of the next picture, or the same ones.
        step = length if rows > 1 and runs[1][3] == end else 0
        if [run[3:] for run in runs] == [(start + row * step, end + row * step) for row in range(rows)]:
            if step or rows == 1:
                return _attend(q, _keys(k, start, rows, length), _keys(v, start, rows, length), scale)
            # Queries that see the same keys are one row.
            one = q.flatten(0, 1)[None]
            return _attend(one, _keys(k, start, 1, length), _keys(v, start, 1, length), scale).view(q.shape)
    parts: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    for row, first, last, start, end in runs:
        part = q[row, first:last][None]
        if start < end:
            length = end - start
            part = _attend(part, _keys(k, start, 1, length), _keys(v, start, 1, length), scale)
        else:
            part = torch.zeros_like(part)
        parts[row].append(part)
    return torch.cat([torch.cat(one, dim=1) if len(one) > 1 else one[0] for one in parts])


def _keys(x: torch.Tensor, start: int, rows: int, length: int) -> torch.Tensor:
    """Return ``x [S, Hkv, D]`` from `start` on as ``[rows, Hkv, length, D]``."""
    if x.requires_grad and torch.is_grad_enabled():
        return x[start : start + rows * length].unflatten(0, (rows, length)).transpose(1, 2)
    # Each view costs microseconds, so one instead of three.
    (_, heads, head_dim), (token, head, channel) = x.shape, x.stride()
    strides = (length * token, head, token, channel)
    return x.as_strided((rows, heads, length, head_dim), strides, x.storage_offset() + start * token)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of ``[B, T, Hq, D]`` on ``[B, Hkv, S, D]``."""
    grouped = q.shape[2] != k.shape[1]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale, enable_gqa=grouped).transpose(1, 2)
