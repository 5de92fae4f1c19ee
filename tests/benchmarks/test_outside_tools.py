"""compute-sanitizer and Nsight Compute, played by executables that print what the real ones would."""

import json
import os
import sys
import time

import pytest

from infimm_fast.benchmarks import profile_kernels, sanitize
from infimm_fast.benchmarks.one_launch import CASES, MAIN_CASES
from infimm_fast.benchmarks.outside_tools import Deadline, Finished, run_process
from infimm_fast.benchmarks.profile_kernels import parse_raw_page, read_profile, what_binds
from infimm_fast.benchmarks.sanitize import judge

CLEAN = "========= COMPUTE-SANITIZER\nresidual: ok\n========= ERROR SUMMARY: 0 errors\n"
STRAY = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at forward_kernel+0x2b0
========= Target application returned an error
========= ERROR SUMMARY: 3 errors
"""
RACES = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)\n"
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the sanitizer documentation
=========
RuntimeError: CUDA error: unknown error
========= ERROR SUMMARY: 2 errors
"""


@pytest.mark.parametrize(
    ("output", "status", "outcome", "errors", "words"),
    [
        (CLEAN, 0, "clean", 0, ""),
        (CLEAN.replace("ok", "WRONG: output 0"), 1, "failed", 0, "residual: WRONG: output 0"),
        (STRAY, 99, "errors", 3, "Invalid __global__ read of size 16 bytes"),
        (RACES.format(0, 0, 0), 0, "clean", 0, ""),
        (RACES.format(2, 0, 2), 0, "clean", 0, ""),
        (RACES.format(2, 1, 1), 99, "errors", 1, "RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)"),
        # Nothing found, but the program died: no proof of anything.
        (RACES.format(0, 0, 0), -11, "failed", 0, None),
        (REFUSED, 99, "not run", None, "Device not supported. Please refer to the sanitizer documentation"),
        ("unrecognised option '--padding'\n", 1, "not run", None, "unrecognised option '--padding'"),
        ("", 0, "not run", None, "no output"),
        (CLEAN, None, "not run", None, "ended: no time left"),
    ],
)  # fmt: skip
def test_verdicts(output, status, outcome, errors, words):
    verdict = judge("memcheck", "residual", Finished(status, output, 1.0))
    assert (verdict.outcome, verdict.errors) == (outcome, errors)
    assert words is None or verdict.words == words


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [(["clean"], 0), (["clean", "not run"], 3), ([], 3), (["not run", "errors"], 1), (["clean", "failed"], 1)],
)
def test_what_was_not_run_is_no_success(outcomes, status):
    assert sanitize.exit_status([sanitize.Verdict("memcheck", "residual", outcome) for outcome in outcomes]) == status


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return what puts an executable on the path, alone with the shell's own tools; Python does nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(name, text):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
        return str(folder / name)

    monkeypatch.setattr(sys, "executable", put("python", 'echo "$*" >> "$CALLS"'))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return put


FAKE_SANITIZER = r"""
echo "${PYTORCH_NO_CUDA_MEMORY_CACHING:-cached} $*" >> "$CALLS"
case "$*" in
    *racecheck*) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
    *memcheck*rope)
        echo "========= Invalid __global__ read of size 2 bytes"; echo "========= ERROR SUMMARY: 1 error"; exit 99 ;;
    *) echo "========= ERROR SUMMARY: 0 errors" ;;
esac
"""


def test_sanitize_runs_every_tool_on_every_case_after_a_warm_up(tmp_path, install, capsys):
    install("compute-sanitizer", FAKE_SANITIZER)
    assert sanitize.main(["--out", str(tmp_path)]) == 1
    calls = (tmp_path / "calls").read_text().splitlines()
    warm, watched = calls[: len(CASES)], calls[len(CASES) :]
    assert sorted(warm) == sorted(f"-m infimm_fast.benchmarks.one_launch {name}" for name in CASES)
    assert len(watched) == len(sanitize.TOOLS) * len(CASES)
    assert all(call.startswith("1 --tool") and "--error-exitcode 99" in call for call in watched)
    verdicts = json.loads((tmp_path / "sanitize.json").read_text())["verdicts"]
    assert {(one["tool"], one["case"]) for one in verdicts} == {(tool, name) for tool in sanitize.TOOLS for name in CASES}
    (wrong,) = [one for one in verdicts if one["outcome"] != "clean"]
    assert (wrong["tool"], wrong["case"], wrong["errors"], wrong["status"]) == ("memcheck", "subimage, rope", 1, 99)
    out = capsys.readouterr().out
    assert f"memcheck: {len(CASES) - 1} clean, 1 errors" in out and f"racecheck: {len(CASES)} clean, 0 errors" in out


