"""Run compute-sanitizer over every Triton kernel: ``python -m infimm_fast.benchmarks.sanitize --out FOLDER``.

Each tool watches each small case of `one_launch` in a process of its own, several at a time, with PyTorch's caching
allocator switched off: inside its large blocks a read beside a tensor would stay unseen. The verdicts land in
``FOLDER/sanitize.json``. What could not be run is listed as "not run" with the reason, and never counts as clean.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from infimm_fast.benchmarks.one_launch import CASES
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

PROGRAM = "compute-sanitizer"
# In the order of what they find in kernels without atomics: where time is short, the last ones are left out.
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Memory beside every allocation, so that a stray access does not land in the next one. PyTorch asks the driver questions
# whose answer is an error; those are not the kernels'.
_OPTIONS = {"memcheck": ["--padding", "65536", "--report-api-errors", "no"]}
# The exit status that the tool gives for errors; the program itself ends with 0, 1 or 2, or by a signal.
_ERROR_STATUS = 99
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?")
_RACES = re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
# The tool's own words where it watches nothing; it counts such a refusal as errors of the program.
_REFUSAL = re.compile(
    r"^=+ *(?:Error: *)?"
    r"(.*(?:Device not supported|Failed to initialize|Internal Sanitizer Error|unrecogni[sz]ed option).*)$",
    re.IGNORECASE | re.MULTILINE,
)
_SHOWN_LINES = 60


@dataclass(frozen=True)
class Verdict:
    """What one tool says about one case.

    Attributes:
        tool: one of `TOOLS`, or "check" for the case run without any.
        case: name of the case.
        outcome: "clean", "errors", "failed" (the program itself) or "not run".
        errors: that the tool counts, or None.
        warnings: of racecheck, or None.
        status: exit status, or None if it was ended or never begun.
        seconds: how long it took.
        words: why it is not clean.
    """

    tool: str
    case: str
    outcome: str
    errors: int | None = None
    warnings: int | None = None
    status: int | None = None
    seconds: float = 0.0
    words: str = ""


def judge(tool: str, case: str, finished: Finished) -> Verdict:
    """Read a tool's output: a summary of no errors counts only if the program succeeded too."""
    seconds = round(finished.seconds, 1)
    if finished.status is None:
        return Verdict(tool, case, "not run", seconds=seconds, words="ended: no time left")
    refusal = _REFUSAL.search(finished.output)
    if refusal:
        return Verdict(tool, case, "not run", status=finished.status, seconds=seconds, words=refusal[1].strip())
    races, summary = _RACES.search(finished.output), _SUMMARY.search(finished.output)
    if races is None and summary is None:
        return Verdict(tool, case, "not run", status=finished.status, seconds=seconds, words=finished.last_line)
    errors = int(races[1]) if races else int(summary[1]) if summary else 0
    warnings = int(races[2]) if races else None
    outcome = "errors" if errors else "failed" if finished.status else "clean"
    words = {"errors": _first_complaint, "failed": _last_words, "clean": lambda output: ""}[outcome](finished.output)
    return Verdict(tool, case, outcome, errors, warnings, finished.status, seconds, words)


def _first_complaint(output: str) -> str:
    """Return the first line of the tool that is not its title."""
    for line in output.splitlines():
        text = line.lstrip("= ").strip()
        if line.startswith("=====") and text and not text.startswith("COMPUTE-SANITIZER"):
            return text
    return ""


def _last_words(output: str) -> str:
    """Return the last line of the program itself."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("=====")]
    return lines[-1] if lines else "ended without a word"


def sanitize(tools: Sequence[str], names: Sequence[str], deadline: Deadline, workers: int) -> list[Verdict]:
    """Return the verdicts of all tools on all cases; the output of whatever is not clean is printed.

    Args:
        tools: some of `TOOLS`.
        names: of small cases of `one_launch`.
        deadline: what is not begun before it is not run.
        workers: processes at a time.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        return [Verdict(tool, name, "not run", words=f"{PROGRAM} is not installed") for tool in tools for name in names]
    verdicts = []
    for name, finished in warm_up(names, deadline, workers).items():
        if finished.status != 0:
            verdicts.append(_checked_alone(name, finished))

    def run(job: tuple[str, str]) -> Verdict:
        tool, name = job
        left = deadline.left()
        if left < START_SECONDS:
            return Verdict(tool, name, "not run", words="no time left")
        command = [program, "--tool", tool, "--error-exitcode", str(_ERROR_STATUS), *_OPTIONS.get(tool, [])]
        finished = run_process([*command, *one_launch(name)], left, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        verdict = judge(tool, name, finished)
        if verdict.outcome != "clean":
            lines = "\n".join(finished.output.splitlines()[:_SHOWN_LINES])
            print(f"--- {tool}, {name}: {verdict.outcome}\n{lines}", flush=True)
        return verdict

    with ThreadPoolExecutor(workers) as pool:
        return verdicts + list(pool.map(run, [(tool, name) for tool in tools for name in names]))


def _checked_alone(name: str, finished: Finished) -> Verdict:
    """Return the verdict on a case that did not succeed without any tool."""
    print(f"--- without a tool, {name}\n{finished.output}", flush=True)
    seconds = round(finished.seconds, 1)
    if finished.status is None:
        return Verdict("check", name, "not run", seconds=seconds, words="ended: no time left")
    return Verdict("check", name, "failed", status=finished.status, seconds=seconds, words=finished.last_line)


def exit_status(verdicts: Sequence[Verdict]) -> int:
    """Return 1 if anything is wrong, else 3 if anything was not run, else 0."""
    outcomes = {verdict.outcome for verdict in verdicts}
    if outcomes & {"errors", "failed"}:
        return FAILED
    return NOT_RUN if "not run" in outcomes or not outcomes else PASSED


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print one line for each tool, and one for everything that is not clean."""
    for tool in dict.fromkeys(verdict.tool for verdict in verdicts):
        counts = [verdict.outcome for verdict in verdicts if verdict.tool == tool]
        warnings = sum(verdict.warnings or 0 for verdict in verdicts if verdict.tool == tool)
        parts = [f"{counts.count(outcome)} {outcome}" for outcome in ("clean", "errors", "failed", "not run")]
        print(f"{tool}: {', '.join(parts)}" + (f"; {warnings} warnings" if warnings else ""))
    rest = [verdict for verdict in verdicts if verdict.outcome != "clean"]
    if rest:
        print_table(
            ("tool", "case", "outcome", "words"),
            [(verdict.tool, verdict.case, verdict.outcome, verdict.words[:120]) for verdict in rest],
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see `exit_status`."""
    parser = argparse.ArgumentParser(prog="python -m infimm_fast.benchmarks.sanitize", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of sanitize.json")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes at a time")
    options = parser.parse_args(arguments)
    verdicts = sanitize(options.tools, options.cases, Deadline(options.budget), options.workers)
    save_json(options.out / "sanitize.json", {"verdicts": [asdict(verdict) for verdict in verdicts]})
    print_verdicts(verdicts)
    return exit_status(verdicts)


if __name__ == "__main__":
    raise SystemExit(main())
