"""The commands: a run of the tiny preset from end to end, pictures, the page, and life without rich."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs typer")

from PIL import Image
from typer.testing import CliRunner

from infimm_fast.benchmarks import SECTIONS, document
from infimm_fast.benchmarks.plot import draw_bars
from infimm_fast.benchmarks.registry import STAGES, load_suites
from infimm_fast.benchmarks.report import Report
from infimm_fast.benchmarks.run import bench, make_plan
from infimm_fast.cli import app
from infimm_fast.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
DOOR = "bench"
QUICK = ["--preset", "tiny", "--device", "cpu", "--seconds", "0"]


@pytest.mark.slow
def test_the_tiny_preset_from_end_to_end(tmp_path):
    peers = [part for name in ("naive", "sdpa", "sdpa dense mask") for part in ("--against", name)]
    result = CliRunner().invoke(app, ["bench", "all", *QUICK, *peers, "--out", str(tmp_path), "--plot"])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("*.json")
    report = Report.load(file)
    assert "scaled down" in report.title and report.title in result.output
    assert {case.section for case in report.cases} == set(SECTIONS) - {"export"}
    assert not report.failed and not report.left_out
    timed = [row for case in report.cases for row in case.rows if row.median_ms is not None]
    assert timed and all(row.p10_ms <= row.median_ms <= row.p90_ms and row.errors for row in timed)
    (whole,) = [case for case in report.cases if case.op == "end_to_end" and case.importance == 0]
    stages = {"jpeg", "tiling", "copy", "vision", "K/V", "prefill", "token"}
    assert {row.implementation for row in whole.rows if set(row.stages) == stages} == {
        "naive",
        "sdpa",
        "fused",
        "fused folded",
    }
    for picture in ("bars", "roofline", "scaling", "stages"):
        assert min(Image.open(tmp_path / f"{picture}.png").size) > 300


def test_one_section_within_a_budget(tmp_path, capsys):
    arguments = ["ops", *QUICK, "--ops", "gated_residual", "--against", "naive", "--out", str(tmp_path)]
    assert bench(arguments, DOOR) == 0
    (file,) = tmp_path.iterdir()
    assert re.fullmatch(r"CPU-.+_torch-.+_triton-.+_.+_ops\.json", file.name)
    assert len(json.loads(file.read_text())["cases"]) == 3
    assert "infimm_fast sdpa" in capsys.readouterr().out
    assert bench([*arguments, "--budget", "0.001"], DOOR) == 0
    report = Report.load(file)
    assert not report.cases and len(report.left_out) == 3
    assert "left out, no time in the budget: gated_residual, 128 tokens" in capsys.readouterr().out


def test_a_wrong_implementation_makes_the_command_fail(tmp_path, capsys, monkeypatch):
    load_suites()
    op = STAGES["gated_residual"]
    reference = op.reference
    wrong = lambda case, inputs, dtype: {name: value * 1.01 for name, value in reference(case, inputs, dtype).items()}  # noqa: E731
    monkeypatch.setattr(op, "reference", wrong)
    assert bench(["ops", *QUICK, "--ops", "gated_residual", "--against", "naive", "--out", str(tmp_path)], DOOR) == 1
    out = capsys.readouterr().out
    assert "FAILED: gated_residual, 128 tokens: infimm_fast sdpa" in out
    (file,) = tmp_path.glob("*.json")
    assert all(row.median_ms is None for case in Report.load(file).cases for row in case.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "section 'nonsense' is not known"),
        (["ops", "--dtype", "int8"], "dtype 'int8' is not known"),
        (["ops", "--preset", "nonsense"], "preset 'nonsense' is not known"),
        (["ops", "--device", "tpu"], "device 'tpu'"),
        (["ops", "--tiles", "0"], "numbers from 1 up"),
        (["export"], "name their folders with --artifact"),
    ],
)
def test_bad_arguments_are_one_line_behind_both_doors(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["infimm_fast.benchmarks", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("infimm_fast.benchmarks", run_name="__main__")
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1 and message in result.output and len(result.output.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_found_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"no report can be written to .*; name a folder with --out"):
        bench(["ops", *QUICK, "--out", str(tmp_path / "file" / "folder")], DOOR)
    with pytest.raises(ConfigurationError, match="no report can be written"):
        bench(["ops", *QUICK, "--out", str(tmp_path / "file")], DOOR)


def test_the_help_is_the_same_behind_both_doors(capsys):
    result = CliRunner().invoke(app, ["bench", "--help"])
    assert result.exit_code == 0 and "--artifact" in result.output
    with pytest.raises(SystemExit, match="0"):
        bench(["--help"], "infimm-fast bench")
    usage = capsys.readouterr().out
    assert usage.split("positional arguments")[1] == result.output.split("positional arguments")[1]
    assert all(f"\n  {section} " in usage for section in SECTIONS)
    assert bench([], "infimm-fast bench") == 0 and capsys.readouterr().out == usage


def test_a_cpu_gets_the_tiny_preset(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = make_plan()
    assert (plan.preset, plan.dtype, plan.device.type, plan.tile_counts) == ("tiny", "float32", "cpu", (1, 2, 5))
    with pytest.raises(ConfigurationError, match="cannot be used here"):
        make_plan(device="cuda")


def test_the_module_runs_without_rich_and_typer(tmp_path):
    arguments = ["ops", *QUICK, "--ops", "gated_residual", "--against", "naive", "--out", str(tmp_path)]
    code = f"""
