"""The figures of docs/performance.md and its pictures, made from the stored runs: ``infimm-fast bench page``.

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
from infimm_fast.export.common.artifact import writing

RESULTS, PAGE, IMAGES = "benchmarks/results", "docs/performance.md", "docs/images/performance"
_VERSIONS = {"torch": "torch", "triton": "triton", "transformers": "transformers"}
_VERSIONS |= {"cuda": "CUDA", "cudnn": "cuDNN", "python": "Python"}

MARK = """\
<!-- What follows is written by `infimm-fast bench page` from benchmarks/results/; changes by hand are lost. -->
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


def update_page(page: str, reports: dict[str, Report]) -> str:
    """Return the page with everything after the mark made anew."""
    return page.partition(MARK)[0] + MARK + "\n" + render(reports)


def render(reports: dict[str, Report]) -> str:
    """Return the figures of all runs."""
    on_gpu = any(report.environment["kind"] == "cuda" for report in reports.values())
    return "\n".join([*([] if on_gpu else [_NO_GPU]), *(_render(name, report) for name, report in reports.items())])


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
    return f"**{case.op}, {case.case}, {case.dtype}** ({bound_line(case)})\n\n{markdown_table(*case_table(case))}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], rule: str = "---") -> str:
    """Return a table; `rule` aligns the columns behind the first."""
    lines = [header, ["---", *[rule] * (len(header) - 1)], *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_page(root: Path) -> None:
    """Write the page and the pictures of a checkout."""
    reports = stored_reports(root / RESULTS)
    for name, report in reports.items():
        draw_report(report, root / IMAGES, picture_stem(name))
    page = root / PAGE
    with writing(page) as partial:
        partial.write_text(update_page(page.read_text(), reports))
    print(f"written: {page} from {len(reports)} runs")
