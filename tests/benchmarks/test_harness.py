"""The harness: the gate in front of every figure, the budget, refusals, new ops, exported models, and what a GPU adds."""

import copy
import itertools
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import infimm_fast.export
from infimm_fast.benchmarks import SECTIONS, harness, registry
from infimm_fast.benchmarks.ceilings import Ceilings
from infimm_fast.benchmarks.display import case_table
from infimm_fast.benchmarks.registry import IMPLEMENTATIONS, STAGES, BenchCase, Implementation, Plan, Prepared, Stage
from infimm_fast.benchmarks.report import Report
from infimm_fast.benchmarks.suites import exported
from infimm_fast.benchmarks.suites.attention import naive, once_for_case
from infimm_fast.benchmarks.timing import Timer, input_sets, pinned_threads
from infimm_fast.errors import ConfigurationError
from infimm_fast.export.common.errors import ArtifactError
from infimm_fast.kernels.common import cases
from infimm_fast.kernels.common.cases import GATE, Case
from infimm_fast.kernels.common.numerics import outlier_normal
from infimm_fast.models.infimm_hd.presets import preset

CPU = torch.device("cpu")
README = Path(__file__).parents[2] / "benchmarks" / "README.md"
pytestmark = pytest.mark.usefixtures("own_registry")


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")(test))


def attention_case(backward=False):
    sizes = {"tiles": 3, "tokens": 33, "heads": 2, "head_dim": 24}
    return BenchCase("small", sizes, backward, dtype="float32", flops=10**6, bytes=10**5)


def measure(one, backward=False):
    timer, ceilings = Timer(CPU, 0.0), Ceilings(matmul_tflops=1.0, copy_gb_s=100.0)
    (row,) = harness.run_case(STAGES["subimage_attention"], attention_case(backward), [one], timer, ceilings).rows
    return row


@pytest.mark.parametrize("backward", (False, True))
def test_a_right_implementation_gets_a_figure(backward):
    row = measure(IMPLEMENTATIONS["subimage_attention"]["naive"], backward)
    assert row.median_ms > 0 and row.tflops > 0 and row.share > 0 and not row.remark and not row.failed
    assert set(row.errors) == ({"out", "dq", "dk", "dv"} if backward else {"out"})


def wrong_scale(case, inputs):
    return lambda: naive(*(inputs["qkv"] * torch.tensor([1.01, 1, 1]).view(3, 1, 1)).unbind(2))


def wrong_gradient(case, inputs):
    def run():
        q, k, v = inputs["qkv"].unbind(2)
        k.register_hook(lambda gradient: gradient * 1.01)
        return naive(q, k, v)

    return run


def wrong_last_tile(case, inputs):
    """Only two tiles are compared with float64: the first and the last."""
    return lambda: torch.cat((naive(inputs["q"], inputs["k"], inputs["v"])[:-1], torch.zeros_like(inputs["q"][-1:])))


def refuses(case, inputs):
    raise RuntimeError("no kernel\nfor this")


def missing(case, inputs):
    import a_package_that_nobody_has  # noqa: F401


@pytest.mark.parametrize(
    ("prepare", "backward", "ours", "remark", "failed"),
    [
        (wrong_scale, False, False, "FAILED the check: out.*", True),
        (wrong_scale, True, False, "FAILED the check: out.*", True),
        (wrong_gradient, True, False, "FAILED the check: dk.*", True),
        (wrong_last_tile, False, False, "FAILED the check: out.*", True),
        # A refusal is a failure only if it is one of our own.
        (refuses, False, False, "does not run: RuntimeError: no kernel", False),
        (refuses, False, True, "does not run: RuntimeError: no kernel", True),
        (missing, False, False, "not installed: No module named 'a_package_that_nobody_has'", False),
    ],
)
def test_what_is_wrong_or_does_not_run_gets_no_figure(prepare, backward, ours, remark, failed):
    row = measure(Implementation("one", prepare, ours=ours), backward)
    assert re.fullmatch(remark, row.remark, re.DOTALL) and row.failed is failed
    assert row.median_ms is None and row.tflops is None and row.share is None


