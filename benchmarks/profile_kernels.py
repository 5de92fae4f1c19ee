"""Profile the Triton kernels with Nsight Compute: ``python -m infimm_fast.benchmarks.profile_kernels --out FOLDER``.

Each main case of `one_launch` runs twice in a process of its own, and the second run's kernels are profiled, one case
after the other. The figures and what binds each kernel land in ``FOLDER/profile.json``. What could not be profiled is
listed as "not run" with the reason.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from infimm_fast.benchmarks.one_launch import MAIN_CASES
from infimm_fast.benchmarks.outside_tools import (
    FAILED,
    NOT_RUN,
    PASSED,
    START_SECONDS,
    Deadline,
    Finished,
    default_workers,
    one_launch,
    print_table,
    run_process,
    warm_up,
)
from infimm_fast.benchmarks.report import save_json

PROGRAM = "ncu"
# Whole sections, whose metrics have other names on every GPU generation, rather than metrics by name: one that is not
# known would end the run.
SECTIONS = (
    "SpeedOfLight",
    "Occupancy",
    "WarpStateStats",
    "SchedulerStats",
    "LaunchStats",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
)
_PERCENT = r"\.pct_of_peak_sustained_(?:active|elapsed)"
# What is read, and the metrics that say it, the best first. Where one pattern fits several metrics the largest counts: each
# kind of matrix instruction has a metric of its own.
METRICS: dict[str, tuple[str, ...]] = {
    "microseconds": (r"gpu__time_duration\.sum",),
    "multiprocessor": (r"sm__throughput\.avg" + _PERCENT,),
    "tensor": (r"sm(?:sp)?__(?:inst_executed_)?pipe_tensor\w*\.(?:avg|sum)" + _PERCENT,),
    "issue": (
        r"smsp__issue_active\.avg" + _PERCENT,
        r"sm__inst_issued\.avg" + _PERCENT,
        r"sm__inst_executed\.avg" + _PERCENT,
    ),
    "MUFU": (r"sm(?:sp)?__inst_executed_pipe_xu\.(?:avg|sum)" + _PERCENT,),
    "DRAM": (r"(?:gpu__)?dram(?:__|_)throughput\.avg" + _PERCENT,),
    "L2": (r"lts__throughput\.avg" + _PERCENT,),
    "L2 hits": (r"lts__t_sector_hit_rate\.pct",),
    "occupancy": (r"sm__warps_active\.avg" + _PERCENT,),
    "registers": (r"launch__registers_per_thread",),
}
# Of these one binds a kernel, in percent of the peak; if all are below the limit, nothing but waiting does.
BINDING = ("tensor", "issue", "MUFU", "DRAM", "L2")
LATENCY_LIMIT = 60.0
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio$")
_NO_STALL = ("selected",)
_SHOWN_STALLS = 3
_MICROSECONDS = {
    "second": 1e6, "s": 1e6, "msecond": 1e3, "ms": 1e3, "usecond": 1.0, "us": 1.0, "nsecond": 1e-3, "ns": 1e-3,
}  # fmt: skip
# One case; a profiler that hangs must not take the others' time.
_CASE_SECONDS = 150.0


@dataclass(frozen=True)
class KernelProfile:
    """The figures of one launch.

    Attributes:
        kernel: name of the jitted function.
        grid: as the tool prints it.
        figures: by the names in `METRICS`; percent unless the name says otherwise. A metric that is absent is absent here.
        stalls: why warps wait, in cycles for each instruction issued, the longest first.
        bound: one of `BINDING`, "latency", or "unknown" without any of those figures.
    """

    kernel: str
    grid: str
    figures: Mapping[str, float]
    stalls: Mapping[str, float]
    bound: str


@dataclass(frozen=True)
class CaseProfile:
    """One case.

    Attributes:
        case: its name.
        outcome: "profiled", "failed" or "not run".
        words: why it is not profiled.
        seconds: how long it took.
        kernels: its launches, in their order.
    """

    case: str
    outcome: str
    words: str = ""
    seconds: float = 0.0
    kernels: list[KernelProfile] = field(default_factory=list)


def parse_raw_page(output: str) -> list[KernelProfile]:
    """Read what ``ncu --csv --page raw`` prints, among lines of the tool and of the program.

    Args:
        output: a header row, a row of units, and one row for each launch.
    """
    lines = output.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    table = list(csv.reader(line for line in lines[start:] if line.startswith('"')))
    if not table:
        return []
    header = table[0]
    rows = [dict(zip(header, row, strict=True)) for row in table[1:] if len(row) == len(header)]
    units = next((row for row in rows if not row["ID"]), {})
    return [_read_launch(row, units) for row in rows if row["ID"]]


def _read_launch(row: Mapping[str, str], units: Mapping[str, str]) -> KernelProfile:
    numbers = {name: value for name, text in row.items() if (value := _number(text)) is not None}
    figures = {}
    for figure, patterns in METRICS.items():
        for pattern in patterns:
            found = {name: value for name, value in numbers.items() if re.search(rf"(?:^|[^a-z_]){pattern}$", name)}
            if found:
                name = max(found, key=lambda name: found[name])
                figures[figure] = found[name] * (
                    _MICROSECONDS.get(units.get(name, ""), 1.0) if figure == "microseconds" else 1.0
                )
                break
    stalls = {
        match[1]: value for name, value in numbers.items() if (match := _STALL.search(name)) and match[1] not in _NO_STALL
    }
    longest = sorted(stalls, key=lambda name: -stalls[name])[:_SHOWN_STALLS]
    kernel = row.get("Kernel Name", "").split("(")[0]
    return KernelProfile(
        kernel, row.get("Grid Size", ""), figures, {name: stalls[name] for name in longest}, what_binds(figures)
    )


def _number(text: str) -> float | None:
    """Return a number with its thousands separators, or None for anything else ("n/a", "nan", a name)."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def what_binds(figures: Mapping[str, float]) -> str:
    """Return the busiest unit, or "latency" if none is busy."""
    present = [name for name in BINDING if name in figures]
    if not present:
        return "unknown"
    busiest = max(present, key=lambda name: figures[name])
    return busiest if figures[busiest] >= LATENCY_LIMIT else "latency"


