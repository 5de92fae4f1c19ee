"""Comparing runs: a slower one is flagged, an equal and noisy one is not."""

import random
import shutil
import subprocess
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
    result = CliRunner().invoke(app, ["bench", "compare", before, after])
    assert result.exit_code == status and words in result.output


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
    run = ["ops", "--ops", "gated_residual", "--against", "naive", "--device", "cpu", "--seconds", "0"]
    assert bench([*run, "--out", str(tmp_path)], "bench") == 0
    (file,) = tmp_path.iterdir()
    assert bench(["compare", str(file), *run], "bench") in (0, 1)
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
    quick = ["ops", "--ops", "gated_residual", "--preset", "tiny", "--device", "cpu", "--seconds", "0", "--against", "naive"]
    monkeypatch.chdir(tree)
    first, second = (
        {row.implementation for row in load_or_run(revision, [*quick, *more]).cases[0].rows}
        for revision, more in (("HEAD~1", []), ("HEAD", ["second naive"]))
    )
    assert second - first == {"second naive"}
    left = subprocess.run(["git", "worktree", "list"], cwd=tree, check=True, capture_output=True, text=True).stdout
    assert len(left.strip().splitlines()) == 1
