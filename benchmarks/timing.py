"""How long something takes: CUDA events, replay of CUDA graphs, or the host's clock."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WARM_UPS = 3
MIN_SAMPLES = 5
MAX_SAMPLES = 200
# Rotating inputs must be several times as large as the last-level cache to find nothing of themselves in it.
COLD_CACHES = 3
MAX_INPUT_SETS = 64
# The size of a CPU's last-level cache is not known; two sets at least do not reuse each other's lines at once.
CPU_INPUT_SETS = 2


@dataclass(frozen=True)
class Times:
    """Times of single runs in milliseconds, at least one."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the runs took longer."""
        return statistics.median(self.samples)

    def percentile(self, percent: int) -> float:
        """Return the time that `percent` % of the runs did not reach."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]

    @property
    def figures(self) -> dict[str, Any]:
        """What `infimm_fast.benchmarks.report.Row` says of them."""
        percentiles = {f"p{percent}_ms": self.percentile(percent) for percent in (10, 90)}
        return {"median_ms": self.median, **percentiles, "samples": len(self.samples)}


class Timer:
    """Times functions on one device.

    Args:
        device: where they run.
        seconds: for which one function is timed, beside warm-up and a smallest number of samples.
        now: the host's clock in seconds.
    """

    def __init__(self, device: torch.device, seconds: float, now: Callable[[], float] = time.perf_counter):
        self.device = device
        self.seconds = seconds
        self.now = now

    def eager(self, runs: Sequence[Callable[[], Any]]) -> Times:
        """Time calls of `runs` in turn: between CUDA events on a GPU, on the host's clock elsewhere.

        Args:
            runs: the same work on different inputs, so that none of them finds its inputs in the cache.
        """
        if self.device.type != "cuda":
            return self.wall(runs)
        pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

        def sample(run: Callable[[], Any]) -> None:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            pairs.append((start, end))
            # A queue of launches that never empties times the GPU, one that is too long hides its failure.
            if len(pairs) % 10 == 0:
                torch.cuda.synchronize(self.device)

        self._repeat(runs, sample)
        torch.cuda.synchronize(self.device)
        return Times(tuple(start.elapsed_time(end) for start, end in pairs))

    def graph(self, runs: Sequence[Callable[[], Any]]) -> Times:
        """Capture one call of each of `runs` in a single CUDA graph and time its replay, divided by their number."""
        graph = capture(runs)
        replayed = self.eager([graph.replay])
        return Times(tuple(sample / len(runs) for sample in replayed.samples))

    def wall(self, runs: Sequence[Callable[[], Any]]) -> Times:
        """Time calls of `runs` in turn on the host's clock, waiting for the device."""
        samples: list[float] = []

        def sample(run: Callable[[], Any]) -> None:
            self._synchronize()
            started = self.now()
            run()
            self._synchronize()
            samples.append((self.now() - started) * 1e3)

        self._repeat(runs, sample)
        return Times(tuple(samples))

    def _repeat(self, runs: Sequence[Callable[[], Any]], sample: Callable[[Callable[[], Any]], None]) -> None:
        for index in range(WARM_UPS):
            runs[index % len(runs)]()
        self._synchronize()
        deadline = self.now() + self.seconds
        count = 0
        while count < MIN_SAMPLES or (count < MAX_SAMPLES and self.now() < deadline):
            sample(runs[count % len(runs)])
            count += 1

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def capture(runs: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of one call of each of `runs`, captured after a warm-up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            runs[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def input_sets(touched_bytes: int, device: torch.device) -> int:
    """Return how many sets of inputs have to rotate so that every run finds a cold cache.

    Args:
        touched_bytes: what one run reads and writes.
        device: where it runs.
    """
    if device.type != "cuda":
        return CPU_INPUT_SETS
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(1, -(-COLD_CACHES * cache // max(1, touched_bytes))), MAX_INPUT_SETS)


def peak_memory_mb(run: Callable[[], Any], device: torch.device) -> float | None:
    """Return what one run allocates beyond what is there, in MiB; None where the device does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


@contextlib.contextmanager
def pinned_threads() -> Iterator[None]:
    """Keep all threads of the process on as many cores as torch uses, where the system can; undone afterwards."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    # The last ones, since systems leave interrupts to the first.
    chosen = set(sorted(cores)[-torch.get_num_threads() :])
    _set_affinity(chosen)
    try:
        yield
    finally:
        _set_affinity(cores)


def _set_affinity(cores: set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        # A thread may have ended since it was listed.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)