import runpy, sys
sys.modules |= dict.fromkeys(("rich", "typer", "matplotlib"))  # as if they were not installed
sys.argv[1:] = {arguments!r}
runpy.run_module("infimm_fast.benchmarks", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "implementation" in done.stdout and "written:" in done.stdout


def test_the_page_is_what_the_stored_runs_give():
    reports = document.stored_reports(ROOT / document.RESULTS)
    assert reports
    page = (ROOT / document.PAGE).read_text()
    assert page == document.update_page(page, reports), "run infimm-fast bench page"
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert len(pictures) >= 4
    for target in [*pictures, *re.findall(r"[^!]\[[^\]]+\]\(([^)]+)\)", page)]:
        assert (ROOT / "docs" / target).exists(), target
    on_gpu = any(report.environment["kind"] == "cuda" for report in reports.values())
    assert ("There are no figures of a GPU yet" in page) is not on_gpu


def test_writing_the_page(tmp_path, capsys):
    source = ROOT / document.RESULTS
    (tmp_path / document.RESULTS).mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    page = (ROOT / document.PAGE).read_text()
    (tmp_path / document.PAGE).write_text(page[: page.rindex("| infimm_fast |")])
    for file in source.glob("*.json"):
        (tmp_path / document.RESULTS / file.name).write_bytes(file.read_bytes())
    assert bench(["page", str(tmp_path)], DOOR) == 0
    assert (tmp_path / document.PAGE).read_text() == page
    drawn = {file.name for file in (tmp_path / document.IMAGES).iterdir()}
    assert drawn == {file.name for file in (ROOT / document.IMAGES).iterdir()}


def test_a_bar_far_longer_than_the_others_is_cut_and_says_how_long_it_is():
    (report,) = document.stored_reports(ROOT / document.RESULTS).values()
    case = next(case for case in report.cases if case.op == "vision_tower" and case.importance == 0)
    times = dict(zip(("naive", "sdpa", "fused", "fused folded"), (5000.0, 30.0, 28.0, 27.0), strict=True))
    rows = [replace(row, median_ms=times.get(row.implementation)) for row in case.rows]
    (axes,) = draw_bars(replace(report, cases=[replace(case, rows=rows)])).axes
    assert axes.get_xlim()[1] < 50 and "5e+03 ▶" in [text.get_text() for text in axes.texts]
