"""The harness: the gate in front of every figure, the budget, refusals, and one registration for a new op."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infimm_fast.benchmarks import harness, registry
from infimm_fast.benchmarks.ceilings import Ceilings
from infimm_fast.benchmarks.display import case_table
from infimm_fast.benchmarks.harness import Budget, Settings, run_benchmarks, run_case
from infimm_fast.benchmarks.registry import (
    IMPLEMENTATIONS,
    STAGES,
    BenchCase,
    Implementation,
    Plan,
    Prepared,
    Stage,
    load_suites,
    register_implementation,
    register_stage,
)
from infimm_fast.benchmarks.report import Report
from infimm_fast.benchmarks.suites.attention import naive, once_for_case
from infimm_fast.benchmarks.timing import Timer, input_sets, pinned_threads
from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.cases import GATE, Case, Cost, Op
from infimm_fast.kernels.common.numerics import outlier_normal

CPU = torch.device("cpu")
PLAN = Plan("tiny", "float32", CPU)
CEILINGS = Ceilings(matmul_tflops=1.0, copy_gb_s=100.0)
README = Path(__file__).parents[2] / "benchmarks" / "README.md"


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    load_suites()
    for name, ones in IMPLEMENTATIONS.items():
        monkeypatch.setitem(IMPLEMENTATIONS, name, dict(ones))
    before = set(STAGES)
    yield
    for name in set(STAGES) - before:
        del STAGES[name], IMPLEMENTATIONS[name]


def attention_case(backward=False):
    sizes = {"tiles": 3, "tokens": 33, "heads": 2, "head_dim": 24}
    return BenchCase("small", sizes, backward, dtype="float32", flops=10**6, bytes=10**5)


def measure(name, backward=False):
    op, case = STAGES["subimage_attention"], attention_case(backward)
    result = run_case(op, case, [IMPLEMENTATIONS[op.name][name]], Timer(CPU, 0.0), CEILINGS)
    (row,) = result.rows
    return row


@pytest.mark.parametrize("backward", (False, True))
def test_a_wrong_implementation_gets_no_figure(backward):
    good = measure("naive", backward)
    assert good.median_ms > 0 and good.tflops > 0 and good.share > 0 and not good.remark and not good.failed
    assert set(good.errors) == ({"out", "dq", "dk", "dv"} if backward else {"out"})

    @register_implementation("subimage_attention", "wrong scale")
    def wrong_scale(case, inputs):
        return lambda: naive(*(inputs["qkv"] * torch.tensor([1.01, 1, 1]).view(3, 1, 1)).unbind(2))

    wrong = measure("wrong scale", backward)
    assert wrong.failed and "FAILED the check: out" in wrong.remark
    assert wrong.median_ms is None and wrong.tflops is None and wrong.share is None


def test_a_wrong_gradient_gets_no_figure():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    @register_implementation("subimage_attention", "wrong gradient")
    def wrong_gradient(case, inputs):
        def run():
            q, k, v = inputs["qkv"].unbind(2)
            return naive(q, Wrong.apply(k), v)

        return run

    wrong = measure("wrong gradient", backward=True)
    assert wrong.failed and wrong.median_ms is None and "FAILED the check: dk" in wrong.remark


def test_a_wrong_last_tile_is_found():
    """Only two tiles are compared with float64: the first and the last."""

    @register_implementation("subimage_attention", "wrong last tile")
    def wrong_last_tile(case, inputs):
        return lambda: torch.cat((naive(inputs["q"], inputs["k"], inputs["v"])[:-1], torch.zeros_like(inputs["q"][-1:])))

    assert measure("wrong last tile").failed


@pytest.mark.parametrize("ours", (False, True))
def test_a_refusal_is_shown_and_only_our_own_is_a_failure(ours):
    @register_implementation("subimage_attention", "refuses", ours=ours)
    def refuses(case, inputs):
        raise RuntimeError("no kernel\nfor this")

    row = measure("refuses")
    assert row.remark == "does not run: RuntimeError: no kernel" and row.failed is ours and row.median_ms is None


def test_a_missing_peer_is_shown_as_not_installed():
    @register_implementation("subimage_attention", "missing")
    def missing(case, inputs):
        import a_package_that_nobody_has  # noqa: F401

    row = measure("missing")
    assert row.remark == "not installed: No module named 'a_package_that_nobody_has'" and not row.failed


def test_stages_are_timed_and_shared_objects_restored():
    closed = []

    @register_implementation("subimage_attention", "staged")
    def staged(case, inputs):
        run = lambda: naive(inputs["q"], inputs["k"], inputs["v"])  # noqa: E731
        return Prepared(run, {"first": run, "second": run}, lambda: closed.append(True))

    row = measure("staged")
    assert set(row.stages) == {"first", "second"} and min(row.stages.values()) > 0
    assert len(closed) == input_sets(1, CPU)


class Clock:
    """A clock that moves only when told to."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Scripted(Stage):
    """A stage whose runs take as long as a script says."""

    name, section = "scripted", "ops"

    def __init__(self):
        self.clock = Clock()
        self.importances = (0,)

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