def test_a_case_that_fails_without_any_tool_is_said(tmp_path, install, monkeypatch, capsys):
    install("compute-sanitizer", FAKE_SANITIZER)
    monkeypatch.setattr(sys, "executable", install("broken", 'echo "residual: WRONG: output 0: too large"; exit 1'))
    assert sanitize.main(["--out", str(tmp_path), "--tools", "synccheck", "--cases", "residual"]) == 1
    verdicts = json.loads((tmp_path / "sanitize.json").read_text())["verdicts"]
    assert [(one["tool"], one["outcome"]) for one in verdicts] == [("check", "failed"), ("synccheck", "clean")]
    assert "too large" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "budget", "words"),
    [
        (None, "300", "compute-sanitizer is not installed"),
        ("echo '========= Error: Device not supported.'; echo '========= ERROR SUMMARY: 1 error'; exit 99", "300",
         "Device not supported."),
        (FAKE_SANITIZER, "1", "no time left"),
    ],
)  # fmt: skip
def test_sanitize_says_why_it_did_not_run(tmp_path, install, capsys, text, budget, words):
    if text is not None:
        install("compute-sanitizer", text)
    elif os.path.exists("/usr/bin/compute-sanitizer"):
        pytest.skip("compute-sanitizer is installed beside the shell's own tools")
    arguments = ["--out", str(tmp_path), "--budget", budget, "--tools", "memcheck", "--cases", "residual"]
    assert sanitize.main(arguments) == 3
    (verdict,) = json.loads((tmp_path / "sanitize.json").read_text())["verdicts"]
    assert (verdict["outcome"], verdict["words"]) == ("not run", words)
    assert words in capsys.readouterr().out


_COLUMNS = {
    "ID": ("", "0", "1"),
    "Process ID": ("", "77", "77"),
    "Kernel Name": ("", "forward_kernel", "backward_kernel(float *)"),
    "Grid Size": ("", "(1320, 1, 1)", "(8, 1, 1)"),
    "a__metric.nobody_knows": ("", "n/a", "n/a"),
    "gpu__time_duration.sum": ("ns", "1,250,500", "41,000"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "71.5", "12"),
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active": ("%", "0", "0"),
    "sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active": ("%", "70.25", "0"),
    "sm__inst_issued.avg.pct_of_peak_sustained_active": ("%", "44", "9"),
    "smsp__inst_executed_pipe_xu.sum.pct_of_peak_sustained_active": ("%", "61", "1"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "8.5", "50"),
    "lts__t_sector_hit_rate.pct": ("%", "93.1", "nan"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "24.9", "12.5"),
    "launch__registers_per_thread": ("register/thread", "168", "255"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "0.1", "0"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "0.5", "9.5"),
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": ("inst", "1.0", "1.0"),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("inst", "1.5", "0.25"),
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio": ("inst", "2.5", "0.5"),
}
TABLE = "\n".join(
    ",".join(f'"{cell}"' for cell in row)
    for row in (list(_COLUMNS), *([cells[index] for cells in _COLUMNS.values()] for index in range(3)))
)
OUTPUT = f"""==PROF== Connected to process 77 (/usr/bin/python3)
==PROF== Profiling "forward_kernel": 0%....100% - 21 passes
residual, 2048 rows of 5120: ok
==PROF== Disconnected from process 77
{TABLE}
"""
RESIDUAL = "residual, 2048 rows of 5120"


def test_the_raw_page_is_read():
    first, second = parse_raw_page(OUTPUT)
    assert (first.kernel, first.grid, first.bound) == ("forward_kernel", "(1320, 1, 1)", "tensor")
    assert first.figures == {
        "microseconds": pytest.approx(1250.5),
        "multiprocessor": 71.5,
        "tensor": 70.25,
        "issue": 44.0,
        "MUFU": 61.0,
        "DRAM": 8.5,
        "L2 hits": 93.1,
        "occupancy": 24.9,
        "registers": 168.0,
    }
    assert list(first.stalls.items()) == [("gmma", 2.5), ("wait", 1.5), ("long_scoreboard", 0.5)]
    assert (second.kernel, second.bound) == ("backward_kernel", "latency") and "L2 hits" not in second.figures


def test_units_of_time():
    for unit, text in (("second", "0.0012505"), ("msecond", "1.2505"), ("usecond", "1250.5"), ("us", "1250.5")):
        changed = OUTPUT.replace('"ns"', f'"{unit}"').replace("1,250,500", text)
        assert parse_raw_page(changed)[0].figures["microseconds"] == pytest.approx(1250.5)


