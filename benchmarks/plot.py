"""Pictures of a run: bars against each peer, a roofline, scaling, and where the time of the whole model goes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from infimm_fast.benchmarks.report import CaseResult, Report, Row
from infimm_fast.export.common.artifact import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind people can tell apart.
_PALETTES = {
    "ours": ("#0072B2", "#56B4E9", "#003F63"),
    "fastest peer": ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#B8A900"),
    "naive": ("#8A8A8A", "#555555", "#BBBBBB"),
}
_STAGES = ("#F0E442", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#0072B2")
_MARKERS = "osD^vPX*<>ph"
# Beyond this many panels nobody reads a picture.
_MAX_PANELS = 12
_MAX_LINES = 6
# Bars so many times as long as half of the others or more are cut off, or the others could not be told apart.
_OUTLIER = 2.5


def draw_report(report: Report, folder: Path, stem: str = "") -> list[Path]:
    """Draw whatever a run has figures for.

    Args:
        report: the run.
        folder: of the PNG files.
        stem: put before their names.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (draw, _) in DRAWINGS.items():
        if (figure := draw(report)) is not None:
            files.append(folder / f"{stem}{name}.png")
            with writing(files[-1]) as partial:
                figure.savefig(partial, format="png", dpi=90)
    return files


def _figure(width: float, height: float, title: str) -> Figure:
    # Without pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, int(width * 11))), fontsize=11)
    return figure


