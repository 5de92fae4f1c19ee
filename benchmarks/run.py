"""Run benchmarks: ``python -m infimm_fast.benchmarks.run --help``. The same as ``infimm-fast bench``, without its needs.

Needs torch, transformers and what they need; rich and typer are not among that.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from infimm_fast.benchmarks import SECTIONS
from infimm_fast.benchmarks.display import Display
from infimm_fast.benchmarks.environment import file_name
from infimm_fast.benchmarks.harness import Settings, run_benchmarks
from infimm_fast.benchmarks.registry import DTYPES, Plan
from infimm_fast.benchmarks.report import CaseResult, Report
from infimm_fast.errors import ConfigurationError

GPU_PRESET, CPU_PRESET = "infimm-hd-vicuna-13b", "tiny"
DEFAULT_SECONDS = 0.3


def make_plan(
    preset: str | None = None,
    dtype: str | None = None,
    tiles: tuple[int, ...] | None = None,
    device: str | None = None,
    artifacts: tuple[str, ...] = (),
) -> Plan:
    """Return a plan, with defaults for this machine: a GPU runs InfiMM-HD in bf16, a CPU the tiny preset in fp32.

    Raises:
        ConfigurationError: a value is not accepted.
    """
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigurationError(f"device {device!r} is not known; use cpu or cuda") from error
    if where.type not in ("cpu", "cuda") or (where.type == "cuda" and not torch.cuda.is_available()):
        raise ConfigurationError(f"device {device!r} cannot be used here; accepted are cpu, and cuda where there is a GPU")
    on_gpu = where.type == "cuda"
    dtype = dtype or ("bf16" if on_gpu else "fp32")
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype {dtype!r} is not known; use {', '.join(DTYPES)}")
    if tiles and min(tiles) < 1:
        raise ConfigurationError(f"tiles {tiles} are not accepted; they are numbers from 1 up")
    plan = Plan(preset or (GPU_PRESET if on_gpu else CPU_PRESET), dtype, where, tiles or None, artifacts)
    _ = plan.config
    return plan


def run_and_store(settings: Settings, out: Path, plot: bool) -> int:
    """Run, print, store after every case, and draw.

    Args:
        settings: what to run.
        out: folder of the JSON file and the pictures.
        plot: whether to draw.

    Returns:
        1 if an implementation failed its check or one of ours did not run, else 0.

    Raises:
        ConfigurationError: a name in the settings is not known, or matplotlib is missing.
    """
    if plot and importlib.util.find_spec("matplotlib") is None:
        # Said now, not after minutes of measuring.
        raise ConfigurationError("--plot needs matplotlib, which is not installed; pip install 'infimm-fast[plot]'")
    suffix = "" if set(settings.sections) == set(SECTIONS) else "-".join(settings.sections)

    def store(report: Report) -> Path:
        target = out / file_name(report.environment, suffix)
        report.save(target)
        return target

    display = Display()
    with display as progress:
        shown = progress.done

        def done(result: CaseResult, report: Report) -> None:
            shown(result, report)
            store(report)

        progress.done = done
        report = run_benchmarks(settings, progress)
        file = store(report)
    display.print(f"written: {file}")
    for name in report.left_out:
        display.print(f"left out, no time in the budget: {name}")
    if plot:
        from infimm_fast.benchmarks.plot import draw_report

        for picture in draw_report(report, out, suffix and f"{suffix}-"):
            display.print(f"drawn: {picture}")
    for failure in report.failed:
        display.print(f"FAILED: {failure}")
    return int(bool(report.failed))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 if an implementation failed, 2 if the arguments are not accepted."""
    parser = argparse.ArgumentParser(prog="python -m infimm_fast.benchmarks.run", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; all without any")
    parser.add_argument("--preset", help=f"{GPU_PRESET} on a GPU, {CPU_PRESET} on a CPU")
    parser.add_argument("--tiles", type=int, nargs="+", help="only these numbers of tiles")
    parser.add_argument("--dtype", help=", ".join(DTYPES))
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--against", nargs="+", help="only these peers, beside our own implementations")
    parser.add_argument("--ops", nargs="+", help="only these ops of the sections")
    parser.add_argument("--artifact", nargs="+", default=[], help="folders of exported models, for the section export")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="of timing for each row")
    parser.add_argument("--budget", type=float, help="seconds for the whole run; less important cases are left out")
    parser.add_argument("--out", type=Path, default=Path("bench_output"), help="folder of the JSON file and pictures")
    parser.add_argument("--plot", action="store_true", help="draw pictures; needs matplotlib")
    options = parser.parse_args(arguments)
    try:
        tiles = tuple(options.tiles) if options.tiles else None
        settings = Settings(
            sections=tuple(options.sections) or SECTIONS,
            plan=make_plan(options.preset, options.dtype, tiles, options.device, tuple(options.artifact)),
            seconds=options.seconds,
            budget=options.budget,
            against=tuple(options.against) if options.against else None,
            ops=tuple(options.ops) if options.ops else None,
        )
        return run_and_store(settings, options.out, options.plot)
    except (ConfigurationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