def test_what_is_not_there_is_left_out():
    assert parse_raw_page("==PROF== nothing\n") == []
    (launch,) = parse_raw_page('"ID","Kernel Name"\n"",""\n"0","forward_kernel"\n"cut off"\n')
    assert launch.figures == {} and launch.stalls == {} and launch.bound == "unknown"


@pytest.mark.parametrize(
    ("figures", "bound"),
    [
        ({"tensor": 80.0, "DRAM": 79.0, "occupancy": 99.0}, "tensor"),
        ({"tensor": 30.0, "DRAM": 91.0, "L2": 40.0}, "DRAM"),
        ({"tensor": 59.9, "issue": 10.0}, "latency"),
        ({"MUFU": 60.0}, "MUFU"),
        ({"occupancy": 99.0}, "unknown"),
    ],
)
def test_what_binds(figures, bound):
    assert what_binds(figures) == bound


@pytest.mark.parametrize(
    ("status", "output", "outcome", "words"),
    [
        (0, OUTPUT, "profiled", ""),
        (1, OUTPUT, "failed", '"1","77"'),
        (0, OUTPUT.replace("backward_kernel(float *)", "forward_kernel"), "failed", "no launch of backward_kernel was seen"),
        (1, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\nbye\n", "not run",
         "ERR_NVGPUCTRPERM - The user does not have permission"),
        (1, "bye\n", "not run", "bye"),
        (None, "", "not run", "ended: no time left"),
    ],
)  # fmt: skip
def test_profiles_of_a_case(status, output, outcome, words):
    profile = read_profile(RESIDUAL, Finished(status, output, 1.0))
    assert profile.outcome == outcome and profile.words.startswith(words) and bool(words) == bool(profile.words)


def test_profile_asks_for_our_kernels_alone(tmp_path, install, capsys):
    install("ncu", f'echo "$*" >> "$CALLS"\ncat <<\'END\'\n{OUTPUT}END')
    assert profile_kernels.main(["--out", str(tmp_path), "--cases", RESIDUAL]) == 0
    warm, call = (tmp_path / "calls").read_text().splitlines()
    assert warm == f"-m infimm_fast.benchmarks.one_launch {RESIDUAL}"
    assert "--clock-control none" in call and "--profile-from-start off" in call
    assert "--kernel-name regex:^(forward_kernel|backward_kernel)$ --section SpeedOfLight" in call
    assert call.endswith(f"-m infimm_fast.benchmarks.one_launch --profile {RESIDUAL}")
    (case,) = json.loads((tmp_path / "profile.json").read_text())["cases"]
    assert [one["bound"] for one in case["kernels"]] == ["tensor", "latency"]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3 and "long_scoreboard 9.5" in table[2]


@pytest.mark.parametrize(
    ("text", "budget", "words"),
    [
        (None, "300", "ncu is not installed"),
        ("echo '==ERROR== Failed to initialize the profiler: LibraryNotLoaded'; exit 1", "300",
         "Failed to initialize the profiler: LibraryNotLoaded"),
        ("true", "1", "no time left"),
    ],
)  # fmt: skip
def test_profile_says_why_it_did_not_run(tmp_path, install, capsys, text, budget, words):
    if text is not None:
        install("ncu", text)
    elif os.path.exists("/usr/bin/ncu"):
        pytest.skip("ncu is installed beside the shell's own tools")
    assert profile_kernels.main(["--out", str(tmp_path), "--budget", budget]) == 3
    cases = json.loads((tmp_path / "profile.json").read_text())["cases"]
    assert [(case["case"], case["outcome"], case["words"]) for case in cases] == [
        (name, "not run", words) for name in MAIN_CASES
    ]
    assert f"{RESIDUAL}: not run: {words}" in capsys.readouterr().out


def test_a_process_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    marker = tmp_path / "marker"
    start = time.monotonic()
    finished = run_process(["bash", "-c", f"echo begun; (sleep 1.5; touch {marker}) & wait"], seconds=0.3)
    assert finished.status is None and finished.output == "begun\n" and time.monotonic() - start < 1.2
    time.sleep(1.5)
    assert not marker.exists()


def test_output_and_status_of_a_process():
    finished = run_process(["bash", "-c", "echo out; echo $WORD >&2; exit 5"], 10, {"WORD": "heard"})
    assert finished.status == 5 and finished.last_line == "heard"
    assert 0 < Deadline(10).left() <= 10 and Deadline(-1).left() < 0
