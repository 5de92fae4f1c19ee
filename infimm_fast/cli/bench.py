"""``infimm-fast bench``: benchmarks of the ops and of the model's stages, and comparisons of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infimm_fast.benchmarks import SECTIONS

bench_app = typer.Typer(
    help="Check, time, store and draw: our kernels and model against everything else, on this machine.",
    no_args_is_help=True,
)

_HELP = {
    "all": "Every section.",
    "ops": "Attention of vision towers; gate, residual and norm.",
    "cross": "Gated cross-attention, the op and the whole block: prefill and decode.",
    "vision": "The vision tower.",
    "prefill": "A prompt through the language model.",
    "decode": "One decoding step of the language model.",
    "preprocess": "JPEG files to tiles on the device.",
    "e2e": "JPEG files and a prompt to the first token, stage by stage, and from token to token.",
    "export": "Exported models, named by --artifact, on their runtimes.",
}

Preset = Annotated[str | None, typer.Option(help="Configuration; InfiMM-HD on a GPU, tiny on a CPU by default.")]
Tiles = Annotated[list[int] | None, typer.Option(min=1, help="Only these numbers of tiles; may be repeated.")]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; bf16 on a GPU, fp32 on a CPU by default.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; cuda by default where there is a GPU.")]
Against = Annotated[list[str] | None, typer.Option(help="Only these peers beside our own implementations; may be repeated.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="Of timing for each row.")]


def _run_section(
    context: typer.Context,
    preset: Preset = None,
    tiles: Tiles = None,
    dtype: Dtype = None,
    device: Device = None,
    against: Against = None,
    seconds: Seconds = 0.3,
    budget: Annotated[
        float | None, typer.Option(min=1.0, help="Seconds for the whole run; less important cases are left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the JSON file and the pictures.")] = Path("bench_output"),
    artifact: Annotated[
        list[str] | None, typer.Option(help="Folder of an exported model, for the section export; may be repeated.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw pictures; needs matplotlib.")] = False,
) -> None:
    from infimm_fast.benchmarks.harness import Settings
    from infimm_fast.benchmarks.run import make_plan, run_and_store
    from infimm_fast.cli import one_line_errors

    sections = SECTIONS if context.info_name == "all" else (str(context.info_name),)
    with one_line_errors():
        settings = Settings(
            sections=sections,
            plan=make_plan(preset, dtype, tuple(tiles or ()), device, tuple(artifact or ())),
            seconds=seconds,
            budget=budget,
            against=tuple(against) if against else None,
        )
        status = run_and_store(settings, out, plot)
    raise typer.Exit(status)


for _section in ("all", *SECTIONS):
    bench_app.command(_section, help=_HELP[_section])(_run_section)


@bench_app.command("compare")
def _compare(
    before: Annotated[str, typer.Argument(help="A JSON file of a run, or a git revision to run now.")],
    after: Annotated[str, typer.Argument(help="The same, of the run to be judged.")],
    section: Annotated[list[str] | None, typer.Option(help="What to run for revisions; may be repeated.")] = None,
    preset: Preset = None,
    tiles: Tiles = None,
    dtype: Dtype = None,
    device: Device = None,
    against: Against = None,
    seconds: Seconds = 0.3,
) -> None:
    """Show the ratios of two runs with their noise; the exit status is 1 if the second is slower beyond it."""
    from rich.table import Table

    from infimm_fast.benchmarks.compare import HEADER, compare, is_regression, load_or_run, table_rows
    from infimm_fast.cli import console, one_line_errors

    arguments = [*(section or ()), f"--seconds={seconds}"]
    for name, value in (("--preset", preset), ("--dtype", dtype), ("--device", device)):
        arguments += [name, value] if value else []
    for name, values in (("--tiles", tiles), ("--against", against)):
        arguments += [name, *map(str, values)] if values else []
    with one_line_errors():
        comparisons = compare(load_or_run(before, arguments), load_or_run(after, arguments))
    table = Table(*HEADER, title=f"{before} -> {after}")
    for cells in table_rows(comparisons):
        table.add_row(*cells)
    console.print(table)
    if is_regression(comparisons):
        console.print("slower beyond the noise, or without a figure that was there before", highlight=False)
        raise typer.Exit(1)
