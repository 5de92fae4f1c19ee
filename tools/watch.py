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
from pathlib import Path

from infimm_fast.export.common.artifact import write_json

# Exit statuses of the commands; `bench_gpu.sh` knows them.
PASSED, FAILED, NOT_RUN = 0, 1, 3
# What one process costs before its first kernel: importing torch, making a CUDA context.
START_SECONDS = 15.0
OUTCOMES = ("passed", "failed", "not run")


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


@dataclass
class Watch:
    """Runs cases under tools until a deadline, and keeps what they print.

    Attributes:
        folder: of the files, one for each tool.
        deadline: by `time.monotonic`; what is not begun before it is not run.
        workers: processes at a time.
    """

    folder: Path
    deadline: float
    workers: int

    def all(
        self,
        tool: str,
        names: Sequence[str],
        command: Callable[[str], list[str]],
        judge: Callable[[str, int, str], tuple[str, str]],
        environment: Mapping[str, str] | None = None,
    ) -> list[Verdict]:
        """Run one tool over cases.

        Args:
            tool: its name.
            names: of cases.
            command: takes a name and returns what is run.
            judge: takes a name, the exit status and all output, and returns an outcome and why.
            environment: variables beside those of this process.
        """

        def run(name: str) -> tuple[Verdict, str]:
            started = time.monotonic()
            left = self.deadline - started
            if left < START_SECONDS:
                return Verdict(tool, name, "not run", "no time left"), ""
            status, output = run_process(command(name), left, environment)
            seconds = round(time.monotonic() - started, 1)
            if status is None:
                return Verdict(tool, name, "not run", "ended: no time left", seconds), output
            return Verdict(tool, name, *judge(name, status, output), seconds), output

        with ThreadPoolExecutor(self.workers) as pool:
            done = list(pool.map(run, names))
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(f"=== {verdict.case}: {verdict.outcome} {verdict.words}\n{output}\n" for verdict, output in done)
        (self.folder / f"{tool}.txt").write_text(text)
        return [verdict for verdict, _ in done]

    def alone(self, names: Sequence[str]) -> list[Verdict]:
        """Run cases without a tool, so that their kernels are compiled before one slows everything; return what failed."""
        verdicts = self.all("alone", names, launch_command, lambda name, status, output: outcome_of(status, output))
        return [verdict for verdict in verdicts if verdict.outcome == "failed"]


def outcome_of(status: int, output: str) -> tuple[str, str]:
    """Return the outcome of a program that nothing watches: its exit status, and its last line if that is not 0."""
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
    status: int | None = None
    try:
        output, _ = process.communicate(timeout=max(seconds, 0.0))
        status = process.returncode
    except subprocess.TimeoutExpired:
        _kill_session(process.pid)
        output, _ = process.communicate()
    except BaseException:
        _kill_session(process.pid)
        raise
    return status, output


def _kill_session(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


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
