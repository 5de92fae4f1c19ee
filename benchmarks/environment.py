"""Where a run happened: card, versions, commit, clock and temperature."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import shutil
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


def _git(*arguments: str) -> str | None:
    """Return what git says about the checkout this file lies in, or None outside of one."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """Return the short commit of the checkout, with "-changed" if files differ from it; the version outside a checkout."""
    # An installed copy may lie inside somebody else's checkout, in a folder that git ignores.
    ignored = _git("check-ignore", Path(__file__).name)
    if ignored or not (found := _git("rev-parse", "--short=10", "HEAD")):
        return infimm_fast.__version__
    return f"{found}-changed" if _git("status", "--porcelain") else found


def gpu_state(device: torch.device) -> dict[str, str]:
    """Return clock, temperature and power with their units; empty on a CPU or without nvidia-smi."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    index = str(torch.cuda.current_device() if device.index is None else device.index)
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_GPU_QUERY, (value.strip() for value in done.stdout.split(",")), strict=False))


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
    parts = [
        environment["device"],
        f"torch {environment['torch']}",
        f"triton {environment['triton'] or 'none'}",
        environment["commit"],
        suffix,
    ]
    return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part).strip("-") for part in parts if part) + ".json"