def scripted(durations, importances=(0,)):
    """Register a stage whose runs take these seconds in turn; return it."""
    op = register_stage(Scripted())
    op.importances = importances
    calls = iter(range(10**9))

    @register_implementation("scripted", "doubling")
    def doubling(case, inputs):
        def run():
            op.clock.seconds += durations[next(calls) % len(durations)]
            return inputs["x"] * 2

        return run

    return op


def run_scripted(op, budget=None):
    return run_benchmarks(Settings(("ops",), PLAN, 0.0, budget, ops=("scripted",)), now=op.clock)


def test_the_median_and_percentiles_come_from_the_clock():
    report = run_scripted(scripted([0.001, 0.002, 0.003, 0.002, 0.002]))
    (row,) = report.cases[0].rows
    assert row.median_ms == pytest.approx(2.0) and row.samples >= 5
    assert row.p10_ms == pytest.approx(1.0) and row.p90_ms == pytest.approx(3.0)
    assert row.share == pytest.approx(Ceilings(**report.ceilings).least_ms(100, 100)[0] / 2.0)


def test_a_budget_takes_important_cases_first_and_stops_before_one_that_does_not_fit():
    op = scripted([0.5], importances=(2, 0, 1))
    unlimited = run_scripted(op)
    assert [case.case for case in unlimited.cases] == ["case 1", "case 2", "case 0"]
    each = op.clock.seconds / 3
    op.clock.seconds = 0.0
    limited = run_scripted(op, budget=2.5 * each)
    assert [case.case for case in limited.cases] == ["case 1", "case 2"]
    assert limited.left_out == ["scripted, case 0"]
    assert op.clock.seconds <= 2.5 * each


def test_a_budget_learns_from_cases_that_took_longer_than_estimated():
    clock = Clock()
    budget = Budget(100.0, clock)
    assert budget.fits("a", 10.0)
    with budget.watch("a", 10.0):
        clock.seconds += 50.0
    assert not budget.fits("a", 10.5) and budget.fits("a", 9.5) and budget.fits("b", 50.0)


def test_unknown_names_are_refused():
    for settings, word in (
        (Settings(("nonsense",), PLAN, 0.0), "section 'nonsense'"),
        (Settings(("ops",), PLAN, 0.0, ops=("nonsense",)), "op 'nonsense'"),
        (Settings(("ops",), PLAN, 0.0, against=("nonsense",)), "peer 'nonsense'"),
    ):
        with pytest.raises(ConfigurationError, match=word):
            run_benchmarks(settings)


def test_against_deselects_peers_only():
    scripted([0.001])
    register_implementation("scripted", "ours", ours=True)(lambda case, inputs: lambda: inputs["x"] * 2)
    register_implementation("scripted", "other")(lambda case, inputs: lambda: inputs["x"] * 2)
    report = run_benchmarks(Settings(("ops",), PLAN, 0.0, against=("other",), ops=("scripted",)))
    assert [row.implementation for row in report.cases[0].rows] == ["ours", "other"]


def test_minutes_of_compiling_are_for_main_cases_only():
    slow = Implementation("slow", lambda case, inputs: lambda: None, setup_seconds=60, main_only=True)
    case = attention_case()
    assert "main cases only" in slow.obstacle(case, CPU) and slow.obstacle(replace(case, importance=0), CPU) is None


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = run_scripted(scripted([0.001]))
    report.save(tmp_path / "deep" / "report.json")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["report.json"]
    assert Report.load(tmp_path / "deep" / "report.json") == report
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="has format None"):
        Report.load(tmp_path / "other.json")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Report.load(tmp_path / "missing.json")


