"""Comparing runs: a slower one is flagged, an equal and noisy one is not."""

import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs typer")

from typer.testing import CliRunner

from infimm_fast.benchmarks.compare import compare, is_regression, load_or_run
from infimm_fast.benchmarks.report import CaseResult, Report, Row
from infimm_fast.benchmarks.run import bench
from infimm_fast.benchmarks.timing import Times
from infimm_fast.cli import app
from infimm_fast.errors import ConfigurationError

ROOT = Path(__file__).parents[2]


def make_report(samples, device="a card", case="one", remark=""):
    times = Times(tuple(samples)) if samples else None
    row = Row("fused", "graph", ours=True, remark=remark)
    if times is not None:
        row = replace(
            row,
            median_ms=times.median,
            p10_ms=times.percentile(10),
            p90_ms=times.percentile(90),
            samples=len(times.samples),
        )
    rows = [row]
    sizes = {"sizes": {}, "dtype": "bfloat16", "importance": 0, "backward": False, "flops": 1, "bytes": 1, "series": ()}
    result = CaseResult("op", "ops", case, **sizes, bound="copy", input_sets=1, gpu={}, rows=rows)
    return Report("title", {"device": device}, {}, {"matmul_tflops": 1.0, "copy_gb_s": 1.0}, [result])


def noisy(middle, spread, seed, count=100):
    generator = random.Random(seed)
    return [middle * (1 + generator.gauss(0, spread)) for _ in range(count)]


def verdict(before, after):
    (one,) = compare(make_report(before), make_report(after))
    assert is_regression([one]) is (one.verdict in ("slower", "lost"))
    return one.verdict


@pytest.mark.parametrize("seed", range(20))
def test_an_equal_noisy_run_is_not_flagged(seed):
    assert verdict(noisy(1.0, 0.1, seed), noisy(1.0, 0.1, seed + 1000)) == ""


@pytest.mark.parametrize("seed", range(20))
def test_a_slower_run_is_flagged_through_the_same_noise(seed):
    assert verdict(noisy(1.0, 0.1, seed), noisy(1.4, 0.1, seed + 1000)) == "slower"
    assert verdict(noisy(1.4, 0.1, seed), noisy(1.0, 0.1, seed + 1000)) == "faster"


def test_a_quiet_run_shows_small_differences_but_not_tiny_ones():
    assert verdict(noisy(1.0, 0.001, 1), noisy(1.05, 0.001, 2)) == "slower"
    assert verdict(noisy(1.0, 0.001, 1), noisy(1.02, 0.001, 2)) == ""


def test_a_lost_figure_is_a_regression():
    assert verdict([1.0], None) == "lost"
    assert verdict(None, [1.0]) == "new"
    assert verdict(None, None) == ""


def test_runs_of_other_devices_or_cases_are_refused():
    with pytest.raises(ConfigurationError, match="'a card' and 'another'"):
        compare(make_report([1.0]), make_report([1.0], device="another"))
    with pytest.raises(ConfigurationError, match="no case in common"):
        compare(make_report([1.0]), make_report([1.0], case="two"))


def test_the_command_shows_ratios_and_fails_on_a_regression(tmp_path):
    for name, samples in (("before", noisy(1.0, 0.01, 1)), ("slower", noisy(1.5, 0.01, 2)), ("equal", noisy(1.0, 0.01, 3))):
        make_report(samples).save(tmp_path / f"{name}.json")
    run = CliRunner().invoke
    equal = run(app, ["bench", "compare", str(tmp_path / "before.json"), str(tmp_path / "equal.json")])
    assert equal.exit_code == 0 and "fused" in equal.output
    slower = run(app, ["bench", "compare", str(tmp_path / "before.json"), str(tmp_path / "slower.json")])
    assert slower.exit_code == 1 and "slower" in slower.output
    refused = run(app, ["bench", "compare", "neither-file-nor-revision", str(tmp_path / "slower.json")])
    assert refused.exit_code == 1


def test_a_comparison_is_readable_at_eighty_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (case,) = make_report(noisy(1.0, 0.01, 1)).cases
    names = ("sdpa efficient dense mask", "fused")
    rows = [replace(case.rows[0], implementation=name, median_ms=12345.678) for name in names]
    long = replace(case, op="interval_attention", case="decode batch 64, 10 tiles, one picture for all", rows=rows)
    for name, factor in (("before", 1), ("after", 10)):
        changed = [replace(row, median_ms=row.median_ms * factor) for row in rows]
        Report("", {"device": "a card"}, {}, {}, [replace(long, rows=changed)]).save(tmp_path / name)
    assert bench(["compare", str(tmp_path / "before"), str(tmp_path / "after")], "bench") == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    assert "interval_attention, decode batch 64, 10 tiles, one picture for all, bfloat16" in out
    for row in rows:
        assert len([line for line in out.splitlines() if row.implementation in line and "slower" in line]) == 1


def test_without_a_second_source_what_is_installed_is_run(tmp_path, capfd):
    run = ["ops", "--ops", "gated_residual", "--against", "naive", "--device", "cpu", "--seconds", "0"]
    assert bench([*run, "--out", str(tmp_path)], "bench") == 0
    (file,) = tmp_path.iterdir()
    assert bench(["compare", str(file), *run], "bench") in (0, 1)
    assert capfd.readouterr().out.count("gated_residual, 128 tokens, with backward, float32") == 3


def test_what_is_neither_a_file_nor_a_revision_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="neither a file nor a git revision"):
        load_or_run("0000000", [])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_two_git_revisions(tmp_path):
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
    suite.write_text(suite.read_text() + '\n\nregister_implementation(OP.name, "second naive")(_naive)\n')
    git("commit", "--quiet", "-am", "second")
    script = f"""
import os
os.chdir({str(tree)!r})
from infimm_fast.benchmarks.compare import load_or_run
arguments = ["ops", "--ops", "gated_residual", "--preset", "tiny", "--device", "cpu", "--seconds", "0", "--against"]
names = []
for revision in ("HEAD~1", "HEAD"):
    peers = ["naive"] if revision == "HEAD~1" else ["naive", "second naive"]
    report = load_or_run(revision, arguments + peers)
    names.append({{row.implementation for row in report.cases[0].rows}})
assert names[1] - names[0] == {{"second naive"}}, names
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    left = subprocess.run(["git", "worktree", "list"], cwd=tree, check=True, capture_output=True, text=True).stdout
    assert len(left.strip().splitlines()) == 1
