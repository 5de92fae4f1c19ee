"""What only a GPU can show of the harness: graph replays, cold caches, peak memory, the card's state."""

from __future__ import annotations

import pytest
import torch

from infimm_fast.benchmarks import SECTIONS
from infimm_fast.benchmarks.harness import Settings, run_benchmarks
from infimm_fast.benchmarks.registry import Plan
from infimm_fast.benchmarks.timing import Timer, input_sets

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_the_tiny_preset_on_a_gpu() -> None:
    plan = Plan("tiny", "bfloat16", torch.device("cuda"))
    peers = ("naive", "naive, K/V cached", "sdpa", "sdpa dense mask")
    report = run_benchmarks(Settings(SECTIONS, plan, 0.0, against=peers))
    assert not report.failed
    assert report.ceilings["matmul_tflops"] > 1 and report.ceilings["copy_gb_s"] > 50
    for case in report.cases:
        for row in case.rows:
            if row.ours and case.section in ("ops", "cross", "vision", "decode"):
                assert row.median_ms is not None and row.median_ms > 0, (case.op, case.case, row)
        if case.section in ("ops", "cross", "vision", "decode"):
            assert {row.mode for row in case.rows} == {"eager", "graph"}
        assert all(row.peak_memory_mb is not None for row in case.rows if row.mode == "eager" and row.median_ms)


def test_a_graph_of_many_runs_is_divided_by_their_number() -> None:
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    timer = Timer(device, 0.1)
    one, many = timer.graph([lambda: a @ a]), timer.graph([lambda: a @ a] * 8)
    assert many.median == pytest.approx(one.median, rel=0.3)


def test_small_inputs_rotate_and_large_ones_do_not() -> None:
    device = torch.device("cuda")
    assert input_sets(2**20, device) > 8 and input_sets(2**33, device) == 1
