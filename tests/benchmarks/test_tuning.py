"""The tuner: machine code is read rightly, plans hold what ships, wrong results get no time, pages come out whole."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from infimm_fast.benchmarks import compile_gate, timing
from infimm_fast.benchmarks.compile_gate_ops import OPS
from infimm_fast.benchmarks.compile_gate_ops import Job as GateJob
from infimm_fast.benchmarks.machine_code import (
    Mix,
    code_around,
    hot_loop,
    innermost_loops,
    mix_of,
    parse_sass,
    read_kernel,
    serialised,
)
from infimm_fast.benchmarks.tuning import __main__ as command
from infimm_fast.benchmarks.tuning import report, run, warm
from infimm_fast.benchmarks.tuning.candidates import Candidate, candidates_of, constants_set, split_of
from infimm_fast.benchmarks.tuning.jobs import (
    CROSS,
    RESIDUAL,
    SUBIMAGE,
    all_jobs,
    main_kernel,
    select_jobs,
    shipped_config,
    suite_of,
)
from infimm_fast.benchmarks.tuning.plan import Assessed, Code, TuningPlan, assess, make_plan, record, select
from infimm_fast.benchmarks.tuning.prediction import MACHINES, Prediction, Work, predict, resident_programs
from infimm_fast.benchmarks.tuning.results import JobResult, Measured, Results
from infimm_fast.benchmarks.tuning.run import Settings, run_plan
from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.common.numerics import Errors
from infimm_fast.kernels.common.offline import compile_triton, recorded_launches, source_of
from infimm_fast.kernels.interval import config as cross_config
from infimm_fast.kernels.interval import decode
from interpreter import load_file

CASES_FILE = Path(__file__).with_name("tuning_cases.py")
CASES = load_file(CASES_FILE)
DRY_FILE = Path(__file__).with_name("dry_cuda.py")
KERNELS = [
    *((SUBIMAGE, kernel) for kernel in ("forward", "backward_kv", "backward_q")),
    *((CROSS, kernel) for kernel in ("forward", "backward_kv", "backward_q", "decode")),
    *((RESIDUAL, kernel) for kernel in ("forward", "backward")),
]
INFIMM = next(job for job in all_jobs() if (job.op, job.kernel, job.width) == (SUBIMAGE, "forward", 112))

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
        /*00e0*/                   EXIT ;                                      /* 0x00 */
        /*00f0*/                   BRA 0xf0;                                   /* 0x00 */
"""


def addresses(code) -> list[int]:
    return [one.address for one in code]


def test_loops_are_found() -> None:
    code = parse_sass(SASS)
    assert len(code) == 16
    assert [addresses(body) for body in innermost_loops(code)] == [[0x20, 0x30], [0x60, 0x70, 0x80, 0x90]]
    loop = mix_of(hot_loop(code))
    assert (loop.instructions, loop.hgmma, loop.waits, loop.mufu) == (4, {"64x64x16": 1, "64x128x16": 1}, 1, 0)


def test_code_around_a_loop_leaves_out_what_another_program_runs() -> None:
    code = parse_sass(SASS)
    assert addresses(code_around(code, hot_loop(code))) == [0x00, 0x10, 0x50, 0xA0, 0xB0, 0xC0, 0xD0, 0xE0]
    assert addresses(code_around(code, innermost_loops(code)[0])) == [0x00, 0x10, 0x40]


def test_matrix_instructions_take_as_long_as_their_operands() -> None:
    def cycles(text):
        (one,) = parse_sass(f"/*0000*/ {text} ;")
        return one.matrix_cycles * 4

    assert cycles("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR16].tnspB, R24, gsb0") == 64 * 128 * 16 / 2048
    assert cycles("HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], R88, gsb0") == 64 * 64 * 16 / 2048
    # Both operands out of shared memory: 2 KB and 1 KB at 128 bytes a cycle, where the products would take 16.
    assert cycles("HGMMA.64x32x16.F32.BF16 R88, gdesc[UR16], R88, gsb0") == 24
    assert cycles("HGMMA.64x32x16.F32.BF16 R88, R4, gdesc[UR16], R88, gsb0") == 16
    assert cycles("FFMA R1, R2, R3, R4") == 0


