"""Runs every candidate once, in processes of their own.

Triton's disk cache is filled in parallel, and what hangs or breaks its process does so here, not while others are timed.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from infimm_fast.benchmarks.registry import Inputs
from infimm_fast.benchmarks.tuning.candidates import Candidate, constants_set
from infimm_fast.benchmarks.tuning.jobs import Job, launch, make_inputs

Task = tuple[Job, Candidate]
# A process takes some ten seconds to begin, a kernel a few to compile; beyond this it hangs.
HANGS_AFTER = 60.0
_TOLD_EVERY = 20
NOT_REACHED = "not compiled in time"


@dataclass
class Worker:
    """A process that runs one task at a time; it ends with the first task that fails, since a GPU's errors stick."""

    process: BaseProcess
    pipe: Connection
    task: int | None = None
    since: float = 0.0

    @classmethod
    def start(cls, device: torch.device, arch: int) -> Worker:
        """Start a process."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, str(device), arch), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, index: int, task: Task) -> None:
        """Hand over a task."""
        self.task, self.since = index, time.monotonic()
        self.pipe.send(task)

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, device: str, arch: int) -> None:
    """Run tasks until one fails; answer each with "" or with what is wrong."""
    torch.set_num_threads(1)
    last: tuple[Job, Inputs] | None = None
    while True:
        job, candidate = pipe.recv()
        try:
            if last is None or last[0] != job:
                last = None
                last = (job, make_inputs(job, torch.device(device), 0, arch))
            with constants_set(job, candidate.constants):
                launch(job, last[1], candidate.config, arch)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
        except Exception as error:
            lines = str(error).strip().splitlines() or traceback.format_exc().strip().splitlines()[-1:]
            pipe.send(f"does not run: {type(error).__name__}: {lines[0][:200]}")
            return
        pipe.send("")


@dataclass
class Pool:
    """Workers and what they have found out.

    Attributes:
        device: where candidates run.
        arch: compute capability that configurations are chosen for.
        remarks: by task: "" if it ran, else what is wrong.
    """

    device: torch.device
    arch: int
    remarks: dict[int, str] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.stop()
        self.workers = []

    def finish(self, worker: Worker, remark: str) -> None:
        """Note what became of a worker's task; replace the worker if the task failed."""
        assert worker.task is not None
        self.remarks[worker.task] = remark
        worker.task = None
        if remark:
            worker.stop()
            self.workers[self.workers.index(worker)] = Worker.start(self.device, self.arch)


def warm_up(
    tasks: Sequence[Task], device: torch.device, arch: int, processes: int, limit: float, tell: Callable[[str], None]
) -> list[str]:
    """Run every task once and return for each "" or why it must not be timed.

    Args:
        tasks: the most important ones first.
        device: where they run.
        arch: compute capability that configurations are chosen for.
        processes: at the same time.
        limit: seconds for all; what has not begun by then is `NOT_REACHED`.
        tell: takes a line of progress.
    """
    deadline, waiting = time.monotonic() + limit, deque(range(len(tasks)))
    pool = Pool(device, arch)
    pool.workers = [Worker.start(device, arch) for _ in range(min(processes, len(tasks)))]
    try:
        while True:
            for worker in pool.workers:
                if worker.task is None and waiting and time.monotonic() < deadline:
                    index = waiting.popleft()
                    worker.give(index, tasks[index])
            busy = [worker for worker in pool.workers if worker.task is not None]
            if not busy:
                break
            before = len(pool.remarks)
            _collect(pool, busy)
            if len(pool.remarks) // _TOLD_EVERY > before // _TOLD_EVERY:
                tell(f"compiled {len(pool.remarks)} of {len(tasks)}")
    finally:
        pool.close()
    return [pool.remarks.get(index, NOT_REACHED) for index in range(len(tasks))]


def _collect(pool: Pool, busy: Sequence[Worker]) -> None:
    """Wait for an answer, the end of a process, or a candidate that hangs."""
    ready = wait([worker.pipe for worker in busy], timeout=1.0)
    for worker in busy:
        if worker.pipe in ready:
            try:
                remark = worker.pipe.recv()
            except (EOFError, OSError):
                remark = "ends its process"
            pool.finish(worker, remark)
        elif time.monotonic() - worker.since > HANGS_AFTER:
            pool.finish(worker, f"does not end within {HANGS_AFTER:.0f} s")
