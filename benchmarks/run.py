"""The one door to the benchmarks: runs, comparisons of runs, and the page made of stored ones.

``infimm-fast bench`` and ``python -m infimm_fast.benchmarks`` both lead here. A run needs torch, transformers and what they
need; rich makes the tables where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from infimm_fast.benchmarks import SECTIONS
from infimm_fast.benchmarks.compare import NOW, is_regression, load_or_run, show_comparison
from infimm_fast.benchmarks.display import show_case
from infimm_fast.benchmarks.environment import file_name
from infimm_fast.benchmarks.harness import Settings, run_benchmarks
from infimm_fast.benchmarks.registry import Plan
from infimm_fast.benchmarks.report import Report
from infimm_fast.dtypes import DTYPES
from infimm_fast.errors import ConfigurationError

# At once, wherever the output goes.
tell = partial(print, flush=True)
GPU_PRESET, CPU_PRESET = "infimm-hd-vicuna-13b", "tiny"
_USAGE = """\
sections, or all:
  ops         attention of vision towers; gate, residual and norm; ops of your own
  cross       cross-attention from text to pictures, the op and the whole gated block: prefill and decode
  vision      the vision tower
  prefill     a prompt through the language model
  decode      one decoding step of the language model
  preprocess  JPEG files to tiles on the device
  e2e         JPEG files and a prompt to the first token, stage by stage, and from token to token
  export      exported models, named by --artifact, on their runtimes

instead of sections:
  compare BEFORE [AFTER]   JSON files of runs, or git revisions, which are run with the sections and options behind them;
                           what is installed is AFTER if there is none; the exit status is 1 if AFTER is slower
  page [FOLDER]            make the figures of a checkout's docs/performance.md from its benchmarks/results
"""


def bench(arguments: Sequence[str], program: str) -> int:
    """Carry out a command line.

    Args:
        arguments: what the user wrote behind the program.
        program: how it was called, for the help.

    Returns:
        The exit status: 1 if an implementation failed its check, one of ours did not run, or a comparison shows a
        regression; else 0.

    Raises:
        ConfigurationError: an argument is not accepted.
    """
    if not arguments:
        _parser(program).print_help()
        return 0
    command, *rest = arguments
    if command == "compare":
        return _compare(rest, program)
    if command == "page":
        from infimm_fast.benchmarks.document import write_page

        write_page(Path(*rest[:1]))
        return 0
    options = _parser(program).parse_args(arguments)
    tiles, artifacts = tuple(options.tiles), tuple(options.artifact)
    settings = Settings(
        sections=SECTIONS if options.sections in ([], ["all"]) else tuple(options.sections),
        plan=make_plan(options.preset, options.dtype, tiles, options.device, artifacts),
        seconds=options.seconds,
        budget=options.budget,
        against=tuple(options.against) or None,
        ops=tuple(options.ops) or None,
    )
    return run_and_store(settings, options.out, options.plot)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program,
        description="Check, time, store and draw: our kernels and model against everything else, on this machine.",
        epilog=_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("sections", nargs="*", metavar="section", help="see below")
    parser.add_argument("--preset", help=f"{GPU_PRESET} on a GPU, {CPU_PRESET} on a CPU")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--tiles", type=int, help="only these numbers of tiles", **several)  # type: ignore[arg-type]
    parser.add_argument("--against", help="only these peers, beside our own implementations", **several)  # type: ignore[arg-type]
    parser.add_argument("--ops", help="only these ops and stages of the sections", **several)  # type: ignore[arg-type]
    parser.add_argument("--artifact", help="folders of exported models, for the section export", **several)  # type: ignore[arg-type]
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each row")
    parser.add_argument("--budget", type=float, help="seconds for the whole run; less important cases are left out")
    parser.add_argument("--out", type=Path, default=Path("bench_output"), help="folder of the JSON file and pictures")
    parser.add_argument("--plot", action="store_true", help="draw pictures; needs matplotlib")
    return parser


def _compare(arguments: Sequence[str], program: str) -> int:
    parser = _parser(program)
    if not arguments or arguments[0].startswith("-"):
        parser.error("compare takes one or two files or git revisions first")
    before, *rest = arguments
    after = NOW if not rest or rest[0].startswith("-") or rest[0] in SECTIONS else rest.pop(0)
    # Refused now, not after a revision was installed.
    parser.parse_args(rest)
    return int(is_regression(show_comparison(load_or_run(before, rest), load_or_run(after, rest))))


def make_plan(
    preset: str | None = None,
    dtype: str | None = None,
    tiles: tuple[int, ...] | None = None,
    device: str | None = None,
    artifacts: tuple[str, ...] = (),
) -> Plan:
    """Return a plan, with defaults for this machine: a GPU runs InfiMM-HD in bfloat16, a CPU the tiny preset in float32.

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
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
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
        ConfigurationError: a name in the settings is not known, `out` cannot be written, or matplotlib is missing. All of
            it is found before anything is measured.
    """
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("--plot needs matplotlib, which is not installed; pip install 'infimm-fast[plot]'")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigurationError(f"no report can be written to {out}: {error.strerror}; name a folder with --out") from error
    suffix = "" if set(settings.sections) == set(SECTIONS) else "-".join(settings.sections)

    def store(report: Report) -> Path:
        target = out / file_name(report.environment, suffix)
        report.save(target)
        return target

    def done(report: Report) -> None:
        show_case(report.cases[-1])
        store(report)

    report = run_benchmarks(settings, tell, done)
    tell(f"written: {store(report)}")
    for name in report.left_out:
        tell(f"left out, no time in the budget: {name}")
    if plot:
        from infimm_fast.benchmarks.plot import draw_report

        for picture in draw_report(report, out, suffix and f"{suffix}-"):
            tell(f"drawn: {picture}")
    for failure in report.failed:
        tell(f"FAILED: {failure}")
    return int(bool(report.failed))