@pytest.mark.parametrize(
    ("hgmma", "waits", "bad"), [(12, 12, True), (12, 1, False), (20, 4, False), (0, 0, False), (1, 1, False)]
)
def test_serialised(hgmma, waits, bad) -> None:
    assert serialised(hgmma, waits) is bad


def test_the_gate_refuses_serialised_code() -> None:
    job = GateJob(SUBIMAGE, "forward", "peeled", 112, "bf16", 90)
    config = OPS[SUBIMAGE].config(job)
    code = compile_gate.Code(registers=128, shared=1000, spills=0, accesses={16: 9}, wgmma=12, loop_wgmma=12, loop_waits=12)
    assert compile_gate.judge(job, config, code) == ("serialised: 12 waits for 12 wgmma in the loop",)
    assert compile_gate.judge(job, config, replace(code, loop_waits=1)) == ()


def test_a_compiled_kernel_is_read() -> None:
    """Both products of a step of 128 x 64 at head dim 64, for each of two warp groups; 32 exponentials of a thread."""
    job = next(job for job in all_jobs() if (job.op, job.kernel, job.width) == (SUBIMAGE, "forward", 64))
    recorded = record(job, candidates_of(job, 90)[0], 90)
    registers, code = read_kernel(compile_triton(source_of(recorded), 90))
    loop = mix_of(hot_loop(code))
    assert 64 < registers <= 128 and loop.hgmma == {"64x64x16": 8} and 1 <= loop.waits <= 3 and 32 <= loop.mufu <= 40
    assert loop.matrix_cycles * 4 == 2 * 64 * 64 * 64 / 2048
    alone = max((body for body in innermost_loops(code) if not mix_of(body).hgmma), key=len)
    assert not mix_of(code_around(code, alone)).hgmma, "the first query's program uses no tensor cores"


def test_a_serialised_candidate_is_dropped() -> None:
    crowded = Candidate(LaunchConfig(128, 64, 8, 2, (128,), peel=True, max_registers=128))
    assert "serialised" in assess(INFIMM, crowded, 90).dropped
    shipped = assess(INFIMM, candidates_of(INFIMM, 90)[0], 90)
    assert shipped.dropped == "" and shipped.code is not None and shipped.code.programs == 10 * 16 * 9


@pytest.mark.parametrize("job", all_jobs(), ids=lambda job: f"{job.op}-{job.kernel}-{job.name}")
def test_the_shipped_configuration_competes(job) -> None:
    candidates = candidates_of(job, 90)
    assert candidates[0].config == shipped_config(job, 90) and not candidates[0].constants
    assert [one.shipped for one in candidates] == [True] + [False] * (len(candidates) - 1)
    assert len({one.label for one in candidates}) == len(candidates) >= 4
    recorded = record(job, candidates[0], 90)
    assert recorded is not None and recorded.options["num_warps"] == candidates[0].config.num_warps
    assert job.case.flops > 0 and job.case.bytes > 0


def test_constants_are_set_where_they_are_used_and_put_back() -> None:
    job = next(job for job in all_jobs() if job.kernel == "decode" and job.sizes["rows"] == 64)
    shipped = candidates_of(job, 90)[0]
    before = cross_config.MIN_BLOCKS_PER_UNIT, decode.MIN_BLOCKS_PER_UNIT
    with constants_set(job, {"MIN_BLOCKS_PER_UNIT": 4}):
        assert (cross_config.MIN_BLOCKS_PER_UNIT, decode.MIN_BLOCKS_PER_UNIT) == (4, 4)
    assert before == (cross_config.MIN_BLOCKS_PER_UNIT, decode.MIN_BLOCKS_PER_UNIT)
    pools = [split_of(job, Candidate(shipped.config, {"TARGET_POOL": pool})).pool for pool in (1200, 12000)]
    assert pools == [100, 1000]


