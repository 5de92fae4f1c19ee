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

from infimm_fast.benchmarks.report import Report, Row
from infimm_fast.errors import ConfigurationError

# Medians of the same code differ by a few percent from process to process, whatever the spread inside each.
NOISE_FLOOR = 0.03

Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Comparison:
    """One row of both runs.

    Attributes:
        op: name of the op.
        case: name of the case and its dtype.
        implementation: its name.
        mode: "eager" or "graph".
        before_ms: median of the first run, or None without a figure.
        after_ms: median of the second run, or None without a figure.
        noise: half of the distance from p10 to p90 of each run over its median, added as independent errors are, and at
            least `NOISE_FLOOR`.
    """

    op: str
    case: str
    implementation: str
    mode: str
    before_ms: float | None
    after_ms: float | None
    noise: float

    @property
    def ratio(self) -> float | None:
        """Time after over time before."""
        if self.before_ms is None or self.after_ms is None:
            return None
        return self.after_ms / self.before_ms

    @property
    def verdict(self) -> str:
        """Say "slower", "faster", "lost" (a figure that is gone), "new", or "" within the noise."""
        if self.before_ms is None or self.after_ms is None:
            return "lost" if self.before_ms is not None else "new" if self.after_ms is not None else ""
        ratio = self.after_ms / self.before_ms
        if ratio > 1 + self.noise:
            return "slower"
        return "faster" if ratio < 1 / (1 + self.noise) else ""


def compare(before: Report, after: Report) -> list[Comparison]:
    """Return all rows that the two runs have in common.

    Raises:
        ConfigurationError: the runs are of different devices, or have no case in common.
    """
    devices = before.environment["device"], after.environment["device"]
    if devices[0] != devices[1]:
        raise ConfigurationError(f"runs on {devices[0]!r} and {devices[1]!r} cannot be compared; use runs of one device")
    first, second = dict(_rows(before)), dict(_rows(after))
    comparisons = [
        Comparison(
            key[0], f"{key[1]}, {key[2]}", key[3], key[4], first[key].median_ms, second[key].median_ms,
            max(NOISE_FLOOR, math.hypot(_spread(first[key]), _spread(second[key]))),
        )
        for key in first
        if key in second
    ]  # fmt: skip
    if not comparisons:
        raise ConfigurationError("the two runs have no case in common")
    return comparisons


def _rows(report: Report) -> Iterator[tuple[Key, Row]]:
    for case in report.cases:
        for row in case.rows:
            yield (case.op, case.case, case.dtype, row.implementation, row.mode), row


def _spread(row: Row) -> float:
    if row.median_ms is None or row.p10_ms is None or row.p90_ms is None:
        return 0.0
    return (row.p90_ms - row.p10_ms) / 2 / row.median_ms


def is_regression(comparisons: Sequence[Comparison]) -> bool:
    """Return whether anything became slower beyond the noise, or lost its figure."""
    return any(one.verdict in ("slower", "lost") for one in comparisons)


HEADER = ("op", "case", "implementation", "mode", "before ms", "after ms", "ratio", "noise", "")


def table_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Return the cells below `HEADER` for every row that has a figure in either run."""
    return [
        (
            one.op,
            one.case,
            one.implementation,
            one.mode,
            "" if one.before_ms is None else f"{one.before_ms:.4g}",
            "" if one.after_ms is None else f"{one.after_ms:.4g}",
            "" if one.ratio is None else f"{one.ratio:.3f}",
            f"{one.noise:.1%}",
            one.verdict,
        )
        for one in comparisons
        if one.before_ms is not None or one.after_ms is not None
    ]


def load_or_run(source: str, arguments: Sequence[str]) -> Report:
    """Return the report in a JSON file, or that of a fresh run of a git revision.

    Args:
        source: a file, or a revision of the checkout in the current folder.
        arguments: of ``python -m infimm_fast.benchmarks.run`` for a revision.

    Raises:
        ConfigurationError: `source` is neither, or the run failed to leave a report.
    """
    if Path(source).is_file():
        return Report.load(Path(source))
    git = ["git", "rev-parse", "--verify", "--quiet", f"{source}^{{commit}}"]
    if shutil.which("git") is None or subprocess.run(git, capture_output=True, check=False).returncode:
        raise ConfigurationError(f"{source!r} is neither a file nor a git revision of the current folder's checkout")
    return run_revision(source, arguments)


def run_revision(revision: str, arguments: Sequence[str]) -> Report:
    """Check a revision out beside the working tree, install it into a folder of its own, and run its benchmarks there."""
    with tempfile.TemporaryDirectory(prefix="infimm_fast_bench_") as name:
        tree, site, out = (Path(name) / part for part in ("tree", "site", "out"))
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
            subprocess.run([*pip, "--target", str(site), str(tree)], check=True)
            command = [sys.executable, "-m", "infimm_fast.benchmarks.run", *arguments, "--out", str(out)]
            # Before the paths of the environment, where this package is installed too.
            environment = os.environ | {"PYTHONPATH": str(site)}
            status = subprocess.run(command, check=False, env=environment, cwd=name).returncode
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)
        reports = sorted(out.glob("*.json"))
        if not reports:
            raise ConfigurationError(f"revision {revision!r} left no report; its benchmarks ended with status {status}")
        return Report.load(reports[0])
