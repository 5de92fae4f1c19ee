"""The tuner: the shipped configuration always competes, wrong results get no time, what is stored says what happened."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from infimm_fast.benchmarks import timing
from infimm_fast.benchmarks.timing import Timer
from infimm_fast.benchmarks.tuning import __main__ as command
from infimm_fast.benchmarks.tuning import run
from infimm_fast.benchmarks.tuning.candidates import Candidate, candidates_of, constants_set
from infimm_fast.benchmarks.tuning.run import JobResult, Measured, Settings, read_plan, run_job, tune, work_of
from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.cases import TUNE, Case, Job, find_ops, jobs_of
from infimm_fast.kernels.common.offline import recorded_launches
from infimm_fast.kernels.interval import config as interval_config
from infimm_fast.kernels.interval import decode
from infimm_fast.kernels.interval.cases import make_sizes
from infimm_fast.kernels.residual import config as residual_config
from interpreter import load_file

PLAN = Path(__file__).parents[2] / "benchmarks" / "results" / "tuning_plan_sm90.json"
OPS = find_ops()
SUBIMAGE, CROSS, RESIDUAL = "subimage_attention", "interval_attention", "gated_residual"
JOBS = [(op, job) for op in OPS.values() for job in jobs_of(op, TUNE, ("bfloat16",), (90,))]
KERNELS: dict[tuple[str, str], list[Job]] = {}
for op, job in JOBS:
    KERNELS.setdefault((op.name, job.kernel), []).append(job)


def small_job(op: str, kernel: str) -> Job:
    """Return a job that the interpreter does in less than a second."""
    text = {"tiles": 1, "tokens_per_tile": 300 if kernel == "decode" else 40, "kv_blocks": 2}
    rows, tokens = (2, 2) if kernel == "decode" else (1, 12)
    sizes = {
        SUBIMAGE: {"tiles": 1, "tokens": 33, "heads": 1, "head_dim": 16},
        CROSS: make_sizes(rows, tokens, 2, 1, 16, **text),
        RESIDUAL: {"rows": 1, "tokens": 4, "width": 32},
    }[op]
    return Job(kernel, Case("small", sizes, kernel.startswith("backward"), 0), "float32", 90)


def two_candidates(op: str, job: Job) -> list[Candidate]:
    """Return the shipped candidate, and one that is a little different."""
    shipped = candidates_of(OPS[op], job)[0]
    if job.kernel == "decode":
        return [shipped, Candidate(shipped.config, {"TARGET_POOL": 1024})]
    return [shipped, Candidate(replace(shipped.config, num_stages=shipped.config.num_stages + 1))]


def run_small(op: str, kernel: str, spoil: bool = False) -> list[str]:
    """Run a small job in this process; return the remark of each candidate, "timed" where it has a time.

    Args:
        op: its name.
        kernel: of the op.
        spoil: the second candidate computes with other values than it should.
    """
    job, launch = small_job(op, kernel), type(OPS[op]).launch

    def spoiled(self: Any, job: Job, inputs: Any, config: Any) -> Any:
        results = launch(self, job, inputs, config)
        wrong = spoil and config.num_stages != OPS[op].config(job).num_stages
        return tuple(one * 1.01 for one in results) if wrong else results

    with mock.patch.multiple(timing, WARM_UPS=0, MIN_SAMPLES=1), mock.patch.object(type(OPS[op]), "launch", spoiled):
        result = run_job(OPS[op], job, two_candidates(op, job), Timer(torch.device("cpu"), 0.0))
    return [one.remark if one.ms is None else "timed" for one in result.measured] + [result.remark] * bool(result.remark)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "kernel"), KERNELS)
def test_every_kernel_runs(interpreter, op, kernel) -> None:
    assert interpreter.call(__file__, "run_small", op=op, kernel=kernel) == ["timed", "timed"]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "kernel"), [(SUBIMAGE, "forward"), (CROSS, "backward_kv"), (RESIDUAL, "backward")])
def test_a_wrong_result_is_marked_and_never_timed(interpreter, op, kernel) -> None:
    first, second = interpreter.call(__file__, "run_small", op=op, kernel=kernel, spoil=True)
    assert first == "timed" and second.startswith("FAILED the check")


@pytest.mark.parametrize(("op", "job"), JOBS, ids=lambda one: getattr(one, "name", None) or f"{one.kernel}-{one.case.name}")
def test_the_shipped_configuration_competes(op, job) -> None:
    candidates = candidates_of(op, job)
    assert candidates[0].config == op.config(job) and not candidates[0].constants
    assert [one.shipped for one in candidates] == [True] + [False] * (len(candidates) - 1)
    assert len({one.label for one in candidates}) == len(candidates) >= 4
    cost = op.cost(job.case, torch.bfloat16, job.kernel)
    assert cost.flops > 0 and cost.bytes > 0


def test_the_stored_plan_is_about_these_candidates() -> None:
    stored = {(job["op"], job["kernel"], job["case"]): job["candidates"] for job in json.loads(PLAN.read_text())["jobs"]}
    assert set(stored) == {(op.name, job.kernel, job.case.name) for op, job in JOBS}
    for op, job in JOBS:
        found = stored[op.name, job.kernel, job.case.name]
        assert [one["label"] for one in found] == [one.label for one in candidates_of(op, job)]
    plan = read_plan(PLAN)
    for op, job, candidates in work_of(Settings(plan=plan), 90):
        dropped = plan[op.name, job.kernel, job.case.name]
        assert candidates[0].shipped and not {one.label for one in candidates[1:]} & set(dropped)
        assert len(candidates) <= run.MOST[job.case.importance]


def test_constants_are_set_where_they_are_used_and_put_back() -> None:
    (job,) = [job for job in KERNELS[CROSS, "decode"] if job.case.sizes["rows"] == 64]
    before = interval_config.MIN_BLOCKS_PER_UNIT, decode.MIN_BLOCKS_PER_UNIT
    with constants_set(OPS[CROSS], job, {"MIN_BLOCKS_PER_UNIT": 4}):
        assert (interval_config.MIN_BLOCKS_PER_UNIT, decode.MIN_BLOCKS_PER_UNIT) == (4, 4)
    assert before == (interval_config.MIN_BLOCKS_PER_UNIT, decode.MIN_BLOCKS_PER_UNIT)
    table = dict(residual_config.MAX_PROGRAMS)
    (job,) = KERNELS[RESIDUAL, "forward"]
    with constants_set(OPS[RESIDUAL], job, {"MAX_PROGRAMS": 7}):
        assert table | {"forward": 7} == residual_config.MAX_PROGRAMS
    assert table == residual_config.MAX_PROGRAMS


@pytest.mark.parametrize(
    ("others", "again", "choice"),
    [([3.0, 2.0], 2.51, 2), ([2.4], 2.3, 0), ([2.49], 2.5, 0), ([None], 2.5, 0), ([1.0], None, None)],
)
def test_another_configuration_must_win_by_more_than_the_noise(others, again, choice) -> None:
    measured = [Measured(str(index), ms=ms) for index, ms in enumerate([2.5, *others])]
    result = JobResult(SUBIMAGE, "forward", "a case", 64, measured=measured, again_ms=again)
    assert result.choice == (None if choice is None else measured[choice])


def plain_launch(self: Any, job: Job, inputs: Any, config: Any) -> tuple[torch.Tensor, ...]:
    return tuple(self.reference(job.case, inputs, torch.float32).values())


def tuned(folder: Path, **settings: Any) -> tuple[int, dict[str, Any], list[str]]:
    """Return the exit status of a run, what it stored and the lines it told."""
    lines: list[str] = []
    status = tune(Settings(seconds=0.0, **settings), folder, lines.append)
    (file,) = folder.glob("*.json")
    return status, json.loads(file.read_text()), lines


@pytest.fixture
def without_kernels(monkeypatch):
    """The plain statement in place of a kernel, on the CPU, on two small jobs."""
    work = [(OPS[op], small_job(op, "forward")) for op in (SUBIMAGE, RESIDUAL)]
    for op, _ in work:
        monkeypatch.setattr(type(op), "launch", plain_launch)
    monkeypatch.setattr(run, "find_device", lambda: (torch.device("cpu"), 90))
    monkeypatch.setattr(run, "work_of", lambda settings, arch: [(op, job, two_candidates(op.name, job)) for op, job in work])
    monkeypatch.setattr(timing, "MIN_SAMPLES", 1)


def test_a_run_is_stored(without_kernels, tmp_path) -> None:
    status, results, lines = tuned(tmp_path)
    assert status == 0 and results["format"] == run.FORMAT and "torch" in results and results["left_out"] == []
    assert [len(job["measured"]) for job in results["jobs"]] == [2, 2]
    assert all(job["choice"] and job["again_ms"] and job["measured"][0]["errors"]["out"] for job in results["jobs"])
    assert lines[-1].startswith("written: ") and lines[0].startswith(SUBIMAGE)


@pytest.mark.parametrize("spoiled", [0, 1])
def test_the_exit_status_tells_a_wrong_shipped_configuration(without_kernels, tmp_path, monkeypatch, spoiled) -> None:
    def launch(self, job, inputs, config):
        index = config.num_stages - self.config(job).num_stages
        return tuple(one + 0.001 * (index == spoiled) for one in plain_launch(self, job, inputs, config))

    monkeypatch.setattr(type(OPS[SUBIMAGE]), "launch", launch)
    status, results, lines = tuned(tmp_path)
    assert status == (spoiled == 0)
    assert [one["ms"] is None for one in results["jobs"][0]["measured"]] == [spoiled == 0, spoiled == 1]
    assert any(line.startswith("!") and "FAILED the check" in line for line in lines)


def test_the_budget_leaves_jobs_out(without_kernels, tmp_path) -> None:
    status, results, lines = tuned(tmp_path, budget=1.0)
    assert status == 0 and len(results["left_out"]) == 2 and "left out" in lines[-2]


def test_a_candidate_that_raises_is_a_remark(without_kernels, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(type(OPS[SUBIMAGE]), "launch", mock.Mock(side_effect=RuntimeError("out of resources\nmore")))
    status, results, _ = tuned(tmp_path)
    remarks = {one["remark"] for one in results["jobs"][0]["measured"]}
    assert status == 1 and remarks == {"does not run: RuntimeError: out of resources"}


def test_bad_arguments(tmp_path, capsys) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="has format None"):
        read_plan(tmp_path / "other.json")
    assert command.main(["--plan", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 2
    assert "cannot be read as a tuning plan" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main(["--out", str(tmp_path)]) == 2
        assert "there is neither" in capsys.readouterr().err


def test_a_dry_gpu(tmp_path) -> None:
    """Everything around the numbers, on the real shapes of every job: inputs, references, replays, graphs, the table."""
    dry = load_file(Path(__file__).with_name("dry_cuda.py"))

    def compare(name, actual, plain, exact):
        assert actual.dtype == plain.dtype, name
        return dry.compare_shapes(name, actual, plain, exact)

    shorter = mock.patch.multiple(timing, WARM_UPS=1, MIN_SAMPLES=1)
    fewer = mock.patch.multiple(run, MOST=dict.fromkeys(run.MOST, 1), assert_error_budget=compare)
    with shorter, fewer, dry.dry_cuda(), recorded_launches() as launches:
        status, results, lines = tuned(tmp_path)
    assert status == 0, lines
    # A sample takes 1 ms there, and a graph holds as many runs as there are sets of inputs.
    assert len(results["jobs"]) == len(JOBS) and results["ceilings"]
    assert all(0.0 < job["measured"][0]["ms"] <= 1.0 and job["floor_ms"] > 0 for job in results["jobs"])
    assert {op.kernels[job.kernel] for op, job in JOBS} <= {one.kernel.__name__ for one in launches}


@pytest.mark.slow
@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter compiles nothing")
def test_the_compiler_drops_a_serialised_candidate() -> None:
    from tuning_plan import assess

    op = OPS[SUBIMAGE]
    job = next(job for one, job in JOBS if one is op and op.width(job.case) == 112)
    shipped = candidates_of(op, job)[0]
    crowded = Candidate(replace(shipped.config, num_stages=2, max_registers=128))
    assert "serialised" in assess(op, job, crowded)["dropped"] and assess(op, job, shipped)["dropped"] == ""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real driver must not be replaced")
def test_compiling_beforehand_fills_the_cache(tmp_path, monkeypatch) -> None:
    """On the way that a launch takes, so that the timing process finds it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    answers = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
    stand_in = mock.Mock(**{f"{name}.return_value": value for name, value in answers.items()})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", stand_in)
    (job,) = KERNELS[RESIDUAL, "forward"]
    assert run._compile_one(RESIDUAL, job, candidates_of(OPS[RESIDUAL], job)[0])
    assert list(tmp_path.rglob("forward_kernel.cubin"))
