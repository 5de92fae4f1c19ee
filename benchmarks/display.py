"""Tables on a terminal: with rich where it is installed, as plain columns on a machine that has little else than a GPU."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from infimm_fast.benchmarks.report import CaseResult, Row

_HEADER = ("implementation", "eager ms", "p10-p90", "graph ms", "p10-p90", "TFLOP/s", "of ceiling", "peak MB", "remark")


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", bold: Collection[str] = ()
) -> None:
    """Print a table.

    Args:
        title: above it.
        header: names of the columns.
        rows: cells.
        caption: below it.
        bold: first cells of rows that stand out.
    """
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (header, *rows)]
        print("\n".join(line for line in (title, *lines, caption) if line), flush=True)
        return
    # A file or a pipe has no width; tables of eighty columns would break every line.
    plain = not Console().is_terminal and "COLUMNS" not in os.environ
    table = Table(*header, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[0] in bold else None)
    above = [Text(title, style="bold")] if title else []
    Console(width=180 if plain else None).print(*above, table, Text(caption), sep="\n")


def show_case(result: CaseResult) -> None:
    """Print the rows of one case; its name stands above already."""
    ours = {row.implementation for row in result.rows if row.ours}
    print_table("", *case_table(result), bound_line(result), ours)


def case_table(result: CaseResult) -> tuple[list[str], list[list[str]]]:
    """Return header and cells, one line for each implementation; rates are those of its faster launch mode.

    A column without a single figure (graphs and memory on a CPU) only takes room, and is left out.
    """
    names = dict.fromkeys(row.implementation for row in result.rows)
    lines = [_cells([row for row in result.rows if row.implementation == name]) for name in names]
    kept = [index for index in range(len(_HEADER)) if index == 0 or any(line[index] for line in lines)]
    return [_HEADER[index] for index in kept], [[line[index] for index in kept] for line in lines]


def _cells(rows: list[Row]) -> list[str]:
    modes = {row.mode: row for row in rows}
    eager = modes["eager"]
    best = min((row for row in rows if row.median_ms), key=lambda row: row.median_ms or 0.0, default=eager)
    remarks = [row.remark if row.mode == "eager" else f"as a graph: {row.remark}" for row in rows if row.remark]
    if best.share is not None and best.share > 1:
        remarks.append("ABOVE the measured ceiling")
    if eager.pictures_per_s is not None:
        remarks.append(f"{eager.pictures_per_s:.2f} pictures/s")
    if eager.stages:
        remarks.append(", ".join(f"{stage} {time:.3g}" for stage, time in eager.stages.items()))
    rates = [
        "" if best.tflops is None else f"{best.tflops:.3g}",
        "" if best.share is None else f"{best.share:.0%}",
        "" if eager.peak_memory_mb is None else f"{eager.peak_memory_mb:.0f}",
    ]
    return [eager.implementation, *_times(eager), *_times(modes.get("graph")), *rates, "; ".join(remarks)]


def _times(row: Row | None) -> tuple[str, str]:
    if row is None or row.median_ms is None:
        return "", ""
    return f"{row.median_ms:.4g}", f"{row.p10_ms:.4g}-{row.p90_ms:.4g}"


def bound_line(result: CaseResult) -> str:
    """Return what binds a case, and the state of the GPU after it."""
    return ", ".join([f"bound by {'matrix products' if result.bound == 'matmul' else 'memory'}", *result.gpu.values()])
