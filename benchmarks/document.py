"""docs/performance.md and its pictures, made from the stored runs: ``infimm-fast bench page``.

Store a run by copying its JSON file to benchmarks/results/. No figure on the page is typed by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from infimm_fast.benchmarks.display import bound_line, case_table
from infimm_fast.benchmarks.plot import DRAWINGS, draw_report
from infimm_fast.benchmarks.report import FORMAT, CaseResult, Report

RESULTS, PAGE, IMAGES = "benchmarks/results", "docs/performance.md", "docs/images/performance"
_VERSIONS = {"torch": "torch", "triton": "triton", "transformers": "transformers"}
_VERSIONS |= {"cuda": "CUDA", "cudnn": "cuDNN", "python": "Python"}

_HEAD = """\
<!-- Written by `infimm-fast bench page` from benchmarks/results/; changes by hand are lost. -->

# Performance

## How the figures are made

`infimm-fast bench all --plot` makes a run on your machine; `infimm-fast bench compare A.json B.json` compares two, or two
git revisions. One harness does it all:

- **Correct first.** Every implementation is compared with the plain statement in float64 on the inputs that are timed (on a
  part of them where float64 would not fit: two tiles; 64 text tokens of two rows) and may err twice as much as the plain
  statement in the same precision. One that errs more gets no time, and the command fails. Stages of the model are gated
  on their ops, on a full-width model of two layers against a wider precision, and on the RMS deviation from the SDPA model
  in the same precision.
- **Same inputs, same layouts, one launch mode per column.** *Eager* is a call from Python between two CUDA events. *Graph*
  is the replay of a CUDA graph that holds one run on each set of inputs, divided by their number. On a CPU there is no
  graph, times are those of `time.perf_counter`, and the process keeps to as many cores as it has threads. Stages that
  begin on the host (`preprocess`, `end_to_end`) are timed on its clock on every device.
- **Cold caches.** As many sets of inputs rotate as it takes to fill the last-level cache three times (64 at most; two on a
  CPU).
- **Medians**, with the times that a tenth of the runs stayed below and above (p10-p90).
- **Ceilings** are measured in the same run: the fastest large matrix product, and the copy of a large buffer (bytes read
  and written). FLOPs are counted on true sizes, bytes are the fewest that must move; *of ceiling* is the least possible
  time by the ceiling that binds the case, over the measured median. A figure above 100 % makes the ceilings be measured
  again, and is marked if it stays there: such a case finds its data in a cache.
- **Peers** get their masks, padded copies and compiled functions beforehand. One that is missing or does not run is listed
  with the reason, never left out.
"""

_NO_GPU = """\
**There are no figures of a GPU yet.** The runs below are of a CPU and a tiny preset; they show that the harness works, and
say nothing about how fast any kernel is on a GPU.
"""


def stored_reports(results: Path) -> dict[str, Report]:
    """Return the reports in a folder by the names of their files; other JSON files are passed over."""
    files = [file for file in sorted(results.glob("*.json")) if json.loads(file.read_text()).get("format") == FORMAT]
    return {file.stem: Report.load(file) for file in files}


def picture_stem(name: str) -> str:
    """Return what the names of a report's pictures begin with."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name).lower() + "-"


def render(reports: dict[str, Report]) -> str:
    """Return the page."""
    on_gpu = any(report.environment["kind"] == "cuda" for report in reports.values())
    return "\n".join([_HEAD, *([] if on_gpu else [_NO_GPU]), *(_render(name, report) for name, report in reports.items())])


def _render(name: str, report: Report) -> str:
    where = report.environment
    versions = ", ".join(f"{label} {where[key]}" for key, label in _VERSIONS.items() if where[key])
    lines = [
        f"## {report.title}",
        "",
        f"{where['device']}, {where['threads']} threads; {versions}; commit {where['commit']}. "
        f"Measured {report.ceilings_line}.",
        "",
        f"All rows, errors and settings: [{name}.json](../{RESULTS}/{name}.json).",
        "",
    ]
    for picture, (draw, words) in DRAWINGS.items():
        if draw(report) is not None:
            lines += [f"![{words}]({IMAGES.removeprefix('docs/')}/{picture_stem(name)}{picture}.png)", ""]
    lines += [_render_case(case) for case in report.cases if case.importance == 0]
    if other := [_render_case(case) for case in report.cases if case.importance > 0]:
        lines += ["<details><summary>All other cases</summary>", "", *other, "</details>", ""]
    if report.left_out:
        lines += ["Left out, since the time budget of the run ended: " + "; ".join(report.left_out) + ".", ""]
    return "\n".join(lines)


def _render_case(case: CaseResult) -> str:
    header, rows = case_table(case)
    lines = [
        f"**{case.op}, {case.case}, {case.dtype}** ({bound_line(case)})",
        "",
        _line(header),
        _line(["---"] * len(header)),
    ]
    return "\n".join([*lines, *map(_line, rows), ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_page(root: Path) -> None:
    """Write the page and the pictures of a checkout."""
    reports = stored_reports(root / RESULTS)
    for name, report in reports.items():
        draw_report(report, root / IMAGES, picture_stem(name))
    page = root / PAGE
    partial = page.with_name(f".{page.name}.partial")
    partial.write_text(render(reports))
    partial.replace(page)
    print(f"written: {page} from {len(reports)} runs")
