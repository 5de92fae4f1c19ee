"""What the stages of the demo are measured with, whatever runs them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class StageResults:
    """What one backend computed, and how long it took.

    Attributes:
        tensors: result of each compared stage.
        seconds: median time of each stage.
        tokens: ids of the greedy answer.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)


def now(device: torch.device) -> float:
    """Return the time in seconds once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return the median time of some runs, the device's work included."""
    seconds = []
    for _ in range(repeats):
        started = now(device)
        run()
        seconds.append(now(device) - started)
    return statistics.median(seconds)
