"""What a run leaves behind: one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from infimm_fast.benchmarks.ceilings import Ceilings
from infimm_fast.benchmarks.registry import BenchCase
from infimm_fast.errors import ConfigurationError
from infimm_fast.export.common.artifact import write_json

FORMAT = "infimm_fast benchmark 2"


@dataclass(frozen=True)
class Row:
    """One implementation of one case in one launch mode: a figure, or the reason why there is none.

    Attributes:
        implementation: its name.
        mode: "eager" or "graph".
        ours: whether it is one of this library's.
        median_ms: of single runs; None without a figure, like all that follow.
        p10_ms: a tenth of the runs was faster.
        p90_ms: a tenth of the runs was slower.
        samples: number of timed runs.
        tflops: by the case's true FLOPs.
        share: of the ceiling that binds the case.
        pictures_per_s: throughput, where a run takes in pictures.
        peak_memory_mb: allocated by one run beyond its inputs, in MiB; None on a CPU.
        stages: median of each stage in milliseconds.
        errors: of each checked result: max_abs, rms, and what was allowed.
        remark: why there is no figure.
        failed: the check failed, or one of this library's own implementations did not run.
    """

    implementation: str
    mode: str
    ours: bool = False
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    samples: int = 0
    tflops: float | None = None
    share: float | None = None
    pictures_per_s: float | None = None
    peak_memory_mb: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    remark: str = ""
    failed: bool = False


@dataclass(frozen=True, kw_only=True)
class CaseResult(BenchCase):
    """A case with all its rows.

    Attributes:
        op: name of the stage, which may be an op.
        section: its section.
        rows: one for each implementation and launch mode.
        input_sets: sets of inputs that rotated.
        gpu: clock, temperature and power after the case; empty on a CPU.
        bound: the ceiling that binds the case, "matmul" or "copy".
    """

    op: str
    section: str
    rows: list[Row]
    input_sets: int = 1
    gpu: dict[str, str] = field(default_factory=dict)
    bound: str = ""

    @property
    def case(self) -> str:
        """Name of the case."""
        return self.name

    @property
    def above_ceiling(self) -> bool:
        """Whether a figure is better than a measured ceiling allows."""
        return any(row.share is not None and row.share > 1 for row in self.rows)

    def rated(self, ceilings: Ceilings) -> CaseResult:
        """Return the case with its rates and shares by some ceilings."""
        least_ms, bound = ceilings.least_ms(self.flops, self.bytes)
        rows = []
        for row in self.rows:
            if ms := row.median_ms:
                row = replace(row, tflops=self.flops / (ms * 1e9), share=least_ms / ms)
                row = replace(row, pictures_per_s=self.pictures / ms * 1e3) if self.pictures else row
            rows.append(row)
        return replace(self, bound=bound, rows=rows)


@dataclass
class Report:
    """A whole run.

    Attributes:
        title: preset and device, and whether the run is a scaled-down one.
        environment: card, versions, commit.
        settings: what was asked for.
        ceilings: measured in this run.
        cases: in the order in which they ran.
        left_out: cases that the budget had no time for.
    """

    title: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    ceilings: dict[str, float]
    cases: list[CaseResult] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Implementations that failed, with their case."""
        return [f"{case.op}, {case.case}: {row.implementation}" for case in self.cases for row in case.rows if row.failed]

    @property
    def ceilings_line(self) -> str:
        """The ceilings in words, to stand in a sentence."""
        rates = self.ceilings
        return f"ceilings: matrix products {rates['matmul_tflops']:.4g} TFLOP/s, copies {rates['copy_gb_s']:.4g} GB/s"

    def save(self, file: Path) -> None:
        """Write the report, and its folder if there is none; the file is complete at every moment."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, file: Path) -> Report:
        """Read what `save` wrote.

        Raises:
            ConfigurationError: the file is not a report of this version.
        """
        content, cases = read_json(file, "a benchmark report", FORMAT), []
        for case in content.pop("cases"):
            lists = {name: tuple(value) for name, value in case.items() if isinstance(value, list)}
            lists |= {"series": tuple(tuple(one) for one in case["series"])}
            cases.append(CaseResult(**case | lists | {"rows": [Row(**row) for row in case["rows"]]}))
        return cls(**content, cases=cases)


def read_json(file: Path, what: str, expected: str) -> dict[str, Any]:
    """Return what a JSON file of the expected format says beside it.

    Raises:
        ConfigurationError: the file is no such file.
    """
    try:
        content = json.loads(file.read_text())
        found = content.pop("format", None) if isinstance(content, dict) else None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read as {what}: {error}") from error
    if found != expected:
        raise ConfigurationError(f"{file} has format {found!r}; expected {expected!r}; make it anew with this version")
    return content
