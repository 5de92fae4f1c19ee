"""The offline gate: shipped rows compile well, and it refuses code that does not."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from infimm_fast.benchmarks import compile_gate as gate
from infimm_fast.kernels.common.configs import ARCHITECTURES
from infimm_fast.kernels.subimage_attention.config import HEAD_DIMS


@pytest.mark.parametrize(
    ("kernel", "variant", "head_dim", "arch"),
    [
        ("forward", "peeled", 112, 90),
        ("forward", "masked", 72, 90),
        ("backward_kv", "peeled", 112, 90),
        ("forward", "peeled", 88, 80),
    ],
)
def test_rows_pass(kernel: str, variant: str, head_dim: int, arch: int) -> None:
    assert gate.run_job(gate.Job(kernel, variant, head_dim, "bf16", arch)).failures == ()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_on_every_architecture(head_dim: int, arch: int) -> None:
    assert gate.run_job(gate.Job("forward", "peeled", head_dim, "bf16", arch)).failures == ()


def test_one_misaligned_view_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 73 elements: every access becomes a scalar one, and the gate must say so."""
    job = gate.Job("forward", "masked", 72, "bf16", 90)
    config = gate.config_of(job)
    broad = torch.empty((2, 729, 3, 16, 73), dtype=torch.bfloat16, device="meta")[..., :72]
    from infimm_fast.kernels.subimage_attention.forward import launch_forward

    with gate.recorded_launches() as launches:
        launch_forward(*broad.unbind(2), 0.1, None, None, 0, True, None, False, 729, False, config=config)
    code = gate.inspect_code(gate.compile_launch(launches[-1], 90))
    assert any("two-byte" in failure for failure in gate.judge(job, config, code))


def test_spills_and_shared_memory_are_refused() -> None:
    job = gate.Job("forward", "masked", 112, "bf16", 89)
    good = gate.Code(registers=200, shared=1000, spills=0, accesses={16: 10}, wgmma=0)
    config = gate.config_of(job)
    assert gate.judge(job, config, good) == ()
    assert "spill" in gate.judge(job, config, replace(good, spills=1))[0]
    assert "shared" in gate.judge(job, config, replace(good, shared=101377))[0]
    assert "16-byte" in gate.judge(job, config, replace(good, accesses={4: 10}))[0]
    assert gate.judge(replace(job, arch=90), config, good) == ("no wgmma",)


def test_specialisation_is_what_triton_infers() -> None:
    tensor = torch.empty(100, dtype=torch.bfloat16)
    assert gate.specialise(tensor, False) == ("*bf16", None, True)
    assert gate.specialise(tensor[72:], False) == ("*bf16", None, True)
    assert gate.specialise(tensor[4:], False) == ("*bf16", None, False)
    assert gate.specialise(32, False) == ("i32", None, True)
    assert gate.specialise(32, True) == ("i32", None, False)
    assert gate.specialise(2**31, True) == ("i64", None, False)
    assert gate.specialise(1, False) == ("constexpr", 1, False)
    assert gate.specialise(None, False) == ("constexpr", None, False)


def test_report(tmp_path: Path) -> None:
    job = gate.Job("forward", "masked", 112, "bf16", 90)
    code = gate.Code(registers=200, shared=1000, spills=0, accesses={16: 10}, wgmma=4)
    verdict = gate.Verdict(job, gate.config_of(job), code, ())
    gate.write_report(tmp_path / "folder" / "gate.json", [verdict])
    report = json.loads((tmp_path / "folder" / "gate.json").read_text())
    assert report["rows"][0]["code"]["registers"] == 200 and "triton" in report["versions"]
    assert gate.describe(verdict).endswith("ok")
