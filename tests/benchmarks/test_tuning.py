"""The tuner: the shipped configuration always competes, wrong results get no time, what is stored says what happened."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from infimm_fast.benchmarks import timing
from infimm_fast.benchmarks.tuning import __main__ as command
from infimm_fast.benchmarks.tuning import run
from infimm_fast.benchmarks.tuning.candidates import Candidate, candidates_of, constants_set
from infimm_fast.benchmarks.tuning.run import Measured, Settings, read_plan
from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.cases import TUNE, Case, Job, find_ops, jobs_of
from infimm_fast.kernels.common.offline import recorded_launches
from infimm_fast.kernels.interval import config, decode
from infimm_fast.kernels.interval.cases import make_sizes, visual_tokens
from infimm_fast.kernels.residual import config as residual_config
from interpreter import load_file
from tuning_plan import assess
from tuning_plan import main as make_plan

PLAN = Path(__file__).parents[2] / "benchmarks" / "results" / "tuning_plan_sm90.json"
OPS = find_ops()
SUBIMAGE, CROSS, RESIDUAL = "subimage_attention", "interval_attention", "gated_residual"
JOBS = [(op, job) for op in OPS.values() for job in jobs_of(op, TUNE, ("bfloat16",), (90,))]
KERNELS = {(op.name, job.kernel): job for op, job in JOBS}
compiles = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter compiles nothing")
WORK = [(SUBIMAGE, "forward"), (RESIDUAL, "forward")]


def small_work(op, kernel):
    """Return an op, a job that the interpreter does in less than a second, the shipped candidate and a similar one."""
    decodes = kernel == "decode"
    text = {"tiles": 1, "tokens_per_tile": 300 if decodes else 40, "kv_blocks": 2}
    sizes = {
        SUBIMAGE: {"tiles": 1, "tokens": 33, "heads": 1, "head_dim": 16},
        CROSS: make_sizes(*((2, 2) if decodes else (1, 12)), 2, 1, 16, **text),
        RESIDUAL: {"rows": 1, "tokens": 4, "width": 32},
    }[op]
    job = Job(kernel, Case("small", sizes, kernel.startswith("backward"), 0), "float32", 90)
    shipped = candidates_of(OPS[op], job)[0]
    other = Candidate(replace(shipped.config, num_stages=shipped.config.num_stages + 1))
    return OPS[op], job, [shipped, Candidate(shipped.config, {"TARGET_POOL": 1024}) if decodes else other]


def tuned(folder, **settings):
    """Return the exit status of a run, what it stored, "timed" or a remark for each candidate of a job, and all lines."""
    lines = []
    status = run.tune(Settings(seconds=0.0, **settings), folder, lines.append)
    (file,) = folder.glob("*.json")
    results = json.loads(file.read_text())
    remarks = [["timed" if one["ms"] is not None else one["remark"] for one in job["measured"]] for job in results["jobs"]]
    return status, results, remarks, lines


def spoiled(launch, wrong):
    """Return a launcher that computes with other values than it should for one of the candidates of `small_work`."""

    def launched(self, job, inputs, config):
        results, index = launch(self, job, inputs, config), config.num_stages - self.config(job).num_stages
        return tuple(one * 1.001 for one in results) if index == wrong else results

    return launched


def tuned_small(folder, kernels, launch=None, wrong=None, **settings):
    """Run small jobs, of an op and a kernel each, by `launch` if given; see that a refused candidate is never timed."""
    work, device = [small_work(op, kernel) for op, kernel in kernels], (torch.device("cpu"), 90)
    with mock.patch.multiple(timing, WARM_UPS=0, MIN_SAMPLES=1), contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(run, find_device=lambda: device, work_of=lambda settings, arch: work))
        for op, *_ in work:
            stack.enter_context(mock.patch.object(type(op), "launch", spoiled(launch or type(op).launch, wrong)))
        watched = stack.enter_context(mock.patch.object(run, "time_candidate", wraps=run.time_candidate))
        found = tuned(folder, **settings)
    timed = {(op.name, candidate.label) for (op, _, candidate, *_), _ in watched.call_args_list}
    assert timed == {(job["op"], x["label"]) for job in found[1]["jobs"] for x in job["measured"] if x["ms"] is not None}
    return found


def plain(self, job, inputs, config):
    """The plain statement in place of a kernel."""
    return tuple(self.reference(job.case, inputs, torch.float32).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "kernel", "wrong"),
    [*((*one, None) for one in KERNELS), (SUBIMAGE, "forward", 1), (CROSS, "backward_kv", 1), (RESIDUAL, "backward", 1)],
)
def test_every_kernel_runs_and_a_wrong_result_is_never_timed(interpreter, tmp_path, op, kernel, wrong):
    found = interpreter.call(__file__, "tuned_small", folder=tmp_path, kernels=[(op, kernel)], wrong=wrong)
    status, _, [[first, second]], _ = found
    assert status == 0 and first == "timed"
    assert second.startswith("FAILED the check") if wrong else second == "timed"


@pytest.mark.parametrize("wrong", [0, 1])
def test_the_exit_status_tells_a_wrong_shipped_configuration(tmp_path, wrong):
    status, _, [remarks], lines = tuned_small(tmp_path, WORK[:1], launch=plain, wrong=wrong)
    assert status == (wrong == 0) and remarks.pop(1 - wrong) == "timed"
    assert any(line.startswith("!") and "FAILED the check" in line for line in lines) and "FAILED the check" in remarks[0]


def test_a_candidate_that_raises_is_a_remark(tmp_path):
    launch = mock.Mock(side_effect=RuntimeError("out of resources\nmore"))
    status, _, remarks, _ = tuned_small(tmp_path, WORK[:1], launch=launch)
    assert status == 1 and remarks == [["does not run: RuntimeError: out of resources"] * 2]


@pytest.mark.parametrize(("budget", "measured", "left_out"), [(None, [2, 2], 0), (1.0, [], 2)])
def test_a_run_is_stored_and_its_budget_leaves_jobs_out(tmp_path, budget, measured, left_out):
    status, results, _, lines = tuned_small(tmp_path, WORK, launch=plain, budget=budget)
    assert status == 0 and results["format"] == run.FORMAT and "torch" in results
    assert [len(job["measured"]) for job in results["jobs"]] == measured and len(results["left_out"]) == left_out
    assert all(job["choice"] and job["again_ms"] and job["measured"][0]["errors"]["out"] for job in results["jobs"])
    assert lines[-1].startswith("written: ") and lines[0].startswith("left out" if left_out else SUBIMAGE)


@pytest.mark.parametrize(("op", "job"), JOBS, ids=lambda one: getattr(one, "name", None) or f"{one.kernel}-{one.case.name}")
def test_the_shipped_configuration_competes(op, job):
    candidates = candidates_of(op, job)
    assert candidates[0].config == op.config(job) and not candidates[0].constants
    assert [one.shipped for one in candidates] == [True] + [False] * (len(candidates) - 1)
    assert len({one.label for one in candidates}) == len(candidates) >= 4
    cost = op.cost(job.case, torch.bfloat16, job.kernel)
    assert cost.flops > 0 and cost.bytes > 0


def test_the_stored_plan_is_about_these_candidates():
    jobs, plan = json.loads(PLAN.read_text())["jobs"], read_plan(PLAN)
    stored = {(job["op"], job["kernel"], job["case"], *(one["label"] for one in job["candidates"])) for job in jobs}
    assert stored == {(op.name, job.kernel, job.case.name, *(x.label for x in candidates_of(op, job))) for op, job in JOBS}
    for op, job, candidates in run.work_of(Settings(plan=plan), 90):
        dropped = plan[op.name, job.kernel, job.case.name]
        assert candidates[0].shipped and not {one.label for one in candidates[1:]} & set(dropped)
        assert len(candidates) <= run.MOST[job.case.importance]


def test_constants_are_set_where_they_are_used_and_put_back():
    (job,) = (job for op, job in JOBS if job.kernel == "decode" and job.case.sizes["rows"] == 64)
    before = config.MIN_BLOCKS_PER_UNIT, decode.MIN_BLOCKS_PER_UNIT
    with constants_set(OPS[CROSS], job, {"MIN_BLOCKS_PER_UNIT": 4}):
        assert (config.MIN_BLOCKS_PER_UNIT, decode.MIN_BLOCKS_PER_UNIT) == (4, 4)
    assert before == (config.MIN_BLOCKS_PER_UNIT, decode.MIN_BLOCKS_PER_UNIT)
    sizes = job.case.sizes
    for target, pool in ((1200, 100), (12000, 1000)):
        with constants_set(OPS[CROSS], job, {"TARGET_POOL": target}):
            split = config.choose_split(sizes["rows"], 1, 1, sizes["heads"], visual_tokens(sizes), OPS[CROSS].config(job))
        assert split.pool == pool
    table = dict(residual_config.MAX_PROGRAMS)
    with constants_set(OPS[RESIDUAL], KERNELS[RESIDUAL, "forward"], {"MAX_PROGRAMS": 7}):
        assert table | {"forward": 7} == residual_config.MAX_PROGRAMS
    assert table == residual_config.MAX_PROGRAMS


@pytest.mark.parametrize(
    ("others", "again", "choice"),
    [([3.0, 2.0], 2.51, 2), ([2.4], 2.3, 0), ([2.49], 2.5, 0), ([None], 2.5, 0), ([1.0], None, None)],
)
def test_another_configuration_must_win_by_more_than_the_noise(others, again, choice):
    measured = [Measured(str(index), ms=ms) for index, ms in enumerate([2.5, *others])]
    result = run.JobResult(SUBIMAGE, "forward", "a case", 64, measured=measured, again_ms=again)
    assert result.choice == (None if choice is None else measured[choice])


def test_bad_arguments(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="has format None"):
        read_plan(tmp_path / "other.json")
    assert command.main(["--plan", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 2
    assert "cannot be read as a tuning plan" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main(["--out", str(tmp_path)]) == 2
        assert "there is neither" in capsys.readouterr().err


def test_a_dry_gpu(tmp_path):
    """Everything around the numbers, on the real shapes of every job: inputs, references, replays, graphs, the table."""
    dry = load_file(Path(__file__).with_name("dry_cuda.py"))

    def compare(name, actual, plain, exact):
        assert actual.dtype == plain.dtype, name
        return dry.compare_shapes(name, actual, plain, exact)

    shorter = mock.patch.multiple(timing, WARM_UPS=1, MIN_SAMPLES=1)
    fewer = mock.patch.multiple(run, MOST=dict.fromkeys(run.MOST, 1), assert_error_budget=compare)
    with shorter, fewer, dry.dry_cuda(), recorded_launches() as launches:
        status, results, _, lines = tuned(tmp_path)
    assert status == 0, lines
    # A sample takes 1 ms there, and a graph holds as many runs as there are sets of inputs.
    assert len(results["jobs"]) == len(JOBS) and results["ceilings"]
    assert all(0.0 < job["measured"][0]["ms"] <= 1.0 and job["floor_ms"] > 0 for job in results["jobs"])
    assert {op.kernels[job.kernel] for op, job in JOBS} <= {one.kernel.__name__ for one in launches}


@pytest.mark.slow
@compiles
def test_the_compiler_drops_a_serialised_candidate():
    op, job = next((op, job) for op, job in JOBS if op.name == SUBIMAGE and op.width(job.case) == 112)
    shipped = candidates_of(op, job)[0]
    crowded = Candidate(replace(shipped.config, num_stages=2, max_registers=128))
    assert "serialised" in assess(op, job, crowded)["dropped"] and assess(op, job, shipped)["dropped"] == ""


@pytest.mark.slow
@compiles
def test_a_plan_is_made(tmp_path):
    file, job = tmp_path / "plan.json", KERNELS[RESIDUAL, "forward"]
    make_plan(["--out", str(file), "--op", RESIDUAL, "--kernel", "forward", "--processes", "1"])
    ((key, dropped),) = read_plan(file).items()
    labels = [one.label for one in candidates_of(OPS[RESIDUAL], job)]
    assert key == (RESIDUAL, "forward", job.case.name) and labels[0] not in dropped and set(dropped) <= set(labels)
    (stored,) = json.loads(file.read_text())["jobs"]
    assert [one["label"] for one in stored["candidates"]] == labels and stored["candidates"][0]["code"]["registers"] > 0


@pytest.mark.slow
def test_compiling_beforehand_ends_with_its_share_of_the_budget():
    lines = []
    run.compile_all([small_work(SUBIMAGE, "forward")], Settings(budget=0.0, processes=1), lines.append)
    assert lines == ["not all of 2 candidates were compiled beforehand: TimeoutError"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real driver must not be replaced")
def test_compiling_beforehand_fills_the_cache(tmp_path, monkeypatch):
    """On the way that a launch takes, so that the timing process finds it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    answers = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
    monkeypatch.setattr(driver, "_active", mock.Mock(**{f"{name}.return_value": value for name, value in answers.items()}))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    job = KERNELS[RESIDUAL, "forward"]
    assert run._compile_one(RESIDUAL, job, candidates_of(OPS[RESIDUAL], job)[0])
    assert list(tmp_path.rglob("forward_kernel.cubin"))
