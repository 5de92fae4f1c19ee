"""What a run on a GPU leaves behind: one JSON file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infimm_fast.benchmarks.report import save_json
from infimm_fast.benchmarks.tuning.candidates import Candidate
from infimm_fast.benchmarks.tuning.jobs import Job
from infimm_fast.benchmarks.tuning.plan import candidate_from, read_json

FORMAT = "infimm_fast tuning run 1"


@dataclass(frozen=True)
class Measured:
    """One candidate: a time behind a check, or the reason why there is none.

    Attributes:
        candidate: what ran.
        ms: median of replays of a CUDA graph, or of calls where there is no GPU.
        p10_ms: a tenth of them was faster.
        p90_ms: a tenth of them was slower.
        eager_ms: median of single calls, the host's share included.
        errors: of each checked result: max_abs, rms, and what was allowed.
        remark: why there is no time.
        wrong: the result is beyond the error budget, or the candidate does not run.
    """

    candidate: Candidate
    ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    eager_ms: float | None = None
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    remark: str = ""
    wrong: bool = False


@dataclass(frozen=True)
class JobResult:
    """All candidates of one job.

    Attributes:
        job: what was tuned.
        measured: the shipped candidate first.
        again_ms: of the shipped candidate once more, after all others; None if it could not be timed.
        gpu: clock, temperature and power afterwards; empty on a CPU.
        remark: why nothing was measured.
    """

    job: Job
    measured: list[Measured]
    again_ms: float | None = None
    gpu: dict[str, str] = field(default_factory=dict)
    remark: str = ""

    @property
    def shipped(self) -> Measured | None:
        """The shipped candidate, if any was measured."""
        return next((one for one in self.measured if one.candidate.shipped), None)

    @property
    def best(self) -> Measured | None:
        """The fastest candidate."""
        return min((one for one in self.measured if one.ms), key=lambda one: one.ms or 0.0, default=None)

    @property
    def noise(self) -> float | None:
        """How far the two times of the shipped candidate lie apart, as a share of the first."""
        if self.shipped is None or not self.shipped.ms or self.again_ms is None:
            return None
        return abs(self.again_ms - self.shipped.ms) / self.shipped.ms

    @property
    def failed(self) -> bool:
        """Whether there is no checked time of the shipped candidate."""
        return self.shipped is None or self.shipped.ms is None


@dataclass
class Results:
    """A whole run.

    Attributes:
        environment: card, versions, commit.
        ceilings: measured in this run; empty on a CPU.
        jobs: in the order in which they ran.
        left_out: what the budget had no time for.
    """

    environment: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    jobs: list[JobResult] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def save(self, file: Path) -> None:
        """Write the results; the file is complete at every moment."""
        save_json(file, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, file: Path) -> Results:
        """Read what `save` wrote.

        Raises:
            ConfigurationError: the file is not of this version.
        """
        content = read_json(file, FORMAT)
        del content["format"]
        jobs = []
        for entry in content.pop("jobs"):
            measured = [Measured(**one | {"candidate": candidate_from(one["candidate"])}) for one in entry["measured"]]
            jobs.append(JobResult(**entry | {"job": Job(**entry["job"]), "measured": measured}))
        return cls(**content, jobs=jobs)