def test_a_card_too_small_for_a_case_is_said_and_the_run_goes_on(monkeypatch):
    def too_large(case, device, seed):
        raise torch.cuda.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(STAGES["subimage_attention"], "make_inputs", too_large)
    row = measure(IMPLEMENTATIONS["subimage_attention"]["naive"])
    assert row.remark == "does not run: out of memory for inputs and reference" and not row.failed


def test_stages_are_timed_and_shared_objects_restored():
    closed = []

    def staged(case, inputs):
        run = lambda: naive(inputs["q"], inputs["k"], inputs["v"])  # noqa: E731
        return Prepared(run, {"first": run, "second": run}, lambda: closed.append(True))

    row = measure(Implementation("staged", staged))
    assert set(row.stages) == {"first", "second"} and min(row.stages.values()) > 0
    assert len(closed) == input_sets(1, CPU)


class Scripted(Stage):
    """A stage whose runs take as long as a script says, by a clock that nothing else moves."""

    name, section = "scripted", "ops"

    def __init__(self, durations, importances=(0,)):
        self.seconds, self.durations, self.importances = 0.0, itertools.cycle(durations), importances
        registry.register_stage(self)
        registry.register_implementation(self.name, "doubling")(self.prepare)

    def cases(self, plan):
        kind = {"dtype": "float32", "flops": 100, "bytes": 100}
        return [
            BenchCase(f"case {i}", {"n": 8}, importance=importance, series=(("cases", "number", i),), **kind)
            for i, importance in enumerate(self.importances)
        ]

    def make_inputs(self, case, device, seed):
        return {"x": outlier_normal(8, dtype=torch.float32, device=device, seed=seed)}

    def reference(self, case, inputs, dtype):
        return {"out": inputs["x"].to(dtype) * 2}

    def prepare(self, case, inputs):
        def run():
            self.seconds += next(self.durations)
            return inputs["x"] * 2

        return run

    @property
    def asked(self):
        """Arguments of the fixture `run`."""
        return {"ops": ("scripted",), "now": lambda: self.seconds}


def test_the_median_and_percentiles_come_from_the_clock(run):
    report = run(**Scripted([0.001, 0.002, 0.003, 0.002, 0.002]).asked)
    (row,) = report.cases[0].rows
    assert row.samples >= 5 and [row.p10_ms, row.median_ms, row.p90_ms] == pytest.approx([1.0, 2.0, 3.0])
    assert row.share == pytest.approx(Ceilings(**report.ceilings).least_ms(100, 100)[0] / 2.0)


def test_a_budget_takes_important_cases_first_and_stops_before_one_that_does_not_fit(run):
    stage = Scripted([0.5], importances=(2, 0, 1))
    assert [case.case for case in run(**stage.asked).cases] == ["case 1", "case 2", "case 0"]
    each, stage.seconds = stage.seconds / 3, 0.0
    limited = run(**stage.asked, budget=2.5 * each)
    assert [case.case for case in limited.cases] == ["case 1", "case 2"]
    assert limited.left_out == ["scripted, case 0"] and stage.seconds <= 2.5 * each


def test_a_budget_learns_from_cases_that_took_longer_than_estimated():
    times = iter([0.0, 0.0, 0.0, 50.0])
    budget = harness.Budget(100.0, lambda: next(times, 50.0))
    assert budget.fits("a", 10.0)
    with budget.watch("a", 10.0):
        pass
    assert not budget.fits("a", 10.5) and budget.fits("a", 9.5) and budget.fits("b", 50.0)


@pytest.mark.parametrize(
    ("sections", "others", "word"),
    [
        (("nonsense",), {}, "section 'nonsense'"),
        (("ops",), {"ops": ("nonsense",)}, "op 'nonsense'"),
        (("ops",), {"against": ("nonsense",)}, "peer 'nonsense'"),
    ],
)
def test_unknown_names_are_refused(run, sections, others, word):
    with pytest.raises(ConfigurationError, match=word):
        run(*sections, **others)