def test_prediction_is_its_formula() -> None:
    machine = MACHINES[90]
    around, loop = Mix(instructions=100), Mix(instructions=400, matrix_cycles=100, mufu=10, global_bytes=64)
    one = predict(machine, [Work(132, 10, around, loop)], warps=4, resident=1, moved_bytes=0)
    cycles = machine.clock_ghz * 1e6
    assert one.tensor_ms == pytest.approx(100 * 10 * 4 / cycles)
    assert one.issue_ms == pytest.approx((100 + 400 * 10) * 4 / 4 / cycles)
    assert one.mufu_ms == pytest.approx(10 * 10 * 4 * 32 / 16 / cycles)
    assert one.ms == one.no_overlap_ms > one.perfect_overlap_ms == one.issue_ms
    # One program more is a second round on one multiprocessor, where it overlaps the first one.
    two = predict(machine, [Work(133, 10, around, loop)], warps=4, resident=2, moved_bytes=0)
    assert two.issue_ms == pytest.approx(2 * one.issue_ms)
    assert two.ms == pytest.approx((two.perfect_overlap_ms + two.no_overlap_ms) / 2)
    assert predict(machine, [Work(132, 10, around, loop)], 4, 1, moved_bytes=3 * 10**9).ms == pytest.approx(1.0)
    assert resident_programs(machine, 128, 48 * 1024, 8) == 2 and resident_programs(machine, 255, 0, 8) == 1
    assert resident_programs(machine, 32, 112 * 1024, 4) == 2


def assessed(name: int, ms: float, shipped: bool = False, dropped: str = "") -> Assessed:
    config = LaunchConfig(128, 64, 8, name, (128,))
    code = Code(200, 1024, 0, 1, 132, 10, 300, {"64x64x16": 8}, 1, 32)
    return Assessed(Candidate(config, shipped=shipped), code, Prediction(ms / 2, ms / 4, ms / 4, 0.0, 0.0, ms), dropped)


def test_the_likeliest_are_kept_and_the_shipped_one_always() -> None:
    chosen = select([assessed(1, 9.0, shipped=True), assessed(2, 3.0), assessed(3, 1.0), assessed(4, 0.5, dropped="bad")], 2)
    assert [one.candidate.config.num_stages for one in chosen] == [1, 3, 2, 4]
    assert [one.dropped for one in chosen] == ["", "", "predicted to be number 3, 2 are timed", "bad"]


@pytest.mark.slow
def test_every_kernel_runs(interpreter, tmp_path) -> None:
    done = interpreter.call(CASES_FILE, "run_small", kernels=KERNELS, folder=str(tmp_path))
    assert done["status"] == 0 and done["timed"] == [[True, True]] * len(KERNELS), done["lines"]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [(SUBIMAGE, "forward"), (CROSS, "backward_kv"), (RESIDUAL, "backward")])
def test_a_wrong_result_is_marked_and_never_timed(interpreter, tmp_path, kernel) -> None:
    done = interpreter.call(CASES_FILE, "run_small", kernels=[kernel], folder=str(tmp_path), spoil=True)
    assert done["timed"] == [[True, False]] and done["remarks"][0][1].startswith("FAILED the check"), done


def plain_launch(job, inputs, config, arch):
    return tuple(suite_of(job).reference(job.case, inputs, torch.float32).values())


@pytest.fixture
def without_kernels(monkeypatch):
    """The plain statement in place of a kernel, on the CPU."""
    monkeypatch.setattr(run, "launch", plain_launch)
    monkeypatch.setattr(run, "find_device", lambda arch: torch.device("cpu"))
    monkeypatch.setattr(timing, "MIN_SAMPLES", 1)


def test_plan_to_page(without_kernels, tmp_path) -> None:
    plan = CASES.small_plan((SUBIMAGE, "forward"), (RESIDUAL, "forward"))
    lines: list[str] = []
    assert run_plan(plan, Settings(processes=0, seconds=0.0), tmp_path, lines.append) == 0
    results = CASES.stored(tmp_path)
    assert [len(job.measured) for job in results.jobs] == [2, 2] and all(job.noise is not None for job in results.jobs)
    assert lines[-1].startswith("written: ") and any(line.startswith("op ") for line in lines)
    page = report.render(plan, [results], "ideas")
    assert "Nothing on this page is measured" not in page and "Predicted and what happened" in page