def test_a_stage_and_a_peer_are_one_registration_each_as_the_readme_says():
    names = vars(registry) | {"outlier_normal": outlier_normal}
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        assert len([line for line in example.splitlines() if line.strip()]) <= 10
        exec(example, names)
    report = run_benchmarks(Settings(("ops",), PLAN, 0.0, ops=("doubling",)))
    (case,) = report.cases
    assert case.rows[0].implementation == "by addition" and case.rows[0].median_ms > 0 and not report.failed


def test_an_op_without_a_suite_is_measured_on_its_own_cases(monkeypatch):
    class Doubling(Op):
        name, kernels, leaves = "double", {}, ("x",)
        cases = (Case("eight", {"n": 8}, backward=True), Case("for the compiler", {"n": 9}, uses=(GATE,)))

        def make_inputs(self, case, dtype, device, seed=0):
            x = outlier_normal(case.sizes["n"], dtype=dtype, device=device, seed=seed).requires_grad_(case.backward)
            return {"x": x, "gradients": (torch.ones(case.sizes["n"], dtype=dtype),)}

        def call(self, case, inputs, backend):
            return (2 * inputs["x"],)

        def reference(self, case, inputs, dtype):
            return {"out": 2 * inputs["x"].detach().to(dtype), "x": torch.full((8,), 2, dtype=dtype)}

        def cost(self, case, dtype, kernel=None):
            return Cost(case.sizes["n"], 2 * case.sizes["n"] * dtype.itemsize)

        kernels_of = width = config = launch = rules = None

    known = registry.find_ops() | {"double": Doubling()}
    monkeypatch.setattr(registry, "find_ops", lambda: known)
    (case,) = run_benchmarks(Settings(("ops",), PLAN, 0.0, ops=("double",))).cases
    assert (case.case, case.flops, case.bytes) == ("eight", 8, 64)
    rows = {row.implementation: row for row in case.rows}
    assert list(rows) == ["reference", "infimm_fast sdpa", "infimm_fast"]
    assert set(rows["reference"].errors) == set(rows["infimm_fast sdpa"].errors) == {"out", "x"}
    assert rows["infimm_fast"].remark == "needs a CUDA GPU"


def test_a_figure_above_a_ceiling_is_flagged_and_the_ceilings_are_measured_again(monkeypatch):
    measured = iter([Ceilings(1e-9, 1e-6), Ceilings(1e-8, 1e-7), *[Ceilings(1e-9, 1e-9)] * 9])
    monkeypatch.setattr(harness, "measure_ceilings", lambda dtype, timer: next(measured))
    lines, clock = [], scripted([1e-3], (0,) * 9).clock
    report = run_benchmarks(Settings(("ops",), PLAN, 0.0, ops=("scripted",)), lines.append, now=clock)
    assert report.ceilings == {"matmul_tflops": 1e-8, "copy_gb_s": 1e-6}
    assert sum("measured again" in line for line in lines) == 3 and len(list(measured)) == 11 - 4
    assert [row.share for case in report.cases for row in case.rows] == [pytest.approx(100.0)] * 9
    assert case_table(report.cases[0])[1][0][-2:] == ["10000%", "ABOVE the measured ceiling"]


def test_a_card_too_small_for_a_case_is_said_and_the_run_goes_on(monkeypatch):
    def too_large(case, device, seed):
        raise torch.cuda.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(STAGES["subimage_attention"], "make_inputs", too_large)
    row = measure("naive")
    assert row.remark == "does not run: out of memory for inputs and reference" and not row.failed


def test_all_input_sets_of_a_case_share_masks():
    made = []

    def make(case, device):
        made.append(case)
        return naive

    one, other = attention_case(), attention_case()
    shared = once_for_case(make)
    for case in (one, one, other, other, one):
        shared(case, CPU)
    assert [case is one for case in made] == [True, False, True]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no threads")
def test_pinning_is_undone():
    before = os.sched_getaffinity(0)
    with pinned_threads():
        assert len(os.sched_getaffinity(0)) == min(len(before), torch.get_num_threads())
    assert os.sched_getaffinity(0) == before
