"""``infimm-fast export kernels | tensorrt | aoti``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Errors = Callable[[], AbstractContextManager[None]]


def register_commands(app: typer.Typer, console: Console, one_line_errors: Errors) -> None:
    """Add the commands to ``infimm-fast export``."""
    _register_kernels(app, console, one_line_errors)
    _register_tensorrt(app, console, one_line_errors)
    _register_aoti(app, console, one_line_errors)


def _register_kernels(app: typer.Typer, console: Console, one_line_errors: Errors) -> None:
    @app.command("kernels")
    def export_kernels_command(
        out: Annotated[Path, typer.Argument(help="Folder to make.")],
        sm: Annotated[list[int], typer.Option(help="Compute capability, 90 for a Hopper; repeatable.")],
        head_dim: Annotated[list[int] | None, typer.Option(help="64 and 112 without it; repeatable.")] = None,
        dtype: Annotated[list[str] | None, typer.Option(help="float32, float16, bfloat16; repeatable.")] = None,
        heads: Annotated[int, typer.Option(help="Of the contiguous kernels, which have it compiled in.")] = 16,
        processes: Annotated[int, typer.Option(min=1, help="That compile at the same time.")] = 2,
    ) -> None:
        """Compile the attention kernels to PTX and cubin files with a description; needs no GPU."""
        with one_line_errors():
            from infimm_fast.cli.export import progress_bars
            from infimm_fast.export import export_kernels

            with progress_bars(console) as progress:
                folder = export_kernels(
                    out,
                    sm,
                    head_dims=head_dim or (64, 112),
                    dtypes=dtype or ("bfloat16", "float16"),
                    heads=heads,
                    processes=processes,
                    progress=lambda done, total: progress("compile", done, total),
                )
            console.print(f"Wrote {folder}", highlight=False)


def _register_tensorrt(app: typer.Typer, console: Console, one_line_errors: Errors) -> None:
    @app.command("tensorrt")
    def export_tensorrt_command(
        folder: Annotated[Path, typer.Argument(help="An ONNX artifact, which gets the engines; or the folder of a model.")],
        out: Annotated[Path | None, typer.Argument(help="ONNX artifact to make of a model.")] = None,
        flavor: Annotated[str, typer.Option(help="tensorrt or rtx.")] = "tensorrt",
        precision: Annotated[str | None, typer.Option(help="Of a model's export; an artifact has its own.")] = None,
        profiles: Annotated[str, typer.Option(help="Shapes: chat, batch, one-tile.")] = "chat",
        sm: Annotated[list[int] | None, typer.Option(help="rtx: GPUs to build for, 89 for 8.9; repeatable.")] = None,
        graph: Annotated[list[str] | None, typer.Option(help="vision, cross_kv, decoder; all without it.")] = None,
        plugins: Annotated[bool, typer.Option(help="Our Triton kernels in place of TensorRT's attention.")] = False,
        weight_streaming: Annotated[bool, typer.Option("--weight-streaming", help="Weights may stay on the host.")] = False,
        refit: Annotated[bool, typer.Option("--refit", help="Weights can be replaced later.")] = False,
        optimization_level: Annotated[int | None, typer.Option(min=0, max=5, help="TensorRT's own.")] = None,
        report: Annotated[bool, typer.Option("--report", help="Show every engine's layers and attention kernels.")] = False,
    ) -> None:
        """Build TensorRT engines from an ONNX artifact and say what they are made of."""
        with one_line_errors():
            from infimm_fast.cli.export import progress_bars
            from infimm_fast.export import export_tensorrt
            from infimm_fast.export.to_tensorrt.engines import read_report

            with progress_bars(console) as progress:
                entries = export_tensorrt(
                    folder,
                    out,
                    flavor=flavor,
                    precision=precision,
                    profiles=profiles,
                    sms=sm or None,
                    graphs=graph or None,
                    plugins=plugins,
                    weight_streaming=weight_streaming,
                    refit=refit,
                    optimization_level=optimization_level,
                    progress=progress,
                )
            for entry in entries:
                left = ", ".join(entry.decomposed)
                scores = f"; [bold yellow]attention with scores in memory:[/] {left}" if left else ""
                console.print(f"{entry.file}  {entry.bytes / 2**20:.1f} MiB{scores}", highlight=False, soft_wrap=True)
                if report:
                    table = read_report(out or folder, entry).table()
                    console.print(table, highlight=False, markup=False, soft_wrap=True)


def _register_aoti(app: typer.Typer, console: Console, one_line_errors: Errors) -> None:
    @app.command("aoti")
    def export_aoti_command(
        model: Annotated[Path, typer.Argument(help="Folder of a model.")],
        out: Annotated[Path, typer.Argument(help="Folder to make.")],
        dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16; the model's own without it.")] = None,
        device: Annotated[str, typer.Option(help="cpu or cuda: what compiles and what runs.")] = "cpu",
        graph: Annotated[list[str] | None, typer.Option(help="vision, cross_kv, decoder; all without it.")] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact in OUT.")] = False,
    ) -> None:
        """Compile a model with AOTInductor to packages that share one weights file."""
        with one_line_errors():
            from infimm_fast.cli.export import progress_bars
            from infimm_fast.export import export_aoti

            with progress_bars(console) as progress:
                folder = export_aoti(
                    model,
                    out,
                    dtype=dtype,
                    device=device,
                    graphs=tuple(graph) if graph else None,
                    overwrite=overwrite,
                    progress=progress,
                )
            console.print(f"Wrote {folder}", highlight=False)
