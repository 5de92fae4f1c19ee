"""What running NVIDIA's tools over `one_launch` has in common: a time limit, one warm-up, "not run" with its reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

# Exit statuses of the commands; `bench_gpu.sh` knows them.
PASSED, FAILED, NOT_RUN = 0, 1, 3
# What one process costs before its first kernel: importing torch, making a CUDA context.
START_SECONDS = 15.0


@dataclass(frozen=True)
class Finished:
    """A process that ended.

    Attributes:
        status: its exit status; None if it was ended for taking too long.
        output: standard output and error as they came.
        seconds: how long it ran.
    """

    status: int | None
    output: str
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line that says something."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


class Deadline:
    """How much of a number of seconds is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left, negative once they are over."""
        return self._end - time.monotonic()


def run_process(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Finished:
    """Run a command, and end it with all it started if it takes too long.

    Args:
        command: program and arguments.
        seconds: after which it is ended.
        environment: variables beside those of this process.
    """
    start = time.monotonic()
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
    status: int | None
    try:
        output, _ = process.communicate(timeout=max(seconds, 0.0))
        status = process.returncode
    except subprocess.TimeoutExpired:
        _kill_session(process.pid)
        output, _ = process.communicate()
        status = None
    except BaseException:
        _kill_session(process.pid)
        raise
    return Finished(status, output, time.monotonic() - start)


def _kill_session(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def one_launch(*arguments: str) -> list[str]:
    """Return the command that runs `one_launch` in a fresh Python."""
    return [sys.executable, "-m", "infimm_fast.benchmarks.one_launch", *arguments]


def default_workers() -> int:
    """Return how many such processes run at a time: each keeps a core busy and has a CUDA context."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def warm_up(names: Iterable[str], deadline: Deadline, workers: int) -> dict[str, Finished]:
    """Run every case without a tool, so that its kernels are compiled and stored before one slows everything down.

    Args:
        names: of cases.
        deadline: a case that is not begun before it is left out of the result.
        workers: processes at a time.
    """

    def run(name: str) -> Finished | None:
        left = deadline.left()
        return run_process(one_launch(name), left) if left > START_SECONDS else None

    names = list(names)
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(run, names))
    return {name: finished for name, finished in zip(names, done, strict=True) if finished is not None}


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns as wide as their widest entry; the last one is not padded."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    for line in lines:
        print("  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]).rstrip())