@pytest.mark.parametrize("spoiled", [0, 1])
def test_a_spoiled_candidate(without_kernels, tmp_path, monkeypatch, spoiled) -> None:
    """The exit status tells a wrong shipped configuration from a wrong alternative; neither is timed."""
    plan = CASES.small_plan((SUBIMAGE, "forward"))
    wrong = plan.jobs[0][1][spoiled].candidate
    timed = []

    def launch(job, inputs, config, arch):
        (out,) = plain_launch(job, inputs, config, arch)
        return (out + 0.001 * (config == wrong.config),)

    def watched(job, candidate, *rest):
        timed.append(candidate)
        return {"ms": 1.0, "p10_ms": 1.0, "p90_ms": 1.0, "eager_ms": 1.0}

    monkeypatch.setattr(run, "launch", launch)
    monkeypatch.setattr(run, "time_candidate", watched)
    lines: list[str] = []
    assert run_plan(plan, Settings(processes=0, seconds=0.0), tmp_path, lines.append) == (spoiled == 0)
    measured = CASES.stored(tmp_path).jobs[0].measured
    assert [one.wrong for one in measured] == [spoiled == 0, spoiled == 1] and wrong not in timed and len(timed) >= 1
    assert any(line.startswith("!") and "FAILED the check" in line for line in lines)


def test_the_budget_leaves_jobs_out(without_kernels, tmp_path) -> None:
    plan = CASES.small_plan((SUBIMAGE, "forward"), (RESIDUAL, "forward"))
    lines: list[str] = []
    assert run_plan(plan, Settings(budget=1.0, processes=0, seconds=0.0), tmp_path, lines.append) == 0
    assert len(CASES.stored(tmp_path).left_out) == 2 and "left out" in lines[-2]


def test_a_candidate_that_raises_is_a_remark(without_kernels, tmp_path, monkeypatch) -> None:
    def launch(job, inputs, config, arch):
        raise RuntimeError("out of resources\nmore")

    monkeypatch.setattr(run, "launch", launch)
    assert run_plan(CASES.small_plan((SUBIMAGE, "forward")), Settings(processes=0), tmp_path, lambda line: None) == 1
    remarks = {one.remark for one in CASES.stored(tmp_path).jobs[0].measured}
    assert remarks == {"does not run: RuntimeError: out of resources"}


