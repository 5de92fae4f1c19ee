"""What runs in the interpreter's process."""

from __future__ import annotations

import torch

from infimm_fast.benchmarks.one_launch import CASES, run_case
from mutation import mutated


def check(name: str, dtype: str, mutation: tuple[str, str, str] | None = None) -> None:
    """Run a small case, with a mistake in its op's kernels if one is given."""
    case = CASES[name]
    with mutated(case.op, mutation):
        run_case(case, getattr(torch, dtype), torch.device("cpu"))
