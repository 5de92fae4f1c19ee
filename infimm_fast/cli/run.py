"""``infimm-fast run``: a question about a picture to an exported model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from rich.console import Console

from infimm_fast.cli.export import progress_bars
from infimm_fast.errors import ConfigurationError
from infimm_fast.export import GenerativeModel, load


def run_artifact(
    console: Console, folder: Path, image: str, prompt: str, *, provider: str, verify: bool, **options: Any
) -> None:
    """Print the answer as it comes; see `GenerativeModel.generate` for the options."""
    with progress_bars(console) if verify else contextlib.nullcontext() as progress:
        model = load(folder, provider, verify=verify, progress=progress)
    if not isinstance(model, GenerativeModel):
        raise ConfigurationError(f"{folder} holds no model that answers questions; export a whole one")
    pieces = model.stream(image or None, prompt, **options)
    for piece in pieces:
        console.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
    console.print()
