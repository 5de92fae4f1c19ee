"""compute-sanitizer and ncu, played by a script, and what they watch: their words become outcome and exit status."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest

import launch
import profile_kernels
import sanitize
import watch
from infimm_fast.kernels.common.cases import PROFILE, SMALL
from launch import cases_with, kernel_names

CASE, OTHER = "gated_residual: small", "gated_residual: small, norm"
PROFILED = "gated_residual: 2048 tokens, with backward"
summary, launched = "========= ERROR SUMMARY: {} errors".format, "  {} (2048, 1, 1)x(256, 1, 1), Context 1, Stream 7".format
races = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)".format
BOTH = f"{launched('forward_kernel')}\n{launched('backward_kernel')}"
# Of each tool: a case, all cases, and the file of the verdicts.
TOOLS = {
    sanitize: (CASE, cases_with(SMALL), "sanitize.json"),
    profile_kernels: (PROFILED, cases_with(PROFILE), "profile.json"),
}


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """Return what runs a tool's command with its program played: the result, the calls, what was printed, the verdicts."""
    calls, words, out = tmp_path / "calls", tmp_path / "words", tmp_path / "out"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def go(tool, text, *arguments, status=0, alone="true"):
        """The program writes down its arguments, prints `text` and ends with `status`; cases without it run `alone`."""
        calls.touch()
        words.write_text(f"{text}\n")
        call = 'echo "${PYTORCH_NO_CUDA_MEMORY_CACHING:-cached}'
        (tmp_path / tool.PROGRAM).write_text(f'#!/bin/sh\n{call} $@" >> {calls}\ncat {words}\nexit {status}\n')
        (tmp_path / tool.PROGRAM).chmod(0o755)
        script = f'{call} alone $0" >> {calls}; {alone}'
        monkeypatch.setattr(watch, "launch_command", lambda name: ["sh", "-c", script, name])
        result = tool.main(["--out", str(out), *arguments])
        verdicts = json.loads((out / TOOLS[tool][-1]).read_text())["verdicts"]
        return result, calls.read_text().splitlines(), capsys.readouterr().out, verdicts

    return go


