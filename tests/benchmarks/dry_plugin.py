"""A plugin of pytest that runs GPU tests on `dry_cuda`'s device: what they check of shapes, dtypes and devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infimm_fast.kernels.common import numerics
from interpreter import load_file

DRY = load_file(Path(__file__).with_name("dry_cuda.py"))


def _same_kind(actual: Any, expected: Any, **tolerances: Any) -> bool:
    pairs = zip(actual, expected, strict=True) if isinstance(actual, (list, tuple)) else [(actual, expected)]
    for one, other in pairs:
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device), f"{one} and {other}"
    return True


# Before tests are imported: they ask for a GPU then, and take the function by name.
torch.cuda.is_available = lambda: True
numerics.assert_error_budget = DRY.compare_shapes


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Run a test on the pretended device."""
    with DRY.dry_cuda(), DRY.patched([(torch, "equal", _same_kind), (torch.testing, "assert_close", _same_kind)]):
        return (yield)
