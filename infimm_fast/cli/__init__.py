"""The command line, ``infimm-fast``. Commands import what they need when they run, so that ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    help="Fused kernels, exporters and benchmarks for high-resolution multimodal LLMs, around a model of InfiMM-HD.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
error_console = Console(stderr=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors in the user's input as one line and leave with exit code 1; bugs keep their traceback."""
    from infimm_fast import errors

    expected: tuple[type[Exception], ...] = (
        errors.CheckpointError,
        errors.ConfigurationError,
        errors.ImageCountError,
        errors.ImageInputError,
        errors.PromptError,
        OSError,
    )
    try:
        yield
    except expected as error:
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
) -> None:
    """Cut a picture, encode it, answer a question, and compare the implementations: same results, how fast."""
    from infimm_fast.cli.demo import run_demo

    with one_line_errors():
        passed = run_demo(console, image, prompt, checkpoint, preset, output, device, dtype, max_new_tokens, repeats)
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


@app.command("doctor")
def doctor_command() -> None:
    """Say what is installed, what can run here, and what to install for the rest."""
    from infimm_fast.cli.doctor import run_doctor

    run_doctor(console)
