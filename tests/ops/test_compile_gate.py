"""The offline gate: shipped rows compile well, it refuses code that does not, and it reads machine code rightly."""

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

import compile_gate as gate
from infimm_fast.kernels.common.cases import GATE, TUNE, Job, find_ops, jobs_of
from infimm_fast.kernels.common.configs import ARCHITECTURES
from infimm_fast.kernels.common.offline import compile_triton, recorded_launches, source_of, specialise
from infimm_fast.kernels.residual.cases import CHANNELS
from infimm_fast.kernels.subimage.config import HEAD_DIMS
from infimm_fast.kernels.subimage.options import Options
from machine_code import Code, disassemble, hot_loop, innermost_loops, inspect_code, parse_sass

SUBIMAGE, CROSS, RESIDUAL = "subimage_attention", "interval_attention", "gated_residual"
OPS = find_ops()
STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "compile_gate.json"


def make_job(op: str, kernel: str, variant: str, width: int, dtype: str, arch: int) -> Job:
    """Return a job of the gate by the words of its table."""
    name = f"{variant}, {width} channels" if op == RESIDUAL else f"{variant}, head dim {width}"
    return Job(kernel, next(case for case in OPS[op].cases if case.name == name), dtype, arch)


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
    assert gate.run_job(OPS[op], make_job(op, kernel, variant, width, "bfloat16", arch)).failures == ()


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
    assert gate.run_job(OPS[op], make_job(op, "forward", variant, width, "bfloat16", arch)).failures == ()


def test_every_row_can_be_recorded_and_is_stored() -> None:
    """Each launcher takes what the gate gives it and launches the kernel of that name; the table has the same rows."""
    rows = [tuple(row["job"].values()) for row in json.loads(STORED.read_text())["rows"]]
    found = []
    for name, op in OPS.items():
        for job in jobs_of(op, GATE, gate.DTYPES, ARCHITECTURES):
            found.append((name, job.kernel, job.case.name, job.dtype, job.arch))
            if job.arch == 90:
                assert gate.record(op, job, op.config(job)).kernel.__name__ == op.kernels[job.kernel]
    assert len(rows) == 1210 and set(found) == set(rows) and len(found) == len(rows)


def test_launchers_take_the_configuration_that_they_are_given() -> None:
    jobs = [(op, job) for op in OPS.values() for job in jobs_of(op, TUNE, ("bfloat16",), (90,))]
    assert len(jobs) >= 38
    for op, job in jobs:
        config = replace(op.config(job), num_warps=2, max_registers=40)
        source = gate.record(op, job, config)
        assert source.kernel.__name__ == op.kernels[job.kernel]
        assert source.options["num_warps"] == 2 and source.options["maxnreg"] == 40, (op.name, job)


def test_one_misaligned_view_is_refused() -> None:
    """Rows of 73 elements: every access becomes a scalar one, and the gate must say so."""
    job = make_job(SUBIMAGE, "forward", "masked", 72, "bfloat16", 90)
    config = OPS[SUBIMAGE].config(job)
    broad = torch.empty((2, 729, 3, 16, 73), dtype=torch.bfloat16, device="meta")[..., :72]
    from infimm_fast.kernels.subimage.forward import launch_forward

    with recorded_launches() as launches:
        launch_forward(*broad.unbind(2), Options(0.1), config=config)
    code = inspect_code(compile_triton(source_of(launches[-1]), 90))
    assert any("two-byte" in failure for failure in gate.judge(OPS[SUBIMAGE], job, config, code))


def test_spills_and_shared_memory_are_refused() -> None:
    op, job = OPS[SUBIMAGE], make_job(SUBIMAGE, "forward", "masked", 112, "bfloat16", 89)
    good = Code(registers=200, shared=1000, spills=0, accesses={16: 10}, wgmma=0)
    config = op.config(job)
    assert gate.judge(op, job, config, good) == ()
    assert "spill" in gate.judge(op, job, config, replace(good, spills=1))[0]
    assert "shared" in gate.judge(op, job, config, replace(good, shared=101377))[0]
    assert "16-byte" in gate.judge(op, job, config, replace(good, accesses={4: 10}))[0]
    assert "narrower" in gate.judge(op, job, config, replace(good, accesses={16: 10, 4: 11}))[0]
    assert gate.judge(op, replace(job, arch=90), config, good) == ("no wgmma",)


def test_small_tiles_need_no_warp_group() -> None:
    code = Code(registers=200, shared=1000, spills=0, accesses={16: 10}, wgmma=0)
    for variant, failures in (("folded", ()), ("drafted", ("no wgmma",))):
        job = make_job(CROSS, "decode", variant, 64, "bfloat16", 90)
        assert gate.judge(OPS[CROSS], job, OPS[CROSS].config(job), code) == failures


