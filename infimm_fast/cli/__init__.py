"""The command line, ``infimm-fast``. Commands import what they need when they run, so that ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from infimm_fast.cli.bench import PASS_ON, bench_command
from infimm_fast.cli.export_targets import register_commands

app = typer.Typer(
    help="Fused kernels, exporters and benchmarks for high-resolution multimodal LLMs, around a model of InfiMM-HD.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
error_console = Console(stderr=True)
app.command("bench", **PASS_ON)(bench_command)
export_app = typer.Typer(help="Write a model for another runtime.", no_args_is_help=True)
app.add_typer(export_app, name="export")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors in the user's input as one line and leave with exit code 1; bugs keep their traceback."""
    from infimm_fast.errors import UserError
    from infimm_fast.export.common.errors import ExportError

    try:
        yield
    except (UserError, ExportError, OSError) as error:
        error_console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@app.command("demo")
def demo_command(
    image: Annotated[Path, typer.Argument(help="The picture to ask about.")],
    prompt: Annotated[str, typer.Option(help="The question.")] = "What is in this picture?",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder made by `infimm-fast convert`; random weights without it.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Configuration of the model with random weights.")] = "tiny",
    output: Annotated[Path, typer.Option(help="Folder for tiles.png.")] = Path("demo_output"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on CUDA, float32 on CPU), float32, float16, bfloat16")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each stage; the median is shown.")] = 5,
    export: Annotated[bool, typer.Option("--export", help="Also through ONNX Runtime; needs infimm-fast[onnx].")] = False,
) -> None:
    """Cut a picture, encode it, answer a question, and compare the backends: same results, how fast."""
    from infimm_fast.cli.demo import run_demo

    with one_line_errors():
        passed = run_demo(
            console,
            image,
            prompt,
            checkpoint=checkpoint,
            preset=preset,
            output=output,
            device_name=device,
            dtype_name=dtype,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            export=export,
        )
    if not passed:
        raise typer.Exit(1)


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(help="The authors' .ckpt, .bin, .pt or .safetensors file, or a folder of them.")],
    destination: Annotated[Path, typer.Argument(help="Folder to make.")],
    preset: Annotated[str | None, typer.Option(help="Configuration of the checkpoint by name.")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration of the checkpoint as config.json.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of its tokenizer, saved with the model.")] = None,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest weights file in GB.")] = 4.0,
) -> None:
    """Turn an official checkpoint into a folder that from_pretrained reads."""
    from infimm_fast.cli.convert import run_convert

    with one_line_errors():
        run_convert(console, source, destination, preset, config, tokenizer, max_shard_gb)


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="Folder of a model, or the name of a preset (whose weights are not made).")],
    image: Annotated[
        list[str] | None,
        typer.Option(help="Picture size as WIDTHxHEIGHT, 1920x1080 by default; repeatable."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a picture of the gates (needs matplotlib).")] = None,
) -> None:
    """Show a model's parts, how open its gates are, and what a picture costs."""
    from infimm_fast.cli.inspect import run_inspect

    with one_line_errors():
        run_inspect(console, model, image or ["1920x1080"], plot)


@export_app.command("onnx")
def export_onnx_command(
    model: Annotated[str, typer.Argument(help="Folder of a model, or the name of a preset for random weights.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16; the model's own without it.")] = None,
    opset: Annotated[int, typer.Option(help="Of the files: 23 or 24.")] = 23,
    graph: Annotated[list[str] | None, typer.Option(help="vision, cross_kv, decoder; all of them without it.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Standard operators only, no infimm:: nodes.")] = False,
    fold: Annotated[bool, typer.Option("--fold", help="Fold gates and norms of the gated blocks first.")] = False,
    share_weights: Annotated[
        bool, typer.Option("--share-weights", help="Point at the .safetensors of MODEL, which must be OUT.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Run the graphs and compare with PyTorch.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact in OUT.")] = False,
) -> None:
    """Write ONNX graphs, verify them, and make a folder that `infimm-fast run` takes."""
    with one_line_errors():
        from infimm_fast.cli.export import run_export_onnx

        run_export_onnx(
            console,
            model,
            out,
            dtype=dtype,
            fold=fold,
            opset=opset,
            graphs=tuple(graph) if graph else None,
            plain=plain,
            share_weights=share_weights,
            verify=verify,
            overwrite=overwrite,
        )


@export_app.command("verify")
def export_verify_command(folder: Annotated[Path, typer.Argument(help="An artifact.")]) -> None:
    """See that no file of an artifact was changed, by its hash."""
    with one_line_errors():
        from infimm_fast.cli.export import run_verify

        run_verify(console, folder)


register_commands(export_app, console, one_line_errors)


@app.command("run")
def run_command(
    folder: Annotated[Path, typer.Argument(help="An artifact, made by `infimm-fast export`.")],
    image: Annotated[str, typer.Argument(help="The picture to ask about; an empty string for none.")],
    prompt: Annotated[str, typer.Argument(help="The question.")],
    provider: Annotated[
        str, typer.Option(help="cpu, cuda, tensorrt, tensorrt-rtx, aoti; see infimm_fast.export.load.")
    ] = "cpu",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 for greedy decoding.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file first.")] = False,
) -> None:
    """Ask an exported model about a picture."""
    with one_line_errors():
        from infimm_fast.cli.run import run_artifact

        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        run_artifact(console, folder, image, prompt, provider=provider, verify=verify, **options)


@app.command("doctor")
def doctor_command() -> None:
    """Say what is installed, what can run here, and what to install for the rest."""
    from infimm_fast.cli.doctor import run_doctor

    run_doctor(console)
