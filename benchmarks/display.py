"""What a run prints: a live progress bar and tables with rich, plain lines without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from infimm_fast.benchmarks.harness import Progress
from infimm_fast.benchmarks.report import CaseResult, Report, Row

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar

HEADER = ("implementation", "eager ms", "p10-p90", "graph ms", "p10-p90", "TFLOP/s", "of ceiling", "peak MB", "remark")


def table_rows(result: CaseResult) -> list[tuple[str, ...]]:
    """Return the cells below `HEADER`, one line for each implementation; rates are those of its faster launch mode."""
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row.implementation for row in result.rows):
        modes = {row.mode: row for row in result.rows if row.implementation == name}
        eager, graph = modes["eager"], modes.get("graph")
        timed = [row for row in modes.values() if row.median_ms is not None]
        best = min(timed, key=lambda row: row.median_ms or 0.0, default=eager)
        remarks = [
            row.remark if row.mode == "eager" else f"as a graph: {row.remark}" for row in modes.values() if row.remark
        ]
        if eager.pictures_per_s is not None:
            remarks.append(f"{eager.pictures_per_s:.2f} pictures/s")
        if eager.stages:
            remarks.append(", ".join(f"{stage} {time:.3g}" for stage, time in eager.stages.items()))
        lines.append(
            (
                name,
                *_time_cells(eager),
                *(("", "") if graph is None else _time_cells(graph)),
                "" if best.tflops is None else f"{best.tflops:.3g}",
                "" if best.share is None else f"{best.share:.0%}",
                "" if eager.peak_memory_mb is None else f"{eager.peak_memory_mb:.0f}",
                "; ".join(remarks),
            )
        )
    return lines


def _time_cells(row: Row) -> tuple[str, str]:
    if row.median_ms is None:
        return "", ""
    return f"{row.median_ms:.4g}", f"{row.p10_ms:.4g}-{row.p90_ms:.4g}"


def case_title(result: CaseResult) -> str:
    """Return what stands above a case's table."""
    bound = {"matmul": "matrix products", "copy": "memory"}[result.bound]
    gpu = f"; {', '.join(result.gpu.values())}" if result.gpu else ""
    return f"{result.op}, {result.case}, {result.dtype} (bound by {bound}{gpu})"


def ceilings_line(report: Report) -> str:
    """Return the measured ceilings in words, to stand in a sentence."""
    rates = report.ceilings
    return f"ceilings: matrix products {rates['matmul_tflops']:.4g} TFLOP/s, copies {rates['copy_gb_s']:.4g} GB/s"


class Display:
    """Shows a run on the terminal; use as a context manager around it."""

    def __init__(self) -> None:
        self.bar: ProgressBar | None = None
        self.task: Any = None
        self._rich = importlib.util.find_spec("rich") is not None

    def __enter__(self) -> Progress:
        if self._rich:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as ProgressBar

            # A file or a pipe has no width; tables of eighty columns would be unreadable.
            console = Console() if Console().is_terminal else Console(width=180)
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self.bar = ProgressBar(*columns, console=console, transient=True)
            self.bar.start()
        return Progress(self._start, self._case, self._done)

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def print(self, line: str) -> None:
        """Print a line."""
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def _start(self, report: Report, cases: int) -> None:
        environment = report.environment
        self.print(report.title)
        self.print(
            f"{environment['device']}, torch {environment['torch']}, triton {environment['triton'] or 'not installed'}, "
            f"{environment['threads']} threads, commit {environment['commit']}"
        )
        self.print(ceilings_line(report))
        if self.bar is not None:
            self.task = self.bar.add_task("", total=cases)

    def _case(self, name: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=name)

    def _done(self, result: CaseResult, report: Report) -> None:
        if self.bar is not None:
            from rich.markup import escape
            from rich.table import Table

            ours = {row.implementation for row in result.rows if row.ours}
            table = Table(*HEADER, title=escape(case_title(result)), title_justify="left")
            for cells in table_rows(result):
                escaped = [escape(cell) for cell in cells]
                table.add_row(f"[bold]{escaped[0]}[/]" if cells[0] in ours else escaped[0], *escaped[1:])
            self.bar.console.print(table)
            self.bar.advance(self.task)
        else:
            self.print(case_title(result))
            print(plain_table(HEADER, table_rows(result)), flush=True)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns of text, as wide as they need to be."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