@pytest.mark.parametrize(
    ("tool", "status", "output", "outcome", "words"),
    [
        (sanitize, 0, summary(0), "passed", ""),
        (sanitize, 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed", ""),
        (sanitize, 99, f"========= COMPUTE-SANITIZER\n========= Invalid read\n{summary(2)}", "failed", "Invalid read"),
        (sanitize, 0, races(2, 0, 2), "passed", ""),
        (sanitize, 99, races(2, 1, 1), "failed", "RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)"),
        (sanitize, 1, f"case: WRONG: out\n{summary(0)}", "failed", "case: WRONG: out"),
        (sanitize, -11, summary(0), "failed", "ended without a word"),
        # A tool that watched nothing must never look clean.
        (sanitize, 0, "case: ok", "not run", "case: ok"),
        (sanitize, 99, f"========= Error: Device not supported\n{summary(1)}", "not run", "Device not supported"),
        (sanitize, 1, "unrecognized option '--padding'", "not run", "unrecognized option"),
        (sanitize, 0, "", "not run", "ended without a word"),
        (profile_kernels, 0, BOTH, "passed", ""),
        (profile_kernels, 0, launched("forward_kernel"), "failed", "no launch of backward_kernel was seen"),
        (profile_kernels, 1, f"{BOTH}\ncase: WRONG", "failed", "case: WRONG"),
        (profile_kernels, 1, "==ERROR== ERR_NVGPUCTRPERM - no permission", "not run", "ERR_NVGPUCTRPERM - no permission"),
        (profile_kernels, 0, "case: ok", "not run", "case: ok"),
    ],
)
def test_what_the_tools_say(tool, status, output, outcome, words):
    assert tool.judge(TOOLS[tool][0], status, output) == (outcome, words)


@pytest.mark.parametrize("chosen", [[], ["--cases", CASE, OTHER]], ids=["all", "two"])
def test_every_tool_watches_every_case_after_it_ran_alone(main, tmp_path, chosen):
    names = chosen[1:] or list(cases_with(SMALL))
    count, expected = len(names), {(tool, name) for tool in sanitize.TOOLS for name in names}
    result, calls, printed, verdicts = main(sanitize, summary(0), *chosen)
    assert result == watch.PASSED and f"memcheck: {count} passed, 0 failed, 0 not run" in printed
    # Their kernels are compiled before a tool slows everything; then no allocation lies inside a larger one.
    assert sorted(calls[:count]) == sorted(f"cached alone {name}" for name in names)
    watched = calls[count:]
    assert all(line.startswith("1 --tool ") and "--error-exitcode 99" in line for line in watched)
    assert {(line.split()[2], line.partition("launch.py ")[2]) for line in watched} == expected
    assert sum("--padding 65536" in line for line in watched) == count
    assert {(one["tool"], one["case"], one["outcome"]) for one in verdicts} == {(*pair, "passed") for pair in expected}
    assert len(watched) == len(verdicts) == len(expected) == 4 * count
    assert summary(0) in (tmp_path / "out" / "racecheck.txt").read_text()


@pytest.mark.parametrize(("errors", "status", "outcome"), [(1, 99, "failed"), (0, 0, "passed")])
def test_errors_and_what_fails_alone_end_with_1(main, errors, status, outcome):
    text, arguments = "========= Race\n" * errors + summary(errors), ("--cases", CASE, "--tools", "racecheck")
    result, _, printed, verdicts = main(sanitize, text, *arguments, status=status, alone="echo case: WRONG; exit 1")
    found = [(one["tool"], one["outcome"]) for one in verdicts]
    assert result == watch.FAILED and found == [("alone", "failed"), ("racecheck", outcome)]
    assert f"alone, {CASE}: failed: case: WRONG" in printed
    assert (f"racecheck, {CASE}: failed: Race" in printed) == (outcome == "failed")


@pytest.mark.parametrize(
    ("found", "status"),
    [(["passed"], 0), (["passed", "not run"], 3), ([], 3), (["not run", "failed"], 1), (["passed", "failed"], 1)],
)
def test_what_was_not_run_is_no_success(tmp_path, found, status):
    assert watch.finish(tmp_path / "file.json", [watch.Verdict("memcheck", CASE, one) for one in found]) == status


def test_ncu_sees_the_second_run_of_every_case(main, tmp_path):
    result, (alone, call), *_ = main(profile_kernels, BOTH, "--cases", PROFILED)
    assert result == watch.PASSED and "forward_kernel (2048" in (tmp_path / "out" / "ncu.txt").read_text()
    assert alone == f"cached alone {PROFILED}" and "--clock-control none" in call
    assert call.endswith(f"launch.py --profile {PROFILED}") and "regex:^(forward_kernel|backward_kernel)$" in call
    assert "--profile-from-start off" in call and "--section SpeedOfLight" in call


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("installed", [True, False])
def test_what_has_no_program_or_no_time_is_not_run(main, monkeypatch, tool, installed):
    words, cases = "no time left" if installed else f"{tool.PROGRAM} is not installed", TOOLS[tool][1]
    if not installed:
        monkeypatch.setattr(tool.shutil, "which", lambda program: None)
    result, calls, printed, verdicts = main(tool, summary(0), "--budget", "1")
    assert result == watch.NOT_RUN and not calls
    assert {one["case"] for one in verdicts} == set(cases) and len(verdicts) >= 10
    assert {(one["outcome"], one["words"]) for one in verdicts} == {("not run", words)}
    assert all(f"{name}: not run: {words}\n" in printed for name in cases)


def test_what_is_ended_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "START_SECONDS", 0.0)
    options = SimpleNamespace(out=tmp_path, cases=[CASE], workers=1)
    deadline = time.monotonic() + 0.5
    (verdict,) = watch._run_cases("memcheck", options, deadline, lambda name: ["sleep", "60"], sanitize.judge)
    assert (verdict.outcome, verdict.words) == ("not run", "ended: no time left")


@pytest.mark.parametrize(
    ("script", "seconds", "expected"),
    [("echo out; echo $WORD >&2; exit 5", 20, (5, "out\nheard\n")), ("echo begun; sleep 60 & wait", 1, (None, "begun\n"))],
)
def test_a_process_is_heard_and_ends_in_time_with_all_it_started(script, seconds, expected):
    started = time.monotonic()
    assert watch.run_process(["sh", "-c", script], seconds, {"WORD": "heard"}) == expected
    assert time.monotonic() - started < 20


def test_launches_run_in_a_fresh_python():
    command = watch.launch_command("--list")
    assert command[0] == sys.executable and command[1].endswith("tools/launch.py") and command[2:] == ["--list"]
    assert {PROFILED, CASE} <= {*cases_with(PROFILE), *cases_with(SMALL)}
    assert kernel_names(*cases_with(SMALL)[CASE]) == ["forward_kernel", "backward_kernel"]


def test_command(capsys, monkeypatch):
    assert launch.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(cases_with(SMALL)) + len(cases_with(PROFILE))
    assert listed[0].startswith("subimage_attention: small, peeled: forward_kernel")
    assert launch.main(["nonsense"]) == 2
    assert "'nonsense' is not known" in capsys.readouterr().err
    monkeypatch.setattr(launch, "run_case", mock.Mock(side_effect=AssertionError("out: too large")))
    assert launch.main(["gated_residual: small", "--device", "cpu"]) == 1
    assert capsys.readouterr().out == "gated_residual: small: WRONG: out: too large\n"


@pytest.mark.slow
def test_the_command_runs_in_the_interpreter():
    command = [sys.executable, launch.__file__, "gated_residual: small", "--device", "cpu", "--dtype", "float32"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and done.stdout == "gated_residual: small: ok\n", done.stderr
