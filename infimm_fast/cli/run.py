"""``infimm-fast run``: a question about a picture to an exported model."""

from __future__ import annotations

import contextlib
from pathlib import Path

from rich.console import Console

from infimm_fast.cli.export import progress_bars
from infimm_fast.errors import ConfigurationError
from infimm_fast.export import ExportedModel, load


def run_artifact(
    console: Console,
    folder: Path,
    image: str,
    prompt: str,
    provider: str,
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
    verify: bool,
) -> None:
    """Print the answer as it comes."""
    with progress_bars(console) if verify else contextlib.nullcontext() as progress:
        model = load(folder, provider, verify=verify, progress=progress)
    if not isinstance(model, ExportedModel):
        raise ConfigurationError(f"{folder} is a single module, which answers no questions; export a whole model")
    pieces = model.stream(image or None, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    for piece in pieces:
        console.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
    console.print()
