"""Where a run happened: card, versions, commit, clock and temperature."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import infimm_fast

_GPU_QUERY = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _output(*command: str) -> str | None:
    """Return what a command prints when it runs beside this file, or None if it is missing or fails."""
    options: dict[str, Any] = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 30}
    try:
        return subprocess.run(command, check=True, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str:
    """Return the short commit of the checkout, with "-changed" if files differ from it; the version outside a checkout."""
    # An installed copy may lie inside somebody else's checkout, in a folder that git ignores.
    ignored = _output("git", "check-ignore", Path(__file__).name)
    if ignored or not (found := _output("git", "rev-parse", "--short=10", "HEAD")):
        return infimm_fast.__version__
    return f"{found}-changed" if _output("git", "status", "--porcelain") else found


def gpu_state(device: torch.device) -> dict[str, str]:
    """Return clock, temperature and power with their units; empty on a CPU or without nvidia-smi."""
    if device.type != "cuda":
        return {}
    index = torch.cuda.current_device() if device.index is None else device.index
    query = f"--query-gpu={','.join(_GPU_QUERY)}"
    values = _output("nvidia-smi", f"--id={index}", query, "--format=csv,noheader") or ""
    return dict(zip(_GPU_QUERY, (value.strip() for value in values.split(",") if value), strict=False))


def processor_name() -> str:
    """Return the CPU's name as the system gives it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Return card, versions and commit."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU {processor_name()}",
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        "commit": commit(),
        "gpu": gpu_state(device),
    }


def file_name(environment: dict[str, Any], suffix: str = "") -> str:
    """Return the name of a report: card, torch, triton, commit."""
    versions = f"torch {environment['torch']}", f"triton {environment['triton'] or 'none'}"
    parts = (environment["device"], *versions, environment["commit"], suffix)
    return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part).strip("-") for part in parts if part) + ".json"
