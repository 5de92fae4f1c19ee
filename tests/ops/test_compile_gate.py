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
from infimm_fast.benchmarks.compile_gate_ops import CHANNELS, HEAD_DIMS, OPS, Job
from infimm_fast.kernels.common.configs import ARCHITECTURES
from infimm_fast.kernels.common.offline import compile_triton, recorded_launches, source_of, specialise

SUBIMAGE, CROSS, RESIDUAL = "subimage_attention", "interval_attention", "gated_residual"


@pytest.mark.parametrize(
    ("op", "kernel", "variant", "width", "arch"),
    [
        (SUBIMAGE, "forward", "peeled", 112, 90),
        (SUBIMAGE, "forward", "masked", 72, 90),
        (SUBIMAGE, "forward", "rope", 88, 90),
        (SUBIMAGE, "backward_kv", "peeled", 112, 90),
        (SUBIMAGE, "forward", "peeled", 88, 80),
        (CROSS, "forward", "prompt", 64, 90),
        (CROSS, "plan", "folded", 64, 90),
        (CROSS, "decode", "folded", 64, 90),
        (CROSS, "combine", "folded", 64, 90),
        (CROSS, "decode", "drafted", 128, 80),
        (RESIDUAL, "forward", "normed", 5120, 90),
        (RESIDUAL, "backward", "normed", 5120, 90),
    ],
)
def test_rows_pass(op: str, kernel: str, variant: str, width: int, arch: int) -> None:
    assert gate.run_job(Job(op, kernel, variant, width, "bf16", arch)).failures == ()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("op", "variant", "width"),
    [
        *((SUBIMAGE, "peeled", head_dim) for head_dim in HEAD_DIMS),
        *((CROSS, "prompt", head_dim) for head_dim in HEAD_DIMS),
        *((RESIDUAL, "normed", channels) for channels in CHANNELS),
    ],
)
def test_every_forward_on_every_architecture(op: str, variant: str, width: int, arch: int) -> None:
    assert gate.run_job(Job(op, "forward", variant, width, "bf16", arch)).failures == ()


def test_every_row_can_be_recorded() -> None:
    """Each launcher still takes what the gate gives it, and launches the kernel of that name."""
    for job in gate.jobs_of(archs=[90]):
        launch = gate.record(job, OPS[job.op].config(job))
        assert launch.kernel.__name__ == OPS[job.op].kernels[job.kernel]


def test_one_misaligned_view_is_refused() -> None:
    """Rows of 73 elements: every access becomes a scalar one, and the gate must say so."""
    job = Job(SUBIMAGE, "forward", "masked", 72, "bf16", 90)
    config = OPS[SUBIMAGE].config(job)
    broad = torch.empty((2, 729, 3, 16, 73), dtype=torch.bfloat16, device="meta")[..., :72]
    from infimm_fast.kernels.subimage.forward import launch_forward
    from infimm_fast.kernels.subimage.options import Options

    with recorded_launches() as launches:
        launch_forward(*broad.unbind(2), Options(0.1), config=config)
    code = gate.inspect_code(compile_triton(source_of(launches[-1]), 90))
    assert any("two-byte" in failure for failure in gate.judge(job, config, code))


def test_spills_and_shared_memory_are_refused() -> None:
    job = Job(SUBIMAGE, "forward", "masked", 112, "bf16", 89)
    good = gate.Code(registers=200, shared=1000, spills=0, accesses={16: 10}, wgmma=0)
    config = OPS[SUBIMAGE].config(job)
    assert gate.judge(job, config, good) == ()
    assert "spill" in gate.judge(job, config, replace(good, spills=1))[0]
    assert "shared" in gate.judge(job, config, replace(good, shared=101377))[0]
    assert "16-byte" in gate.judge(job, config, replace(good, accesses={4: 10}))[0]
    assert "narrower" in gate.judge(job, config, replace(good, accesses={16: 10, 4: 11}))[0]
    assert gate.judge(replace(job, arch=90), config, good) == ("no wgmma",)


def test_small_tiles_need_no_warp_group() -> None:
    code = gate.Code(registers=200, shared=1000, spills=0, accesses={16: 10}, wgmma=0)
    for variant, failures in (("folded", ()), ("drafted", ("no wgmma",))):
        job = Job(CROSS, "decode", variant, 64, "bf16", 90)
        assert gate.judge(job, OPS[CROSS].config(job), code) == failures


def test_a_budget_holds_for_its_row_only() -> None:
    code = gate.Code(registers=200, shared=1000, spills=4, accesses={16: 10}, wgmma=0)
    job = Job(SUBIMAGE, "backward_kv", "masked", 88, "bf16", 120)
    config = OPS[SUBIMAGE].config(job)
    assert gate.judge(job, config, code) == ()
    assert gate.judge(job, config, replace(code, spills=5)) == ("5 spill instructions, 4 allowed",)
    assert gate.judge(replace(job, kernel="forward"), config, code)[0] == "4 spill instructions, 0 allowed"


def test_report(tmp_path: Path) -> None:
    job = Job(SUBIMAGE, "forward", "masked", 112, "bf16", 90)
    code = gate.Code(registers=200, shared=1000, spills=0, accesses={16: 10}, wgmma=4)
    verdict = gate.Verdict(job, OPS[SUBIMAGE].config(job), code, ())
    gate.write_report(tmp_path / "folder" / "gate.json", [verdict])
    report = json.loads((tmp_path / "folder" / "gate.json").read_text())
    assert report["rows"][0]["code"]["registers"] == 200 and "triton" in report["versions"]
    assert gate.describe(verdict).endswith("ok")


def test_specialisation_is_what_triton_infers() -> None:
    tensor = torch.empty(100, dtype=torch.bfloat16)
    assert specialise(tensor, False) == ("*bf16", None, True)
    assert specialise(tensor[72:], False) == ("*bf16", None, True)
    assert specialise(tensor[4:], False) == ("*bf16", None, False)
    assert specialise(32, False) == ("i32", None, True)
    assert specialise(32, True) == ("i32", None, False)
    assert specialise(2**31, True) == ("i64", None, False)
    assert specialise(1, False) == ("constexpr", 1, False)
    assert specialise(None, False) == ("constexpr", None, False)