def _panels(figure: Figure, titles: Iterable[str], columns: int, width: float) -> list[Axes]:
    """Return one panel for each title, which is broken before it runs out of the panel's width in inches."""
    titles = list(titles)
    axes = list(figure.subplots(-(-len(titles) // columns), columns, squeeze=False).flat)
    for panel, title in zip(axes, titles, strict=False):
        _title(panel, "\n".join(textwrap.wrap(title, int(width * 12))))
    for unused in axes[len(titles) :]:
        unused.remove()
    return axes[: len(titles)]


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    for one in (axes.xaxis, axes.yaxis):
        one.label.set_fontsize(8)


def _fastest(case: CaseResult) -> dict[str, Row]:
    """Return the timed row of each implementation in its faster launch mode."""
    rows: dict[str, Row] = {}
    for row in sorted(case.rows, key=lambda row: row.median_ms or 0.0, reverse=True):
        if row.median_ms:
            rows[row.implementation] = row
    names = dict.fromkeys(row.implementation for row in case.rows)
    return {name: rows[name] for name in names if name in rows}


def _kind(row: Row) -> str:
    if row.ours:
        return "ours"
    return "naive" if row.implementation.startswith("naive") else "fastest peer"


def _colours(report: Report) -> dict[str, str]:
    """Return one colour for each implementation, the same in all pictures of a run."""
    palettes = {kind: cycle(palette) for kind, palette in _PALETTES.items()}
    rows = {row.implementation: row for case in report.cases for row in case.rows}
    return {name: next(palettes[_kind(row)]) for name, row in rows.items()}


def _markers(names: Iterable[str]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(names), cycle(_MARKERS), strict=False))


def _draw_bars(axes: Axes, bars: Sequence[tuple[float, float, str]], height: float) -> None:
    """Draw bars of (place, length, colour), each with its length beside it; one too long is cut off and says so."""
    lengths = sorted(length for _, length, _ in bars)
    jumps = (index for index in range(1, len(lengths)) if lengths[index] > _OUTLIER * lengths[index - 1])
    end = 1.3 * lengths[next((index for index in jumps if 2 * index >= len(lengths)), 0) - 1]
    for place, length, colour in bars:
        cut = length > end
        axes.barh(place, min(length, 0.98 * end), height, color=colour, hatch="//" if cut else None, edgecolor="white")
        where, side, words = (0.97 * end, "right", f"{length:.3g} ▶") if cut else (length, "left", f"{length:.3g}")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0} if cut else None
        offset = (0 if cut else 3, 0)
        axes.annotate(words, (where, place), offset, textcoords="offset points", ha=side, va="center", fontsize=7, bbox=box)
    axes.set_xlim(0, end)
    axes.spines[["top", "right"]].set_visible(False)


def draw_bars(report: Report) -> Figure | None:
    """Draw times of all implementations on the main cases; solid bars are graph replays where there are any."""
    cases = [case for case in report.cases if case.importance == 0 and _fastest(case)][:_MAX_PANELS]
    if not cases:
        return None
    columns, most = min(3, len(cases)), max(len(_fastest(case)) for case in cases)
    rows = -(-len(cases) // columns)
    figure = _figure(5.6 * columns, rows * (1.3 + 0.34 * most) + 0.6, f"Time of one run: {report.title}")
    colours = _colours(report)
    panels = _panels(figure, (f"{case.op}: {case.case}" for case in cases), columns, 4.2)
    for axes, case in zip(panels, cases, strict=True):
        names = list(_fastest(case))
        both = any(row.mode == "graph" and row.median_ms for row in case.rows)
        timed = [(names.index(row.implementation), row) for row in case.rows if row.median_ms]
        places = [place + (0.2 if row.mode == "graph" else -0.2) * both for place, row in timed]
        shades = [colours[row.implementation] + ("8C" if both and row.mode == "eager" else "") for _, row in timed]
        medians = [row.median_ms or 0.0 for _, row in timed]
        _draw_bars(axes, list(zip(places, medians, shades, strict=True)), 0.36 if both else 0.66)
        for place, (_, row) in zip(places, timed, strict=True):
            # Inside the bar's lower edge, where no figure stands.
            for colour, width in (("white", 2.6), ("#222222", 1.0)):
                axes.plot([row.p10_ms or 0.0, row.p90_ms or 0.0], [place + 0.14] * 2, color=colour, linewidth=width)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(max(len(names), 3) - 0.5, -0.5)
        axes.set_xlabel("ms: bar and figure median, line p10 to p90")
    return figure


def draw_roofline(report: Report) -> Figure | None:
    """Draw the rate of our fastest, the fastest peer's and the naive path against the intensity of the main cases."""
    points = [(case, _fastest(case)) for case in report.cases if case.importance == 0 and _fastest(case)]
    if not points:
        return None
    figure = _figure(9.5, 5.6, f"Roofline: {report.title}")
    axes = figure.subplots()
    peak, bandwidth = report.ceilings["matmul_tflops"], report.ceilings["copy_gb_s"] / 1e3
    intensities = [case.flops / case.bytes for case, _ in points]
    ridge = peak / bandwidth
    low, high = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
    label = f"ceilings: matrix products {peak:.3g} TFLOP/s, copies {bandwidth * 1e3:.3g} GB/s"
    roof = axes.plot([low, ridge, high], [bandwidth * low, peak, peak], color="#222222", linewidth=1.4, label=label)
    markers = _markers(case.op for case, _ in points)
    kinds = {kind: palette[0] for kind, palette in _PALETTES.items()}
    for case, rows in points:
        best: dict[str, float] = {}
        for row in rows.values():
            best[_kind(row)] = max(best.get(_kind(row), 0.0), row.tflops or 0.0)
        for kind, rate in best.items():
            axes.plot(case.flops / case.bytes, rate, markers[case.op], color=kinds[kind], markersize=6, alpha=0.85)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s on true sizes")
    handles = [axes.plot([], [], "s", color=colour, label=kind)[0] for kind, colour in kinds.items()]
    handles += [axes.plot([], [], marker, color="#555555", label=op)[0] for op, marker in markers.items()]
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.legend(handles=roof, fontsize=8, loc="outside lower center", frameon=False)
    axes.grid(alpha=0.25)
    return figure


def draw_scaling(report: Report) -> Figure | None:
    """Draw times over tiles, batch or text length, for series of two points or more."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    series: dict[tuple[str, str, str], dict[int, CaseResult]] = {}
    for case in report.cases:
        for name, axis, value in case.series if _fastest(case) else ():
            series.setdefault((case.op, name, axis), {})[value] = case
    series = {key: dict(sorted(cases.items())) for key, cases in series.items() if len(cases) > 1}
    if not series:
        return None
    columns = min(4, len(series))
    figure = _figure(4.6 * columns, 3.3 * -(-len(series) // columns) + 1.2, f"Scaling: {report.title}")
    colours = _colours(report)
    markers, handles = _markers(colours), {}
    panels = _panels(figure, (f"{op}: {name}" for op, name, _ in series), columns, 3.8)
    for axes, ((_, _, axis), cases) in zip(panels, series.items(), strict=True):
        for name in _lines(cases[max(cases)]):
            times = {value: row.median_ms or 0.0 for value, case in cases.items() if (row := _fastest(case).get(name))}
            style = {"color": colours[name], "marker": markers[name], "markersize": 4, "linewidth": 1.2}
            (handles[name],) = axes.plot(list(times), list(times.values()), label=name, **style)  # type: ignore[arg-type]
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
        axes.set_xticks(list(cases), [str(value) for value in cases])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.grid(alpha=0.25)
    figure.legend(handles=list(handles.values()), fontsize=9, loc="outside lower center", ncols=6, frameon=False)
    return figure


def _lines(case: CaseResult) -> list[str]:
    """Return the implementations to draw: ours, the naive path, and the fastest peers of the last case."""
    rows = _fastest(case)
    ours = [name for name, row in rows.items() if row.ours]
    peers = sorted((name for name, row in rows.items() if not row.ours), key=lambda name: rows[name].median_ms or 0.0)
    peers.sort(key=lambda name: name != "naive")
    return peers[: max(1, _MAX_LINES - len(ours))] + ours


def draw_stages(report: Report) -> Figure | None:
    """Draw where the time to the first token goes, and how long each further token takes."""
    cases = [case for case in report.cases if case.section == "e2e" and any(row.stages for row in case.rows)]
    if not cases:
        return None
    most = max(sum(bool(row.stages) for row in case.rows) for case in cases)
    figure = _figure(12, len(cases) * (1.2 + 0.36 * most) + 0.9, f"The whole model, stage by stage: {report.title}")
    grid = figure.subplots(len(cases), 2, squeeze=False, width_ratios=(3, 1))
    stages = dict.fromkeys(stage for case in cases for row in case.rows for stage in row.stages if stage != "token")
    colours = dict(zip(stages, _STAGES, strict=False))
    for (whole, token), case in zip(grid, cases, strict=True):
        rows = [row for row in case.rows if row.stages]
        _title(whole, case.case)
        _title(token, "each further token")
        totals = [sum(time for stage, time in row.stages.items() if stage != "token") for row in rows]
        _draw_bars(whole, [(place, total, "none") for place, total in enumerate(totals)], 0.62)
        for place, row in enumerate(rows):
            left = 0.0
            for stage, colour in colours.items():
                whole.barh(place, row.stages.get(stage, 0.0), 0.62, left=left, color=colour)
                left += row.stages.get(stage, 0.0)
        shades = [_PALETTES["ours" if row.ours else "naive"][0] for row in rows]
        steps = [(place, row.stages["token"], shades[place]) for place, row in enumerate(rows)]
        _draw_bars(token, steps, 0.62)
        whole.set_yticks(range(len(rows)), [row.implementation for row in rows])
        token.set_yticks([])
        for axes in (whole, token):
            axes.invert_yaxis()
            axes.set_xlabel("ms")
    handles = [grid[0][0].barh([0], [0], color=colour, label=stage) for stage, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(colours), fontsize=8, frameon=False)
    return figure


# Picture -> what draws it, and what it shows.
DRAWINGS: dict[str, tuple[Callable[[Report], Figure | None], str]] = {
    "bars": (draw_bars, "Times of all implementations on the main cases"),
    "roofline": (draw_roofline, "Rates against what the device can do"),
    "scaling": (draw_scaling, "Times over tiles, batch and text length"),
    "stages": (draw_stages, "Stages of the whole model"),
}
