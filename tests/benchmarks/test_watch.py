"""compute-sanitizer and ncu, played by a script: what they say, or do not say, becomes outcome and exit status."""

import json
import os
import sys
import time

import pytest

import profile_kernels
import sanitize
import watch
from infimm_fast.kernels.common.cases import PROFILE, SMALL
from launch import cases_with, kernel_names

CASE = "gated_residual: small"
OTHER = "gated_residual: small, norm"
PROFILED = "gated_residual: 2048 tokens, with backward"
SUMMARY = "========= ERROR SUMMARY: {} errors"


def make_program(folder, monkeypatch, name, text, status=0):
    """Put a program first into the path that writes down its arguments, prints `text` and ends with `status`."""
    program = folder / name
    quoted = text.replace("'", "'\\''")
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {folder}/calls\nprintf '%s\\n' '{quoted}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def alone(monkeypatch):
    """Make the cases without a tool succeed at once."""
    monkeypatch.setattr(watch, "launch_command", lambda *arguments: ["true"])


@pytest.mark.parametrize(
    ("status", "output", "outcome", "words"),
    [
        (0, SUMMARY.format(0), "passed", ""),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed", ""),
        (99, f"========= COMPUTE-SANITIZER\n========= Invalid read\n{SUMMARY.format(2)}", "failed", "Invalid read"),
        (1, f"case: WRONG: out\n{SUMMARY.format(0)}", "failed", "case: WRONG: out"),
        (-11, SUMMARY.format(0), "failed", "ended without a word"),
        # A tool that watched nothing must never look clean.
        (0, "case: ok", "not run", "case: ok"),
        (99, f"========= Error: Device not supported\n{SUMMARY.format(1)}", "not run", "Device not supported"),
        (1, "unrecognized option '--padding'", "not run", "unrecognized option"),
        (0, "", "not run", "ended without a word"),
    ],
)
def test_what_compute_sanitizer_says(status, output, outcome, words):
    assert sanitize.judge(CASE, status, output) == (outcome, words)


def profile_text(*kernels):
    return "\n".join(f"  {kernel} (2048, 1, 1)x(256, 1, 1), Context 1, Stream 7" for kernel in kernels)


@pytest.mark.parametrize(
    ("status", "output", "outcome", "words"),
    [
        (0, profile_text("forward_kernel", "backward_kernel"), "passed", ""),
        (0, profile_text("forward_kernel"), "failed", "no launch of backward_kernel was seen"),
        (1, profile_text("forward_kernel", "backward_kernel") + "\ncase: WRONG", "failed", "case: WRONG"),
        (1, "==ERROR== ERR_NVGPUCTRPERM - no permission", "not run", "ERR_NVGPUCTRPERM - no permission"),
        (0, "case: ok", "not run", "case: ok"),
    ],
)
def test_what_ncu_says(status, output, outcome, words):
    assert profile_kernels.judge(PROFILED, status, output) == (outcome, words)


def test_every_tool_watches_every_case(tmp_path, monkeypatch, capsys, alone):
    make_program(tmp_path, monkeypatch, sanitize.PROGRAM, SUMMARY.format(0))
    assert sanitize.main(["--out", str(tmp_path / "out"), "--cases", CASE, OTHER]) == watch.PASSED
    calls = (tmp_path / "calls").read_text().splitlines()
    assert {line.split()[1] for line in calls} == set(sanitize.TOOLS) and len(calls) == 8
    assert sum(line.endswith(f"launch.py {CASE}") for line in calls) == 4
    assert all("--error-exitcode 99" in line for line in calls)
    assert sum("--padding 65536" in line for line in calls) == 2
    assert "memcheck: 2 passed, 0 failed, 0 not run" in capsys.readouterr().out
    verdicts = json.loads((tmp_path / "out" / "sanitize.json").read_text())["verdicts"]
    assert [verdict["outcome"] for verdict in verdicts] == ["passed"] * 8
    assert SUMMARY.format(0) in (tmp_path / "out" / "racecheck.txt").read_text()


def test_errors_and_what_fails_alone_end_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "launch_command", lambda *arguments: ["sh", "-c", "echo case: WRONG; exit 1"])
    make_program(tmp_path, monkeypatch, sanitize.PROGRAM, f"========= Race\n{SUMMARY.format(1)}", status=99)
    assert sanitize.main(["--out", str(tmp_path / "out"), "--cases", CASE, "--tools", "racecheck"]) == watch.FAILED
    out = capsys.readouterr().out
    assert f"alone, {CASE}: failed: case: WRONG" in out and f"racecheck, {CASE}: failed: Race" in out


def test_ncu_sees_the_second_run_of_every_case(tmp_path, monkeypatch, alone):
    make_program(tmp_path, monkeypatch, profile_kernels.PROGRAM, profile_text("forward_kernel", "backward_kernel"))
    assert profile_kernels.main(["--out", str(tmp_path / "out"), "--cases", PROFILED]) == watch.PASSED
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.endswith(f"launch.py --profile {PROFILED}") and "regex:^(forward_kernel|backward_kernel)$" in call
    assert "--profile-from-start off" in call and "--section SpeedOfLight" in call
    assert "forward_kernel (2048" in (tmp_path / "out" / "ncu.txt").read_text()


@pytest.mark.parametrize(("tool", "name"), [(sanitize, "sanitize.json"), (profile_kernels, "profile.json")])
def test_a_missing_program_is_not_run(tmp_path, monkeypatch, tool, name):
    monkeypatch.setattr(tool.shutil, "which", lambda program: None)
    assert tool.main(["--out", str(tmp_path)]) == watch.NOT_RUN
    verdicts = json.loads((tmp_path / name).read_text())["verdicts"]
    assert len(verdicts) >= 10 and {verdict["outcome"] for verdict in verdicts} == {"not run"}


def test_what_has_no_time_is_not_run(tmp_path, monkeypatch, alone):
    make_program(tmp_path, monkeypatch, sanitize.PROGRAM, SUMMARY.format(0))
    arguments = ["--out", str(tmp_path / "out"), "--cases", CASE, "--tools", "memcheck", "--budget", "1"]
    assert sanitize.main(arguments) == watch.NOT_RUN and not (tmp_path / "calls").exists()


def test_a_process_that_takes_too_long_ends_with_all_it_started():
    started = time.monotonic()
    status, output = watch.run_process(["sh", "-c", "echo begun; sleep 60 & wait"], 1.0)
    assert status is None and output == "begun\n" and time.monotonic() - started < 20


def test_launches_run_in_a_fresh_python():
    command = watch.launch_command("--list")
    assert command[0] == sys.executable and command[1].endswith("tools/launch.py") and command[2:] == ["--list"]
    assert {PROFILED, CASE} <= {*cases_with(PROFILE), *cases_with(SMALL)}
    assert kernel_names(*cases_with(SMALL)[CASE]) == ["forward_kernel", "backward_kernel"]