def test_against_deselects_peers_only(run):
    asked = Scripted([0.001]).asked
    for name in ("ours", "other"):
        registry.register_implementation("scripted", name, ours=name == "ours")(lambda case, inputs: lambda: inputs["x"] * 2)
    report = run(ops=asked["ops"], against=("other",))
    assert [row.implementation for row in report.cases[0].rows] == ["ours", "other"]


def test_minutes_of_compiling_are_for_main_cases_only():
    slow = Implementation("slow", lambda case, inputs: lambda: None, setup_seconds=60, main_only=True)
    case = attention_case()
    assert "main cases only" in slow.obstacle(case, CPU) and slow.obstacle(replace(case, importance=0), CPU) is None


def test_a_report_is_read_as_it_was_written(run, tmp_path):
    report, file = run(**Scripted([0.001]).asked), tmp_path / "deep" / "report.json"
    report.save(file)
    assert list(file.parent.iterdir()) == [file] and Report.load(file) == report


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "has format None"), ('{"format": "infimm_fast benchmark 1"}', "make it anew"), (None, "cannot be read")],
)
def test_another_file_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "other.json").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        Report.load(tmp_path / "other.json")


def test_a_stage_and_a_peer_are_one_registration_each_as_the_readme_says(run):
    names = vars(registry) | {"outlier_normal": outlier_normal}
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        assert len([line for line in example.splitlines() if line.strip()]) <= 10
        exec(example, names)
    report = run(ops=("doubling",))
    ((row,),) = (case.rows for case in report.cases)
    assert row.implementation == "by addition" and row.median_ms > 0 and not report.failed


def test_an_op_without_a_suite_is_measured_on_its_own_cases(run, monkeypatch):
    op = copy.copy(registry.find_ops()["gated_residual"])
    sizes = {"rows": 1, "tokens": 2, "width": 32}
    op.name, op.cases = "own", (Case("small", sizes, backward=True), Case("for the compiler", sizes, uses=(GATE,)))
    monkeypatch.setitem(cases._REGISTERED, "own", op)
    (case,) = run(ops=("own",)).cases
    cost = op.cost(op.cases[0], torch.float32)
    assert (case.case, case.flops, case.bytes) == ("small", cost.flops, cost.bytes)
    rows = {row.implementation: row for row in case.rows}
    assert list(rows) == ["reference", "infimm_fast sdpa", "infimm_fast"]
    results = {*op.outputs, *op.leaves_of(op.cases[0])}
    assert set(rows["reference"].errors) == set(rows["infimm_fast sdpa"].errors) == results
    assert rows["infimm_fast"].remark == "needs a CUDA GPU"


def test_a_figure_above_a_ceiling_is_flagged_and_the_ceilings_are_measured_again(run, monkeypatch):
    measured = iter([Ceilings(1e-9, 1e-6), Ceilings(1e-8, 1e-7), *[Ceilings(1e-9, 1e-9)] * 9])
    monkeypatch.setattr(harness, "measure_ceilings", lambda dtype, timer: next(measured))
    lines = []
    report = run(**Scripted([1e-3], (0,) * 9).asked, tell=lines.append)
    assert report.ceilings == {"matmul_tflops": 1e-8, "copy_gb_s": 1e-6}
    assert sum("measured again" in line for line in lines) == 3 and len(list(measured)) == 11 - 4
    assert [row.share for case in report.cases for row in case.rows] == [pytest.approx(100.0)] * 9
    assert case_table(report.cases[0])[1][0][-2:] == ["10000%", "ABOVE the measured ceiling"]


def test_all_input_sets_of_a_case_share_masks():
    made, one, other = [], attention_case(), attention_case()
    shared = once_for_case(lambda case, device: made.append(case) or naive)
    for case in (one, one, other, other, one):
        shared(case, CPU)
    assert [case is one for case in made] == [True, False, True]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no threads")
