"""``infimm-fast bench``: hands its arguments to `infimm_fast.benchmarks.run.bench`, which knows them all."""

from __future__ import annotations

from typing import Any

import typer

# Everything behind "bench" is passed on as it stands, --help too.
PASS_ON: dict[str, Any] = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
    "add_help_option": False,
}


def bench_command(context: typer.Context) -> None:
    """Check, time, store and draw: our kernels and model against everything else; compare runs."""
    from infimm_fast.benchmarks.run import bench
    from infimm_fast.cli import one_line_errors

    with one_line_errors():
        status = bench(context.args, context.command_path)
    raise typer.Exit(status)
