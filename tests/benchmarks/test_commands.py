"""The commands: runs of the tiny preset, comparisons, pictures, the page, and life without rich."""

import random
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs typer")

from PIL import Image
from typer.testing import CliRunner

from infimm_fast.benchmarks import SECTIONS, document
from infimm_fast.benchmarks.compare import compare, is_regression, load_or_run
from infimm_fast.benchmarks.plot import draw_bars
from infimm_fast.benchmarks.registry import STAGES, load_suites
from infimm_fast.benchmarks.report import CaseResult, Report, Row
from infimm_fast.benchmarks.run import bench, make_plan
from infimm_fast.benchmarks.timing import Times
from infimm_fast.cli import app
from infimm_fast.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
QUICK = ["--preset", "tiny", "--device", "cpu", "--seconds", "0"]
RESIDUAL = ["ops", *QUICK, "--ops", "gated_residual", "--against", "naive"]


def invoke(*arguments):
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    return result.exit_code, result.output


def load(folder):
    (file,) = folder.glob("*.json")
    return Report.load(file)


@pytest.mark.slow
def test_the_tiny_preset_from_end_to_end(tmp_path):
    peers = [part for name in ("naive", "sdpa", "sdpa dense mask") for part in ("--against", name)]
    status, output = invoke("all", *QUICK, *peers, "--out", tmp_path, "--plot")
    assert status == 0, output
    report = load(tmp_path)
    assert "scaled down" in report.title and report.title in output
    assert {case.section for case in report.cases} == set(SECTIONS) - {"export"}
    assert not report.failed and not report.left_out
    timed = [row for case in report.cases for row in case.rows if row.median_ms is not None]
    assert timed and all(row.p10_ms <= row.median_ms <= row.p90_ms and row.errors for row in timed)
    (whole,) = [case for case in report.cases if case.op == "end_to_end" and case.importance == 0]
    stages = {"jpeg", "tiling", "copy", "vision", "K/V", "prefill", "token"}
    staged = {row.implementation for row in whole.rows if set(row.stages) == stages}
    assert staged == {"naive", "sdpa", "fused", "fused folded"}
    for picture in ("bars", "roofline", "scaling", "stages"):
        assert min(Image.open(tmp_path / f"{picture}.png").size) > 300


def test_one_section_within_a_budget(tmp_path, capsys):
    assert bench([*RESIDUAL, "--out", str(tmp_path)], "bench") == 0
    (file,) = tmp_path.iterdir()
    assert re.fullmatch(r"CPU-.+_torch-.+_triton-.+_.+_ops\.json", file.name) and len(load(tmp_path).cases) == 3
    assert "infimm_fast sdpa" in capsys.readouterr().out
    assert bench([*RESIDUAL, "--out", str(tmp_path), "--budget", "0.001"], "bench") == 0
    assert not load(tmp_path).cases and len(load(tmp_path).left_out) == 3
    assert "left out, no time in the budget: gated_residual, 128 tokens" in capsys.readouterr().out


