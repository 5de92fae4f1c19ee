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

CASE, OTHER = "gated_residual: small", "gated_residual: small, norm"
PROFILED = "gated_residual: 2048 tokens, with backward"
summary, launch = "========= ERROR SUMMARY: {} errors".format, "  {} (2048, 1, 1)x(256, 1, 1), Context 1, Stream 7".format
BOTH = f"{launch('forward_kernel')}\n{launch('backward_kernel')}"


def outcomes(file):
    return [verdict["outcome"] for verdict in json.loads(file.read_text())["verdicts"]]


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """Return what runs a tool's command with its program played: the result, the calls, what was printed and stored."""
    calls, words = tmp_path / "calls", tmp_path / "words"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def go(tool, text, *arguments, status=0, alone="true"):
        """The program writes down its arguments, prints `text` and ends with `status`; cases without it run `alone`."""
        calls.touch()
        words.write_text(f"{text}\n")
        (tmp_path / tool.PROGRAM).write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncat {words}\nexit {status}\n')
        (tmp_path / tool.PROGRAM).chmod(0o755)
        monkeypatch.setattr(watch, "launch_command", lambda *arguments: ["sh", "-c", alone])
        result = tool.main(["--out", str(tmp_path), *arguments])
        return result, calls.read_text().splitlines(), capsys.readouterr().out, tmp_path

    return go


@pytest.mark.parametrize(
    ("tool", "status", "output", "outcome", "words"),
    [
        (sanitize, 0, summary(0), "passed", ""),
        (sanitize, 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed", ""),
        (sanitize, 99, f"========= COMPUTE-SANITIZER\n========= Invalid read\n{summary(2)}", "failed", "Invalid read"),
        (sanitize, 1, f"case: WRONG: out\n{summary(0)}", "failed", "case: WRONG: out"),
        (sanitize, -11, summary(0), "failed", "ended without a word"),
        # A tool that watched nothing must never look clean.
        (sanitize, 0, "case: ok", "not run", "case: ok"),
        (sanitize, 99, f"========= Error: Device not supported\n{summary(1)}", "not run", "Device not supported"),
        (sanitize, 1, "unrecognized option '--padding'", "not run", "unrecognized option"),
        (sanitize, 0, "", "not run", "ended without a word"),
        (profile_kernels, 0, BOTH, "passed", ""),
        (profile_kernels, 0, launch("forward_kernel"), "failed", "no launch of backward_kernel was seen"),
        (profile_kernels, 1, f"{BOTH}\ncase: WRONG", "failed", "case: WRONG"),
        (profile_kernels, 1, "==ERROR== ERR_NVGPUCTRPERM - no permission", "not run", "ERR_NVGPUCTRPERM - no permission"),
        (profile_kernels, 0, "case: ok", "not run", "case: ok"),
    ],
)
def test_what_the_tools_say(tool, status, output, outcome, words):
    case = {sanitize: CASE, profile_kernels: PROFILED}[tool]
    assert tool.judge(case, status, output) == (outcome, words)


def test_every_tool_watches_every_case(main):
    result, calls, printed, out = main(sanitize, summary(0), "--cases", CASE, OTHER)
    assert result == watch.PASSED and "memcheck: 2 passed, 0 failed, 0 not run" in printed
    assert {line.split()[1] for line in calls} == set(sanitize.TOOLS) and len(calls) == 8
    assert sum(line.endswith(f"launch.py {CASE}") for line in calls) == 4
    assert all("--error-exitcode 99" in line for line in calls)
    assert sum("--padding 65536" in line for line in calls) == 2
    assert outcomes(out / "sanitize.json") == ["passed"] * 8
    assert summary(0) in (out / "racecheck.txt").read_text()


def test_errors_and_what_fails_alone_end_with_1(main):
    arguments, race = ("--cases", CASE, "--tools", "racecheck"), f"========= Race\n{summary(1)}"
    result, _, printed, _ = main(sanitize, race, *arguments, status=99, alone="echo case: WRONG; exit 1")
    assert result == watch.FAILED
    assert f"alone, {CASE}: failed: case: WRONG" in printed and f"racecheck, {CASE}: failed: Race" in printed


def test_ncu_sees_the_second_run_of_every_case(main):
    result, (call,), _, out = main(profile_kernels, BOTH, "--cases", PROFILED)
    assert result == watch.PASSED and "forward_kernel (2048" in (out / "ncu.txt").read_text()
    assert call.endswith(f"launch.py --profile {PROFILED}") and "regex:^(forward_kernel|backward_kernel)$" in call
    assert "--profile-from-start off" in call and "--section SpeedOfLight" in call


@pytest.mark.parametrize(("tool", "name"), [(sanitize, "sanitize.json"), (profile_kernels, "profile.json")])
def test_a_missing_program_is_not_run(tmp_path, monkeypatch, tool, name):
    monkeypatch.setattr(tool.shutil, "which", lambda program: None)
    assert tool.main(["--out", str(tmp_path)]) == watch.NOT_RUN
    found = outcomes(tmp_path / name)
    assert len(found) >= 10 and set(found) == {"not run"}


def test_what_has_no_time_is_not_run(main):
    result, calls, *_ = main(sanitize, summary(0), "--cases", CASE, "--tools", "memcheck", "--budget", "1")
    assert result == watch.NOT_RUN and not calls


def test_a_process_that_takes_too_long_ends_with_all_it_started():
    started = time.monotonic()
    status, output = watch.run_process(["sh", "-c", "echo begun; sleep 60 & wait"], 1.0)
    assert status is None and output == "begun\n" and time.monotonic() - started < 20


def test_launches_run_in_a_fresh_python():
    command = watch.launch_command("--list")
    assert command[0] == sys.executable and command[1].endswith("tools/launch.py") and command[2:] == ["--list"]
    assert {PROFILED, CASE} <= {*cases_with(PROFILE), *cases_with(SMALL)}
    assert kernel_names(*cases_with(SMALL)[CASE]) == ["forward_kernel", "backward_kernel"]
