"""Two runs side by side: ratios, the noise of each, and whether the second one is slower beyond it."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from infimm_fast.benchmarks.display import print_table
from infimm_fast.benchmarks.report import Report, Row
from infimm_fast.errors import ConfigurationError

# Medians of the same code differ by a few percent from process to process, whatever the spread inside each.
NOISE_FLOOR = 0.03
# In place of a file or revision: run what is installed.
NOW = "now"


@dataclass(frozen=True)
class Comparison:
    """One row of both runs.

    Attributes:
        case: names of the stage and the case, and the dtype.
        implementation: its name.
        mode: "eager" or "graph".
        before_ms: median of the first run, or None without a figure.
        after_ms: median of the second run, or None without a figure.
        noise: half of the distance from p10 to p90 of each run over its median, added as independent errors are, and at
            least `NOISE_FLOOR`.
    """

    case: str
    implementation: str
    mode: str
    before_ms: float | None
    after_ms: float | None
    noise: float

    @property
    def ratio(self) -> float | None:
        """Time after over time before."""
        return self.after_ms / self.before_ms if self.before_ms and self.after_ms else None

    @property
    def verdict(self) -> str:
        """Say "slower", "faster", "lost" (a figure that is gone), "new", or "" within the noise."""
        if self.ratio is None:
            return "lost" if self.before_ms is not None else "new" if self.after_ms is not None else ""
        if self.ratio > 1 + self.noise:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.noise) else ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of a table below the case."""
        times = ("" if time is None else f"{time:.4g}" for time in (self.before_ms, self.after_ms))
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        return self.implementation, self.mode, *times, ratio, f"{self.noise:.1%}", self.verdict


def compare(before: Report, after: Report) -> list[Comparison]:
    """Return all rows that the two runs have in common.

    Raises:
        ConfigurationError: the runs are of different devices, or have no case in common.
    """
    devices = before.environment["device"], after.environment["device"]
    if devices[0] != devices[1]:
        raise ConfigurationError(f"runs on {devices[0]!r} and {devices[1]!r} cannot be compared; use runs of one device")
    first, second = dict(_rows(before)), dict(_rows(after))
    comparisons = []
    for key, row in first.items():
        if (other := second.get(key)) is not None:
            noise = max(NOISE_FLOOR, math.hypot(_spread(row), _spread(other)))
            comparisons.append(Comparison(*key, row.median_ms, other.median_ms, noise))
    if not comparisons:
        raise ConfigurationError("the two runs have no case in common")
    return comparisons


def _rows(report: Report) -> Iterator[tuple[tuple[str, str, str], Row]]:
    for case in report.cases:
        for row in case.rows:
            yield (f"{case.op}, {case.case}, {case.dtype}", row.implementation, row.mode), row


def _spread(row: Row) -> float:
    if row.median_ms is None or row.p10_ms is None or row.p90_ms is None:
        return 0.0
    return (row.p90_ms - row.p10_ms) / 2 / row.median_ms


def is_regression(comparisons: Sequence[Comparison]) -> bool:
    """Return whether anything became slower beyond the noise, or lost its figure."""
    return any(one.verdict in ("slower", "lost") for one in comparisons)


def show_comparison(before: Report, after: Report) -> list[Comparison]:
    """Print the rows that have a figure in either run, a table for each case, and return all of them; see `compare`."""
    comparisons = compare(before, after)
    for title in dict.fromkeys(one.case for one in comparisons):
        rows = [one.cells for one in comparisons if one.case == title and (one.before_ms or one.after_ms)]
        if rows:
            print_table(title, ("implementation", "mode", "before ms", "after ms", "ratio", "noise", ""), rows)
    if is_regression(comparisons):
        print("slower beyond the noise, or without a figure that was there before")
    return comparisons


def load_or_run(source: str, arguments: Sequence[str]) -> Report:
    """Return the report in a JSON file, or that of a fresh run.

    Args:
        source: a file, `NOW` for this very code, or a revision of the checkout in the current folder.
        arguments: of ``python -m infimm_fast.benchmarks`` for a run.

    Raises:
        ConfigurationError: `source` is none of these, or the run failed to leave a report.
    """
    if Path(source).is_file():
        return Report.load(Path(source))
    if source == NOW:
        return _run(source, arguments, {})
    git = ["git", "rev-parse", "--verify", "--quiet", f"{source}^{{commit}}"]
    if shutil.which("git") is None or subprocess.run(git, capture_output=True, check=False).returncode:
        raise ConfigurationError(f"{source!r} is neither a file nor a git revision of the current folder's checkout")
    return _run_revision(source, arguments)


def _run_revision(revision: str, arguments: Sequence[str]) -> Report:
    """Check a revision out beside the working tree, install it into a folder of its own, and run its benchmarks there."""
    with tempfile.TemporaryDirectory(prefix="infimm_fast_bench_") as name:
        tree, site = Path(name) / "tree", Path(name) / "site"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
            subprocess.run([*pip, "--target", str(site), str(tree)], check=True)
            # Before the paths of the environment, where this package is installed too.
            return _run(revision, arguments, {"PYTHONPATH": str(site)})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)


def _run(source: str, arguments: Sequence[str], variables: dict[str, str]) -> Report:
    with tempfile.TemporaryDirectory(prefix="infimm_fast_bench_") as out:
        command = [sys.executable, "-m", "infimm_fast.benchmarks", *arguments, "--out", out]
        status = subprocess.run(command, check=False, env=os.environ | variables, cwd=out).returncode
        reports = sorted(Path(out).glob("*.json"))
        if not reports:
            raise ConfigurationError(f"{source!r} left no report; its benchmarks ended with status {status}")
        return Report.load(reports[0])
