import contextlib
import time
from unittest import mock

import pytest
import torch

from infimm_fast.benchmarks import harness
from infimm_fast.benchmarks.registry import IMPLEMENTATIONS, STAGES, Plan, load_suites


@pytest.fixture(autouse=True)
def unpinned(monkeypatch):
    """A run that keeps to one core would wait for the other tests that happen to be there."""
    monkeypatch.setattr(harness, "pinned_threads", contextlib.nullcontext)


@pytest.fixture
def own_registry():
    """What a test registers is forgotten after it."""
    load_suites()
    copies = {name: dict(ones) for name, ones in IMPLEMENTATIONS.items()}
    with mock.patch.dict(STAGES), mock.patch.dict(IMPLEMENTATIONS, copies):
        yield


@pytest.fixture
def run(own_registry):
    """Return what runs sections of the tiny preset on the CPU; the report."""

    def go(*sections, tell=lambda line: None, now=time.perf_counter, artifacts=(), **settings):
        plan = Plan("tiny", "float32", torch.device("cpu"), artifacts=artifacts)
        return harness.run_benchmarks(harness.Settings(sections or ("ops",), plan, 0.0, **settings), tell, now=now)

    return go
