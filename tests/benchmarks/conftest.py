import contextlib

import pytest

from infimm_fast.benchmarks import harness


@pytest.fixture(autouse=True)
def unpinned(monkeypatch):
    """A run that keeps to one core would wait for the other tests that happen to be there."""
    monkeypatch.setattr(harness, "pinned_threads", contextlib.nullcontext)
