"""Pictures of a run: bars against each peer, a roofline, scaling, and where the time of the whole model goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from infimm_fast.benchmarks.report import CaseResult, Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind people can tell apart.
_OURS = ("#0072B2", "#56B4E9", "#003F63")
_NAIVE = ("#8A8A8A", "#555555", "#BBBBBB")
_PEERS = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#B8A900")
_STAGES = ("#F0E442", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#0072B2")
_MARKERS = "osD^vPX*<>ph"
# Beyond this many panels nobody reads a picture.
_MAX_PANELS = 12
_MAX_LINES = 6


def draw_report(report: Report, folder: Path, stem: str = "") -> list[Path]:
    """Draw whatever a run has figures for.

    Args:
        report: the run.
        folder: of the PNG files.
        stem: put before their names.

    Returns:
        The files.
    """
    drawings: dict[str, Callable[[Report], Figure | None]] = {
        "bars": draw_bars,
        "roofline": draw_roofline,
        "scaling": draw_scaling,
        "stages": draw_stages,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in drawings.items():
        figure = draw(report)
        if figure is not None:
            file = folder / f"{stem}{name}.png"
            partial = file.with_name(f".{file.name}.partial")
            figure.savefig(partial, format="png", dpi=90)
            partial.replace(file)
            files.append(file)
    return files


def _figure(width: float, height: float, title: str) -> Figure:
    # Without pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def _panels(figure: Figure, count: int, columns: int) -> list[Axes]:
    rows = -(-count // columns)
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return axes[:count]


def _fastest(case: CaseResult) -> dict[str, Row]:
    """Return the timed row of each implementation in its faster launch mode."""
    rows: dict[str, Row] = {}
    for row in case.rows:
        known = rows.get(row.implementation)
        if row.median_ms is not None and (known is None or row.median_ms < (known.median_ms or 0.0)):
            rows[row.implementation] = row
    return rows


def _colours(report: Report) -> dict[str, str]:
    """Return one colour for each implementation, the same in all pictures of a run."""
    names = dict.fromkeys((row.implementation, row.ours) for case in report.cases for row in case.rows)
    colours: dict[str, str] = {}
    used: dict[tuple[str, ...], int] = {}
    for name, ours in names:
        palette = _OURS if ours else _NAIVE if name.startswith("naive") else _PEERS
        colours.setdefault(name, palette[used.get(palette, 0) % len(palette)])
        used[palette] = used.get(palette, 0) + 1
    return colours


def draw_bars(report: Report) -> Figure | None:
    """Draw times of all implementations on the main cases; solid bars are graph replays where there are any."""
    cases = [case for case in report.cases if case.importance == 0 and _fastest(case)][:_MAX_PANELS]
    if not cases:
        return None
    columns = min(3, len(cases))
    most = max(len(_fastest(case)) for case in cases)
    rows = -(-len(cases) // columns)
    figure = _figure(5.6 * columns, rows * (1.1 + 0.34 * most) + 0.6, f"Time of one run: {report.title}")
    colours = _colours(report)
    for axes, case in zip(_panels(figure, len(cases), columns), cases, strict=True):
        names = list(_fastest(case))
        for place, name in enumerate(names):
            modes = {row.mode: row for row in case.rows if row.implementation == name and row.median_ms is not None}
            for mode, row in modes.items():
                both = len(modes) == 2
                offset = (0.2 if mode == "graph" else -0.2) if both else 0.0
                assert row.median_ms is not None and row.p10_ms is not None and row.p90_ms is not None
                spread = [[max(0.0, row.median_ms - row.p10_ms)], [max(0.0, row.p90_ms - row.median_ms)]]
                axes.barh(
                    place + offset,
                    row.median_ms,
                    0.36 if both else 0.66,
                    xerr=spread,
                    color=colours[name],
                    alpha=0.55 if mode == "eager" and both else 1.0,
                    error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
                )
                reach = max(row.median_ms, row.p90_ms)
                axes.annotate(
                    f"{row.median_ms:.3g}",
                    (reach, place + offset),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(max(len(names), 3) - 0.5, -0.5)
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.set_xlabel("ms, median with p10-p90", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(_wrap(f"{case.op}: {case.case}"), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_roofline(report: Report) -> Figure | None:
    """Draw the rate of our fastest, the fastest peer's and the naive path against the intensity of the main cases."""
    points = [(case, _fastest(case)) for case in report.cases if case.importance == 0 and _fastest(case)]
    if not points:
        return None
    figure = _figure(9, 5.6, f"Roofline: {report.title}")
    axes = figure.subplots()
    peak, bandwidth = report.ceilings["matmul_tflops"], report.ceilings["copy_gb_s"] / 1e3
    intensities = [case.flops / case.bytes for case, _ in points]
    ridge = peak / bandwidth
    low, high = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
    line = [low, ridge, high]
    axes.plot(line, [min(peak, bandwidth * x) for x in line], color="#222222", linewidth=1.4)
    axes.annotate(
        f"matrix products {peak:.3g} TFLOP/s", (high, peak), (-4, 4), textcoords="offset points", ha="right", fontsize=9
    )
    label = f"copies {bandwidth * 1e3:.0f} GB/s"
    axes.annotate(label, (low * 1.5, bandwidth * low * 1.5), (8, 0), textcoords="offset points", va="top", fontsize=9)
    markers = {name: _MARKERS[index % len(_MARKERS)] for index, name in enumerate(dict.fromkeys(c.op for c, _ in points))}
    kinds = {"ours": _OURS[0], "fastest peer": _PEERS[0], "naive": _NAIVE[0]}
    for case, rows in points:
        groups = {
            "ours": [row for row in rows.values() if row.ours],
            "naive": [row for row in rows.values() if not row.ours and row.implementation.startswith("naive")],
            "fastest peer": [row for row in rows.values() if not row.ours and not row.implementation.startswith("naive")],
        }
        for kind, group in groups.items():
            rate = max((row.tflops or 0.0 for row in group), default=0.0)
            if rate:
                style = {"color": kinds[kind], "marker": markers[case.op], "markersize": 6, "alpha": 0.85}
                axes.plot(case.flops / case.bytes, rate, linestyle="", **style)  # type: ignore[arg-type]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel("TFLOP/s on true sizes")
    handles = [axes.plot([], [], "s", color=colour, label=kind)[0] for kind, colour in kinds.items()]
    handles += [axes.plot([], [], marker, color="#555555", linestyle="", label=op)[0] for op, marker in markers.items()]
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.grid(alpha=0.25)
    return figure