def test_it_needs_a_gpu(tmp_path, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    CASES.small_plan((SUBIMAGE, "forward")).save(tmp_path / "plan.json")
    assert command.main(["run", "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path)]) == 2
    assert "there is neither" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert command.main(["run", "--plan", str(tmp_path / "other.json"), "--out", str(tmp_path)]) == 2
    assert "expected 'infimm_fast tuning plan 1'" in capsys.readouterr().err


@pytest.mark.slow
def test_compiling_apart_survives_what_fails_and_what_hangs(monkeypatch) -> None:
    job = CASES.small_job(SUBIMAGE, "forward")
    tasks = [(job, candidate) for candidate in candidates_of(job, 90)[:2]]
    # Without the interpreter and without a GPU no kernel runs.
    remarks = warm.warm_up(tasks, torch.device("cpu"), 90, 1, 300, lambda line: None)
    assert len(remarks) == 2 and all(remark.startswith("does not run") for remark in remarks)
    monkeypatch.setattr(warm, "HANGS_AFTER", 0.01)
    assert "does not end" in warm.warm_up(tasks[:1], torch.device("cpu"), 90, 1, 300, lambda line: None)[0]
    assert warm.warm_up(tasks, torch.device("cpu"), 90, 1, 0, lambda line: None) == [warm.NOT_REACHED] * 2


def test_a_dry_gpu(tmp_path, monkeypatch) -> None:
    """Everything around the numbers, on the real shapes of every job: inputs, references, replays, graphs, the table."""
    dry = load_file(DRY_FILE)
    plan = TuningPlan(90, {}, [(job, [Assessed(candidates_of(job, 90)[0])]) for job in all_jobs()])

    def compare(name, actual, plain, exact):
        assert actual.shape == plain.shape == exact.shape and actual.dtype == plain.dtype, name
        return Errors(0.0, 0.0, 1.0, 1.0)

    monkeypatch.setattr(run, "assert_error_budget", compare)
    monkeypatch.setattr(timing, "MIN_SAMPLES", 1)
    monkeypatch.setattr(timing, "WARM_UPS", 1)
    lines: list[str] = []
    with dry.dry_cuda(), recorded_launches() as launches:
        assert run_plan(plan, Settings(processes=0, seconds=0.0), tmp_path, lines.append) == 0, lines
    results = CASES.stored(tmp_path)
    # A sample takes 1 ms there, and a graph holds as many runs as there are sets of inputs.
    assert [job.measured[0].eager_ms for job in results.jobs] == [1.0] * len(plan.jobs) and results.ceilings
    assert all(0.0 < job.measured[0].ms <= 1.0 for job in results.jobs)
    assert {main_kernel(job) for job in all_jobs()} <= {one.kernel.__name__ for one in launches}


def test_plans_and_results_come_back(tmp_path) -> None:
    job = select_jobs([SUBIMAGE], ["forward"], [112])[0]
    plan = TuningPlan(
        90, {"triton": "3.6.0"}, [(job, [assessed(2, 2.0, True), assessed(3, 1.0), assessed(4, 9.0, dropped="x")])]
    )
    plan.save(tmp_path / "plan.json")
    assert TuningPlan.load(tmp_path / "plan.json") == plan
    measured = [Measured(one.candidate, ms=one.prediction.ms * 1.5) for one in plan.jobs[0][1][:2]]
    environment = {"device": "Some GPU", "torch": "2", "triton": "3", "commit": "abc"}
    results = Results(environment, {"matmul_tflops": 700.0, "copy_gb_s": 2800.0}, [JobResult(job, measured, 3.1)])
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    with pytest.raises(ConfigurationError, match="format"):
        Results.load(tmp_path / "plan.json")


def test_the_page(tmp_path) -> None:
    job = select_jobs([SUBIMAGE], ["forward"], [112])[0]
    plan = TuningPlan(
        90, {"triton": "3.6.0"}, [(job, [assessed(2, 2.0, True), assessed(3, 1.0), assessed(4, 9.0, dropped="x")])]
    )
    plan.save(tmp_path / "plan.json")
    page = tmp_path / "TUNING.md"
    arguments = ["report", "--plan", str(tmp_path / "plan.json"), "--out", str(page)]
    assert command.main(arguments) == 0
    text = page.read_text()
    assert "Nothing on this page is measured" in text and "nominal: 800 TFLOP/s" in text and "**2.00**" in text
    page.write_text(text.replace("Nothing noted yet.", "- my idea"))
    measured = [Measured(one.candidate, ms=ms) for one, ms in zip(plan.jobs[0][1], (2.5, 2.0), strict=False)]
    environment = {"device": "Some GPU", "torch": "2", "triton": "3", "commit": "abc"}
    Results(environment, {"matmul_tflops": 700.0, "copy_gb_s": 2800.0}, [JobResult(job, measured, 2.6)]).save(
        tmp_path / "r.json"
    )
    assert command.main([*arguments, "--results", str(tmp_path / "r.json")]) == 0
    text = page.read_text()
    assert "- my idea" in text and "measured: 700 TFLOP/s" in text and "Some GPU" in text
    assert "| 1.25 | `128x64 w8 s3 128` x1 | `128x64 w8 s3 128` | 2.00 | 1.25 | 4.0% |" in text


@pytest.mark.slow
def test_a_plan_is_made(tmp_path) -> None:
    lines: list[str] = []
    job = select_jobs([RESIDUAL], ["forward"], None)[0]
    with mock.patch("infimm_fast.benchmarks.tuning.plan.candidates_of", lambda job, arch: candidates_of(job, arch)[:3]):
        plan = make_plan([job], 90, 1, lines.append)
    assert len(lines) == 3 and plan.jobs[0][1][0].candidate.shipped
    plan.save(tmp_path / "folder" / "plan.json")
    assert TuningPlan.load(tmp_path / "folder" / "plan.json") == plan