def test_a_budget_holds_for_its_row_only() -> None:
    code = Code(registers=200, shared=1000, spills=4, accesses={16: 10}, wgmma=0)
    op, job = OPS[SUBIMAGE], make_job(SUBIMAGE, "backward_kv", "masked", 88, "bfloat16", 120)
    config = op.config(job)
    assert gate.judge(op, job, config, code) == ()
    assert gate.judge(op, job, config, replace(code, spills=5)) == ("5 spill instructions, 4 allowed",)
    assert gate.judge(op, replace(job, kernel="forward"), config, code)[0] == "4 spill instructions, 0 allowed"


@pytest.mark.parametrize(
    ("wgmma", "waits", "bad"), [(12, 12, True), (12, 1, False), (20, 4, False), (0, 0, False), (1, 1, False)]
)
def test_serialised_code_is_refused(wgmma: int, waits: int, bad: bool) -> None:
    op, job = OPS[SUBIMAGE], make_job(SUBIMAGE, "forward", "peeled", 112, "bfloat16", 90)
    code = Code(registers=128, shared=1000, spills=0, accesses={16: 9}, wgmma=12, loop_wgmma=wgmma, loop_waits=waits)
    failures = (f"serialised: {waits} waits for {wgmma} wgmma in the loop",) * bad
    assert gate.judge(op, job, op.config(job), code) == failures


def test_report(tmp_path: Path) -> None:
    job = make_job(SUBIMAGE, "forward", "masked", 112, "bfloat16", 90)
    code = Code(registers=200, shared=1000, spills=0, accesses={16: 10}, wgmma=4)
    verdict = gate.Verdict(SUBIMAGE, job, OPS[SUBIMAGE].config(job), code, ())
    gate.write_report(tmp_path / "folder" / "gate.json", [verdict])
    report = json.loads((tmp_path / "folder" / "gate.json").read_text())
    assert report["rows"][0]["code"]["registers"] == 200 and "triton" in report["versions"]
    assert gate.describe(verdict).endswith("ok")


# A branch around the first loop, two nested loops, a conditional exit, and the idle loop at every kernel's end.
SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;                          /* 0x00 */
        /*0010*/              @!P0 BRA 0x0050 ;                                /* 0x00 */
        /*0020*/                   MUFU.EX2 R1, R1 ;                           /* 0x00 */
        /*0030*/               @P1 BRA 0x0020 ;                                /* 0x00 */
        /*0040*/                   EXIT ;                                      /* 0x00 */
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;            /* 0x00 */
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], RZ, !UPT, gsb0 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR16].tnspB, R24, gsb0 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;             /* 0x00 */
        /*0090*/               @P2 BRA 0x0060 ;                                /* 0x00 */
        /*00a0*/                   IADD3 R2, R2, 0x1, RZ ;                     /* 0x00 */
        /*00b0*/               @P3 BRA 0x0050 ;                                /* 0x00 */
        /*00c0*/               @P4 EXIT ;                                      /* 0x00 */
        /*00d0*/                   STG.E.64 desc[UR4][R2.64], R4 ;             /* 0x00 */
        /*00e0*/                   STL [R1], R4 ;                              /* 0x00 */
        /*00f0*/                   BRA 0xf0;                                   /* 0x00 */
"""


def test_machine_code_is_read() -> None:
    code = parse_sass(SASS)
    assert len(code) == 16
    loops = [[one.address for one in body] for body in innermost_loops(code)]
    assert loops == [[0x20, 0x30], [0x60, 0x70, 0x80, 0x90]]
    assert [one.address for one in hot_loop(code)] == loops[1]
    assert [one.global_bytes for one in code if one.global_bytes] == [16, 8]
    assert sum(one.spills for one in code) == 1
    assert [one.products for one in code if one.products] == [64 * 64 * 16 // 4, 64 * 128 * 16 // 4]


def test_a_compiled_kernel_is_read() -> None:
    """Both products of a step of 128 x 64 at head dim 64, for each of two warp groups."""
    job = make_job(SUBIMAGE, "forward", "peeled", 64, "bfloat16", 90)
    config = OPS[SUBIMAGE].config(job)
    assert (config.block_m, config.block_n, config.num_warps) == (128, 64, 8)
    compiled = compile_triton(gate.record(OPS[SUBIMAGE], job, config), 90)
    code = inspect_code(compiled)
    assert 64 < code.registers <= 128 and code.loop_wgmma == 8 and 1 <= code.loop_waits <= 3 and not code.serialised
    loop = hot_loop(parse_sass(disassemble(compiled.asm["cubin"])[1]))
    assert {one.opcode.split(".")[1] for one in loop if one.products} == {"64x64x16"}
    assert 4 * sum(one.products for one in loop) == 2 * 64 * 64 * 64
    assert 32 <= sum(one.opcode.startswith("MUFU") for one in loop) <= 40  # exponentials of a thread


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