def ncu_command(program: str, name: str) -> list[str]:
    """Return the command that profiles the second run of a main case."""
    kernels = "|".join(MAIN_CASES[name].kernels)
    command = [program, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--profile-from-start", "off", "--target-processes", "application-only"]
    command += ["--kernel-name-base", "function", "--kernel-name", f"regex:^({kernels})$"]
    for section in SECTIONS:
        command += ["--section", section]
    return [*command, *one_launch("--profile", name)]


def read_profile(name: str, finished: Finished) -> CaseProfile:
    """Return a case's profile; all kernels of the case must be in it."""
    seconds = round(finished.seconds, 1)
    kernels = parse_raw_page(finished.output)
    if not kernels:
        refusal = re.search(r"^==ERROR== *(.*)$", finished.output, re.MULTILINE)
        words = "ended: no time left" if finished.status is None else refusal[1] if refusal else finished.last_line
        return CaseProfile(name, "not run", words, seconds)
    missing = [kernel for kernel in MAIN_CASES[name].kernels if kernel not in {launch.kernel for launch in kernels}]
    if missing or finished.status != 0:
        words = f"no launch of {', '.join(missing)} was seen" if missing else finished.last_line
        return CaseProfile(name, "failed", words, seconds, kernels)
    return CaseProfile(name, "profiled", "", seconds, kernels)


def profile(names: Sequence[str], deadline: Deadline, workers: int) -> list[CaseProfile]:
    """Profile cases one after the other.

    Args:
        names: of main cases of `one_launch`.
        deadline: what is not begun before it is not run.
        workers: processes that compile the kernels beforehand.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        return [CaseProfile(name, "not run", f"{PROGRAM} is not installed") for name in names]
    warm_up(names, deadline, workers)
    profiles = []
    for name in names:
        left = deadline.left()
        if left < START_SECONDS:
            profiles.append(CaseProfile(name, "not run", "no time left"))
            continue
        finished = run_process(ncu_command(program, name), min(left, _CASE_SECONDS))
        profiles.append(read_profile(name, finished))
        if profiles[-1].outcome != "profiled":
            print(f"--- {name}: {profiles[-1].outcome}\n{finished.output[-4000:]}", flush=True)
    return profiles


def print_profiles(profiles: Sequence[CaseProfile]) -> None:
    """Print one line for each launch, and one for each case that was not profiled."""
    shown = ("tensor", "issue", "MUFU", "DRAM", "L2", "occupancy", "registers")
    rows = []
    for entry in profiles:
        for launch in entry.kernels:
            time = f"{launch.figures['microseconds']:.0f}" if "microseconds" in launch.figures else "-"
            figures = [f"{launch.figures[name]:.0f}" if name in launch.figures else "-" for name in shown]
            stalls = ", ".join(f"{name} {cycles:.1f}" for name, cycles in launch.stalls.items())
            rows.append((entry.case, launch.kernel.removesuffix("_kernel"), time, *figures, launch.bound, stalls))
    if rows:
        print_table(("case", "kernel", "us", *shown, "bound by", "stalls"), rows)
    for entry in profiles:
        if entry.outcome != "profiled":
            print(f"{entry.case}: {entry.outcome}: {entry.words}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 if a case failed, else 3 if one was not run, else 0."""
    parser = argparse.ArgumentParser(prog="python -m infimm_fast.benchmarks.profile_kernels", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of profile.json")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; the less important cases are left out")
    parser.add_argument("--cases", nargs="+", choices=list(MAIN_CASES), default=list(MAIN_CASES), metavar="NAME")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes that compile beforehand")
    options = parser.parse_args(arguments)
    profiles = profile(options.cases, Deadline(options.budget), options.workers)
    save_json(options.out / "profile.json", {"cases": [asdict(entry) for entry in profiles]})
    print_profiles(profiles)
    outcomes = {entry.outcome for entry in profiles}
    return FAILED if "failed" in outcomes else NOT_RUN if "not run" in outcomes else PASSED


if __name__ == "__main__":
    raise SystemExit(main())