def test_a_wrong_implementation_makes_the_command_fail(tmp_path, capsys, monkeypatch):
    load_suites()
    op = STAGES["gated_residual"]
    right = op.reference
    monkeypatch.setattr(op, "reference", lambda *args: {name: value * 1.01 for name, value in right(*args).items()})
    assert bench([*RESIDUAL, "--out", str(tmp_path)], "bench") == 1
    assert "FAILED: gated_residual, 128 tokens: infimm_fast sdpa" in capsys.readouterr().out
    assert all(row.median_ms is None for case in load(tmp_path).cases for row in case.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "section 'nonsense' is not known"),
        (["ops", "--dtype", "int8"], "dtype 'int8' is not known"),
        (["ops", "--preset", "nonsense"], "preset 'nonsense' is not known"),
        (["ops", "--device", "tpu"], "device 'tpu'"),
        (["ops", "--tiles", "0"], "numbers from 1 up"),
        (["export"], "name their folders with --artifact"),
        # Found before anything runs.
        (["ops", *QUICK, "--out", f"{__file__}/folder"], "Not a directory; name a folder with --out"),
        (["ops", *QUICK, "--out", __file__], f"no report can be written to {__file__}"),
    ],
)
def test_bad_arguments_are_one_line_behind_both_doors(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["infimm_fast.benchmarks", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("infimm_fast.benchmarks", run_name="__main__")
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    status, output = invoke(*arguments)
    assert status == 1 and message in output and len(output.splitlines()) == 1


def test_the_help_is_the_same_behind_both_doors(capsys):
    status, output = invoke("--help")
    assert status == 0 and "--artifact" in output
    with pytest.raises(SystemExit, match="0"):
        bench(["--help"], "infimm-fast bench")
    usage = capsys.readouterr().out
    assert usage.split("positional arguments")[1] == output.split("positional arguments")[1]
    assert all(f"\n  {section} " in usage for section in SECTIONS)
    assert bench([], "infimm-fast bench") == 0 and capsys.readouterr().out == usage


def test_a_cpu_gets_the_tiny_preset(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = make_plan()
    assert (plan.preset, plan.dtype, plan.device.type, plan.tile_counts) == ("tiny", "float32", "cpu", (1, 2, 5))
    with pytest.raises(ConfigurationError, match="cannot be used here"):
        make_plan(device="cuda")


def test_the_module_runs_without_rich_and_typer(tmp_path):
    code = f"""
import runpy, sys
sys.modules |= dict.fromkeys(("rich", "typer", "matplotlib"))  # as if they were not installed
sys.argv[1:] = {[*RESIDUAL, "--out", str(tmp_path)]!r}
runpy.run_module("infimm_fast.benchmarks", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "implementation" in done.stdout and "written:" in done.stdout


def test_the_page_is_what_the_stored_runs_give(tmp_path):
    reports, page = document.stored_reports(ROOT / document.RESULTS), (ROOT / document.PAGE).read_text()
    shutil.copytree(ROOT / document.RESULTS, tmp_path / document.RESULTS)
    (tmp_path / "docs").mkdir()
    (tmp_path / document.PAGE).write_text(page[: page.rindex("| infimm_fast |")])
    assert reports and bench(["page", str(tmp_path)], "bench") == 0
    assert (tmp_path / document.PAGE).read_text() == page, "run infimm-fast bench page"
    drawn, stored = ({file.name for file in (root / document.IMAGES).iterdir()} for root in (tmp_path, ROOT))
    assert drawn == stored and len(re.findall(r"!\[[^\]]*\]", page)) >= 4
    for target in re.findall(r"\[[^\]]+\]\(([^)]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target
    on_gpu = any(report.environment["kind"] == "cuda" for report in reports.values())
    assert ("There are no figures of a GPU yet" in page) is not on_gpu


def test_a_bar_far_longer_than_the_others_is_cut_and_says_how_long_it_is():
    (report,) = document.stored_reports(ROOT / document.RESULTS).values()
    case = next(case for case in report.cases if case.op == "vision_tower" and case.importance == 0)
    times = dict(zip(("naive", "sdpa", "fused", "fused folded"), (5000.0, 30.0, 28.0, 27.0), strict=True))
    rows = [replace(row, median_ms=times.get(row.implementation)) for row in case.rows]
    (axes,) = draw_bars(replace(report, cases=[replace(case, rows=rows)])).axes
    assert axes.get_xlim()[1] < 50 and "5e+03 ▶" in [text.get_text() for text in axes.texts]


def make_report(samples, device="a card", case="one"):
    row = Row("fused", "graph", ours=True, **Times(tuple(samples)).figures if samples else {})
    result = CaseResult(name=case, sizes={}, dtype="bfloat16", flops=1, bytes=1, op="op", section="ops", rows=[row])
    return Report("title", {"device": device}, {}, {"matmul_tflops": 1.0, "copy_gb_s": 1.0}, [result])


def noisy(middle, spread, seed, count=100):
    generator = random.Random(seed)
    return [middle * (1 + generator.gauss(0, spread)) for _ in range(count)]


def verdict(before, after):
    (one,) = compare(make_report(before), make_report(after))
    assert is_regression([one]) is (one.verdict in ("slower", "lost"))
    return one.verdict


@pytest.mark.parametrize("seed", range(20))
def test_a_slower_run_is_flagged_through_the_noise_and_an_equal_one_is_not(seed):
    for before, after, expected in ((1.0, 1.0, ""), (1.0, 1.4, "slower"), (1.4, 1.0, "faster")):
        assert verdict(noisy(before, 0.1, seed), noisy(after, 0.1, seed + 1000)) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (noisy(1.0, 0.001, 1), noisy(1.05, 0.001, 2), "slower"),
        (noisy(1.0, 0.001, 1), noisy(1.02, 0.001, 2), ""),
        # A figure that is gone is a regression.
        ([1.0], None, "lost"),
        (None, [1.0], "new"),
        (None, None, ""),
    ],
    ids=("small", "tiny", "lost", "new", "none"),
)
def test_quiet_runs_show_small_differences_but_not_tiny_ones(before, after, expected):
    assert verdict(before, after) == expected


@pytest.mark.parametrize(
    ("other", "message"), [({"device": "another"}, "'a card' and 'another'"), ({"case": "two"}, "no case in common")]
)
def test_runs_of_other_devices_or_cases_are_refused(other, message):
    with pytest.raises(ConfigurationError, match=message):
        compare(make_report([1.0]), make_report([1.0], **other))


@pytest.mark.parametrize(
    ("before", "after", "status", "words"),
    [
        ("before", "equal", 0, "fused"),
        ("before", "slower", 1, "slower"),
        ("neither-file-nor-revision", "slower", 1, "neither a file nor a git revision"),
        ("0000000", "slower", 1, "neither a file nor a git revision"),
    ],
)
def test_the_command_shows_ratios_and_fails_on_a_regression(tmp_path, monkeypatch, before, after, status, words):
    monkeypatch.chdir(tmp_path)
    for name, middle, seed in (("before", 1.0, 1), ("slower", 1.5, 2), ("equal", 1.0, 3)):
        make_report(noisy(middle, 0.01, seed)).save(tmp_path / name)
    found, output = invoke("compare", before, after)
    assert found == status and words in output


def test_a_comparison_is_readable_at_eighty_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ("sdpa efficient dense mask", "fused")
    for name, milliseconds in (("before", 12345.678), ("after", 123456.78)):
        report = make_report([milliseconds], case="decode batch 64, 10 tiles, one picture for all")
        (case,) = report.cases
        rows = [replace(case.rows[0], implementation=name) for name in names]
        replace(report, cases=[replace(case, op="interval_attention", rows=rows)]).save(tmp_path / name)
    assert bench(["compare", str(tmp_path / "before"), str(tmp_path / "after")], "bench") == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    assert "interval_attention, decode batch 64, 10 tiles, one picture for all, bfloat16" in out
    for name in names:
        assert len([line for line in out.splitlines() if name in line and "slower" in line]) == 1


def test_without_a_second_source_what_is_installed_is_run(tmp_path, capfd):
    assert bench([*RESIDUAL, "--out", str(tmp_path)], "bench") == 0
    (file,) = tmp_path.iterdir()
    assert bench(["compare", str(file), *RESIDUAL], "bench") in (0, 1)
    assert capfd.readouterr().out.count("gated_residual, 128 tokens, with backward, float32") == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_two_git_revisions(tmp_path, monkeypatch):
    """Each is checked out, installed and run by itself; here the second has one more peer."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "tests", "docs", "shared")
    shutil.copytree(ROOT, tree, ignore=ignored)

    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tree, check=True, capture_output=True)

    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "-m", "first")
    suite = tree / "benchmarks" / "suites" / "gated_residual.py"
    suite.write_text(suite.read_text() + '\n\nregistry.register_implementation(OP.name, "second naive")(_naive)\n')
    git("commit", "--quiet", "-am", "second")
    monkeypatch.chdir(tree)
    first, second = (
        {row.implementation for row in load_or_run(revision, [*RESIDUAL, *more]).cases[0].rows}
        for revision, more in (("HEAD~1", []), ("HEAD", ["second naive"]))
    )
    assert second - first == {"second naive"}
    left = subprocess.run(["git", "worktree", "list"], cwd=tree, check=True, capture_output=True, text=True).stdout
    assert len(left.strip().splitlines()) == 1