def test_pinning_is_undone():
    before = os.sched_getaffinity(0)
    with pinned_threads():
        assert len(os.sched_getaffinity(0)) == min(len(before), torch.get_num_threads())
    assert os.sched_getaffinity(0) == before


def stand_in(error=0.0, verified=True):
    """What `infimm_fast.export.load` returns, as far as the benchmark uses it."""

    def encode_tiles(pixels, grids, counts):
        assert (tuple(pixels.shape), grids.tolist(), counts.tolist()) == ((5, 3, 112, 112), [[2, 2]], [1])
        return SimpleNamespace(features=pixels.flatten(1) * (1 + error))

    def generate_tokens(ids, mask, encoded, max_new_tokens):
        assert ids.shape == mask.shape == (1, 32) and max_new_tokens == 1
        return ids[:, :1]

    manifest, backend = SimpleNamespace(dtype="float32", verified=verified), SimpleNamespace(to_tensor=lambda value: value)
    kept = {"config": preset("tiny"), "manifest": manifest, "backend": backend}
    return SimpleNamespace(encode_tiles=encode_tiles, generate_tokens=generate_tokens, **kept)


@pytest.mark.parametrize(
    ("cpu", "other", "remarks"),
    [
        ({}, {"error": 1e-6}, ("", "")),
        ({}, {"error": 1e-2}, ("", "RMS deviation")),
        ({"verified": False}, {}, ("never verified", "never verified")),
    ],
    ids=("right", "another result", "never verified"),
)
def test_a_provider_is_timed_by_stages_and_compared_with_the_cpus(run, monkeypatch, cpu, other, remarks):
    loaded = {"cpu": stand_in(**cpu), "other": stand_in(**other)}
    monkeypatch.setattr(infimm_fast.export, "load", lambda folder, provider="cpu": loaded[provider])
    registry.register_implementation("exported_model", "other", graph=False)(partial(exported._prepare, "other"))
    (case,) = run("export", artifacts=("a folder",)).cases
    rows = {row.implementation: row for row in case.rows}
    assert rows["onnxruntime cuda"].remark == "needs a CUDA GPU"
    for name, remark in zip(("onnxruntime cpu", "other"), remarks, strict=True):
        row = rows[name]
        if remark:
            assert row.failed and row.median_ms is None and remark in row.remark
        else:
            assert row.median_ms > 0 and set(row.stages) == {"encode", "first token"}


def test_what_is_no_artifact_is_one_line(run, monkeypatch):
    monkeypatch.setattr(infimm_fast.export, "load", mock.Mock(side_effect=ArtifactError("a folder is no artifact")))
    with pytest.raises(ConfigurationError, match="a folder is no artifact"):
        run("export", artifacts=("a folder",))


@on_gpu
def test_the_tiny_preset_on_a_gpu():
    plan = Plan("tiny", "bfloat16", torch.device("cuda"))
    peers = ("naive", "naive, K/V cached", "sdpa", "sdpa dense mask")
    report = harness.run_benchmarks(harness.Settings(SECTIONS, plan, 0.0, against=peers))
    assert not report.failed
    assert report.ceilings["matmul_tflops"] > 1 and report.ceilings["copy_gb_s"] > 50
    for case in report.cases:
        assert all(row.peak_memory_mb is not None for row in case.rows if row.mode == "eager" and row.median_ms)
        if case.section in ("ops", "cross", "vision", "decode"):
            assert {row.mode for row in case.rows} == {"eager", "graph"}
            for row in (row for row in case.rows if row.ours):
                assert row.median_ms is not None and row.median_ms > 0, (case.op, case.case, row)


@on_gpu
def test_a_graph_of_many_runs_is_divided_by_their_number():
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    timer = Timer(torch.device("cuda"), 0.1)
    one, many = timer.graph([lambda: a @ a]), timer.graph([lambda: a @ a] * 8)
    assert many.median == pytest.approx(one.median, rel=0.3)


@on_gpu
def test_small_inputs_rotate_and_large_ones_do_not():
    assert input_sets(2**20, torch.device("cuda")) > 8 and input_sets(2**33, torch.device("cuda")) == 1
