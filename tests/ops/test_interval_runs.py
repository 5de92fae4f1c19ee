"""Interval attention on a CPU reads the intervals: which runs it finds, and that every way to attend them agrees."""

from __future__ import annotations

import pytest
import torch

from infimm_fast.kernels import interval_attention
from infimm_fast.kernels.interval.runs import MOST_RUNS, find_runs

KEYS = 24


def _rows(*rows: list[tuple[int, int]], repeats: int = 1) -> torch.Tensor:
    return torch.tensor([[interval for interval in row for _ in range(repeats)] for row in rows])


RANGES = {
    "one row": _rows([(3, 9), (3, 9)]),
    "all keys": _rows([(0, KEYS)]),
    "shared": _rows([(3, 9)], [(3, 9)], [(3, 9)]),
    "side by side": _rows([(2, 7), (2, 7)], [(7, 12), (7, 12)], [(12, 17), (12, 17)]),
    "apart": _rows([(2, 7)], [(0, 5)]),
    "pictures in a row": _rows([(0, 0), (0, 4), (0, 4), (4, 9)], [(9, 12), (9, 12), (12, 20), (5, 5)]),
    "nothing in one row": _rows([(0, 0)], [(4, 9)]),
    "beyond the keys": _rows([(-3, 100), (9, 4), (30, 40)]),
    "a long prompt": _rows([(0, 0), (0, 4), (4, 9)], [(9, 12), (9, 12), (20, 12)], repeats=100),
}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", RANGES)
def test_results_and_gradients(name: str, kv_heads: int) -> None:
    kv_range = RANGES[name]
    assert find_runs(kv_range, KEYS) is not None
    inputs = [torch.randn(*kv_range.shape[:2], 4, 8), *torch.randn(2, KEYS, kv_heads, 8)]
    results = []
    for backend, dtype in (("sdpa", torch.float64), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = interval_attention(*leaves, kv_range, backend=backend)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
        with torch.no_grad():
            torch.testing.assert_close(interval_attention(*leaves, kv_range, backend=backend), out)
            plain = (x.detach() for x in leaves)
            torch.testing.assert_close(interval_attention(*plain, kv_range, backend=backend), out.detach())
    torch.testing.assert_close(*results)


def test_runs_of_pictures() -> None:
    expected = [(0, 0, 1, 0, 0), (0, 1, 3, 0, 4), (0, 3, 4, 4, 9), (1, 0, 2, 9, 12), (1, 2, 3, 12, 20), (1, 3, 4, 5, 5)]
    assert find_runs(RANGES["pictures in a row"], KEYS) == expected
    long = find_runs(RANGES["pictures in a row"].repeat_interleave(100, dim=1), KEYS)
    assert long == [(row, first * 100, last * 100, start, end) for row, first, last, start, end in expected]


def test_what_is_left_to_a_dense_mask() -> None:
    many = torch.arange(MOST_RUNS + 1)[None, :, None] + torch.tensor([0, 2])
    assert find_runs(many, 100) is None
    assert find_runs(many.repeat_interleave(20, dim=1), 100) is None
    assert find_runs(torch.zeros(2, 3, 2, dtype=torch.int64), KEYS) is None  # its zeros keep their place in the graph
    assert find_runs(torch.zeros(0, 3, 2, dtype=torch.int64), KEYS) is None
    assert find_runs(RANGES["shared"].to("meta"), KEYS) is None
