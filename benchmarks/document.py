"""Write docs/performance.md and its pictures from the stored runs: ``python -m infimm_fast.benchmarks.document``.

Store a run by copying its JSON file to benchmarks/results/. No figure on the page is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from infimm_fast.benchmarks.display import HEADER, case_title, ceilings_line, table_rows
from infimm_fast.benchmarks.report import FORMAT, CaseResult, Report

RESULTS, PAGE, IMAGES = "benchmarks/results", "docs/performance.md", "docs/images/performance"
PICTURES = {
    "bars": "Times of all implementations on the main cases",
    "roofline": "Rates against what the device can do",
    "scaling": "Times over tiles, batch and text length",
    "stages": "Stages of the whole model",
}

_HEAD = """\
<!-- Written by `python -m infimm_fast.benchmarks.document` from benchmarks/results/; changes by hand are lost. -->

# Performance

## How the figures are made

`infimm-fast bench all --plot` makes a run on your machine; `infimm-fast bench compare A.json B.json` compares two, or two
git revisions. One harness does it all:

- **Correct first.** Every implementation is compared with the plain statement in fp64 on the inputs that are timed (on a
  part of them where fp64 would not fit: two tiles; 64 text tokens of two rows) and may err twice as much as the plain
  statement in the same precision. One that errs more gets no time, and the command fails. Stages of the model are gated
  on their ops, on a full-width model of two layers against a wider precision, and on the RMS deviation from the SDPA model
  in the same precision.
- **Same inputs, same layouts, one launch mode in a column.** *Eager* is a call from Python between two CUDA events. *Graph*
  is the replay of a CUDA graph that holds one run on each set of inputs, divided by their number. On a CPU there is no
  graph, times are those of `time.perf_counter`, and the process keeps to as many cores as it has threads. Stages that
  begin on the host (`preprocess`, `end_to_end`) are timed on its clock on every device.
- **Cold caches.** As many sets of inputs rotate as make three times the size of the last-level cache (64 at most; two on a
  CPU).
- **Medians**, with the times that a tenth of the runs stayed below and above (p10-p90).
- **Ceilings** are measured in the same run: the fastest large matrix product, and the copy of a large buffer (bytes read
  and written). FLOPs are counted on true sizes, bytes are the fewest that must move; *of ceiling* is the least possible
  time by the ceiling that binds the case, over the measured median.
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
    parts = [_HEAD]
    if not any(report.environment["kind"] == "cuda" for report in reports.values()):
        parts.append(_NO_GPU)
    parts += [_render_report(name, report) for name, report in reports.items()]
    return "\n".join(parts)


def _render_report(name: str, report: Report) -> str:
    environment = report.environment
    versions = ", ".join(
        f"{label} {environment[key]}"
        for key, label in (
            ("torch", "torch"),
            ("triton", "triton"),
            ("transformers", "transformers"),
            ("cuda", "CUDA"),
            ("cudnn", "cuDNN"),
            ("python", "Python"),
        )
        if environment[key]
    )
    lines = [
        f"## {report.title}",
        "",
        f"{environment['device']}, {environment['threads']} threads; {versions}; commit {environment['commit']}. "
        f"Measured {ceilings_line(report)}.",
        "",
        f"All rows, errors and settings: [{name}.json](../{RESULTS}/{name}.json).",
        "",
    ]
    for picture in drawable(report):
        target = f"{IMAGES.removeprefix('docs/')}/{picture_stem(name)}{picture}.png"
        lines += [f"![{PICTURES[picture]}]({target})", ""]
    main = [case for case in report.cases if case.importance == 0]
    other = [case for case in report.cases if case.importance > 0]
    lines += [_render_case(case) for case in main]
    if other:
        lines += [
            "<details><summary>All other cases</summary>",
            "",
            *(_render_case(case) for case in other),
            "</details>",
            "",
        ]
    if report.left_out:
        lines += ["Left out, since the time budget of the run ended: " + "; ".join(report.left_out) + ".", ""]
    return "\n".join(lines)


def drawable(report: Report) -> list[str]:
    """Return which of `PICTURES` a report has figures for."""
    from infimm_fast.benchmarks.plot import draw_bars, draw_roofline, draw_scaling, draw_stages

    drawings = {"bars": draw_bars, "roofline": draw_roofline, "scaling": draw_scaling, "stages": draw_stages}
    return [name for name, draw in drawings.items() if draw(report) is not None]


def _render_case(case: CaseResult) -> str:
    rows = table_rows(case)
    # A column without a single figure (graphs and memory on a CPU) only takes room.
    kept = [column for column in range(len(HEADER)) if column == 0 or any(row[column] for row in rows)]
    table = [_markdown_row([HEADER[column] for column in kept]), _markdown_row(["---"] * len(kept))]
    table += [_markdown_row([row[column] for column in kept]) for row in rows]
    return "\n".join([f"**{case_title(case)}**", "", *table, ""])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    """Write the page and the pictures."""
    parser = argparse.ArgumentParser(prog="python -m infimm_fast.benchmarks.document", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="of the checkout; the current folder")
    root = parser.parse_args(arguments).root
    from infimm_fast.benchmarks.plot import draw_report

    reports = stored_reports(root / RESULTS)
    for name, report in reports.items():
        draw_report(report, root / IMAGES, picture_stem(name))
    page = root / PAGE
    partial = page.with_name(f".{page.name}.partial")
    partial.write_text(render(reports))
    partial.replace(page)
    print(f"written: {page} from {len(reports)} runs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