def draw_scaling(report: Report) -> Figure | None:
    """Draw times over tiles, batch or text length, for series of two points or more."""
    series: dict[tuple[str, str, str], dict[int, CaseResult]] = {}
    for case in report.cases:
        for name, axis, value in case.series if _fastest(case) else ():
            series.setdefault((case.op, name, axis), {})[value] = case
    series = {key: dict(sorted(cases.items())) for key, cases in series.items() if len(cases) > 1}
    if not series:
        return None
    columns = min(4, len(series))
    rows = -(-len(series) // columns)
    figure = _figure(4.6 * columns, 3.5 * rows + 0.5, f"Scaling: {report.title}")
    colours = _colours(report)
    for axes, ((op, name, axis), cases) in zip(_panels(figure, len(series), columns), series.items(), strict=True):
        _draw_series(axes, cases, colours)
        axes.set_xlabel(axis, fontsize=8)
        axes.set_title(_wrap(f"{op}: {name}"), fontsize=9)
    return figure


def _draw_series(axes: Axes, cases: dict[int, CaseResult], colours: dict[str, str]) -> None:
    """Draw one line for each implementation over the values of an axis."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    for index, implementation in enumerate(_lines(list(cases.values()))):
        times = {value: row.median_ms for value, case in cases.items() if (row := _fastest(case).get(implementation))}
        axes.plot(
            list(times),
            [time or 0.0 for time in times.values()],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=1.2,
            color=colours[implementation],
            label=implementation,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(list(cases), [str(value) for value in cases], fontsize=8)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylabel("ms", fontsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)


def _lines(cases: list[CaseResult]) -> list[str]:
    """Return the implementations to draw: ours, the naive path, and the fastest peers of the last case."""
    rows = _fastest(cases[-1])
    ours = [name for name, row in rows.items() if row.ours]
    peers = sorted((name for name, row in rows.items() if not row.ours), key=lambda name: rows[name].median_ms or 0.0)
    naive = [name for name in peers if name == "naive"]
    others = [name for name in peers if name != "naive"]
    return naive + others[: max(0, _MAX_LINES - len(ours) - len(naive))] + ours


def draw_stages(report: Report) -> Figure | None:
    """Draw where the time to the first token goes, and how long each further token takes."""
    cases = [case for case in report.cases if case.section == "e2e" and any(row.stages for row in case.rows)]
    if not cases:
        return None
    most = max(sum(bool(row.stages) for row in case.rows) for case in cases)
    figure = _figure(12, len(cases) * (1.2 + 0.36 * most) + 0.9, f"The whole model, stage by stage: {report.title}")
    grid = figure.subplots(len(cases), 2, squeeze=False, width_ratios=(3, 1))
    stages = list(dict.fromkeys(stage for case in cases for row in case.rows for stage in row.stages if stage != "token"))
    colours = dict(zip(stages, _STAGES, strict=False))
    for (whole, token), case in zip(grid, cases, strict=True):
        rows = [row for row in case.rows if row.stages]
        for place, row in enumerate(rows):
            left = 0.0
            for stage in stages:
                whole.barh(place, row.stages.get(stage, 0.0), 0.62, left=left, color=colours[stage])
                left += row.stages.get(stage, 0.0)
            whole.annotate(f"{left:.3g}", (left, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
            token.barh(place, row.stages["token"], 0.62, color=_OURS[0] if row.ours else _NAIVE[0])
            token.annotate(
                f"{row.stages['token']:.3g}",
                (row.stages["token"], place),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        whole.set_yticks(range(len(rows)), [row.implementation for row in rows], fontsize=8)
        token.set_yticks([])
        whole.set_title(case.case, fontsize=9)
        token.set_title("each further token", fontsize=9)
        for axes in (whole, token):
            axes.invert_yaxis()
            axes.margins(x=0.14)
            axes.set_xlim(left=0)
            axes.set_xlabel("ms", fontsize=8)
            axes.tick_params(axis="x", labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    handles = [grid[0][0].barh([0], [0], color=colours[stage], label=stage) for stage in stages]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(stages), fontsize=8, frameon=False)
    return figure


def _wrap(title: str, width: int = 52) -> str:
    """Break a title at a space before it runs into its neighbour's."""
    import textwrap

    return "\n".join(textwrap.wrap(title, width))
