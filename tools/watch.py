"""What running NVIDIA's tools over `launch.py` has in common: a time limit, a verdict on each run, files of their words."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from infimm_fast.export.common.artifact import write_json

# Exit statuses of the commands; `bench_gpu.sh` knows them.
PASSED, FAILED, NOT_RUN = 0, 1, 3
# What one process costs before its first kernel: importing torch, making a CUDA context.
START_SECONDS = 15.0
OUTCOMES = ("passed", "failed", "not run")
# Takes the name of a case, the exit status and all output, and returns an outcome and why.
Judge = Callable[[str, int, str], tuple[str, str]]


@dataclass(frozen=True)
class Verdict:
    """What became of one case under one tool.

    Attributes:
        tool: its name, or "alone" for the case run without any.
        case: name of the case.
        outcome: one of `OUTCOMES`.
        words: why it did not pass.
        seconds: how long it took.
    """

    tool: str
    case: str
    outcome: str
    words: str = ""
    seconds: float = 0.0


def watch_cases(
    options: argparse.Namespace,
    file: str,
    tools: Sequence[str],
    command: Callable[[str, str], list[str]],
    judge: Judge,
    *,
    missing: str = "",
    environment: Mapping[str, str] | None = None,
    workers: int = 0,
) -> int:
    """Run cases alone, so that no tool has to wait for the compiler, then under each tool; return the exit status.

    Args:
        options: of `parser_of`.
        file: name of the JSON file of the verdicts.
        tools: names.
        command: takes a tool and a case, and returns what is run.
        judge: of the output under a tool.
        missing: why no tool can run, "" if they can.
        environment: variables under a tool, beside those of this process.
        workers: processes under a tool at a time, if not as many as without one.
    """
    if missing:
        verdicts = [Verdict(tool, name, "not run", missing) for tool in tools for name in options.cases]
        return finish(options.out / file, verdicts)
    deadline = time.monotonic() + options.budget
    alone = _run_cases("alone", options, deadline, launch_command, _judge_alone)
    verdicts = [verdict for verdict in alone if verdict.outcome == "failed"]
    options.workers = workers or options.workers
    for tool in tools:
        verdicts += _run_cases(tool, options, deadline, partial(command, tool), judge, environment)
    return finish(options.out / file, verdicts)


def _run_cases(
    tool: str,
    options: argparse.Namespace,
    deadline: float,
    command: Callable[[str], list[str]],
    judge: Judge,
    environment: Mapping[str, str] | None = None,
) -> list[Verdict]:
    """Run one tool over cases; what is not begun before the deadline, by `time.monotonic`, is not run."""

    def run(name: str) -> tuple[Verdict, str]:
        started = time.monotonic()
        left = deadline - started
        if left < START_SECONDS:
            return Verdict(tool, name, "not run", "no time left"), ""
        status, output = run_process(command(name), left, environment)
        seconds = round(time.monotonic() - started, 1)
        if status is None:
            return Verdict(tool, name, "not run", "ended: no time left", seconds), output
        return Verdict(tool, name, *judge(name, status, output), seconds), output

    with ThreadPoolExecutor(options.workers) as pool:
        done = list(pool.map(run, options.cases))
    options.out.mkdir(parents=True, exist_ok=True)
    text = "".join(f"=== {verdict.case}: {verdict.outcome} {verdict.words}\n{output}\n" for verdict, output in done)
    (options.out / f"{tool}.txt").write_text(text)
    return [verdict for verdict, _ in done]


def _judge_alone(name: str, status: int, output: str) -> tuple[str, str]:
    return ("failed", last_line(output)) if status else ("passed", "")


def last_line(output: str) -> str:
    """Return the last line that says something, of the program rather than the tool."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("==")]
    return lines[-1] if lines else "ended without a word"


def run_process(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Run a command and return its exit status, None if it was ended for taking too long, and its output."""
    # A session of its own: a tool starts the program that it watches.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | (environment or {}),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(seconds, 0.0))
        return process.returncode, output
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return None, process.communicate()[0]


def launch_command(*arguments: str) -> list[str]:
    """Return the command that runs `launch.py` in a fresh Python."""
    return [sys.executable, str(Path(__file__).with_name("launch.py")), *arguments]


def parser_of(description: str | None, names: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser of what the commands have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tools' words and of a JSON file")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; what has no time is not run")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME")
    # Each process keeps a core busy and has a CUDA context.
    parser.add_argument("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    return parser


def finish(file: Path, verdicts: Sequence[Verdict]) -> int:
    """Store verdicts, print a line for each tool and one for all that did not pass, and return the exit status."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"verdicts": [asdict(verdict) for verdict in verdicts]})
    for tool in dict.fromkeys(verdict.tool for verdict in verdicts):
        outcomes = [verdict.outcome for verdict in verdicts if verdict.tool == tool]
        print(f"{tool}: " + ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in OUTCOMES))
    for verdict in verdicts:
        if verdict.outcome != "passed":
            print(f"  {verdict.tool}, {verdict.case}: {verdict.outcome}: {verdict.words[:160]}")
    outcomes = [verdict.outcome for verdict in verdicts]
    if "failed" in outcomes:
        return FAILED
    return NOT_RUN if "not run" in outcomes or not outcomes else PASSED
