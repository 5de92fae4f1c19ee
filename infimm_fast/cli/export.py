"""``infimm-fast export``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from infimm_fast.dtypes import DTYPES
from infimm_fast.errors import ConfigurationError
from infimm_fast.export import export_onnx, verify_files
from infimm_fast.export.common.artifact import Progress as Report
from infimm_fast.export.common.family import family_of
from infimm_fast.export.common.spec import check_dtype
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.presets import PRESETS
from infimm_fast.models.infimm_hd.presets import preset as make_preset
from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor
from infimm_fast.models.infimm_hd.tokenization_bytes import byte_tokenizer


@contextmanager
def progress_bars(console: Console) -> Iterator[Report]:
    """Yield a function that shows one bar for each stage it is told about."""
    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description:<18}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def run_export_onnx(
    console: Console,
    model: str,
    out: Path,
    *,
    dtype: str | None,
    fold: bool,
    verify: bool,
    share_weights: bool,
    **options: Any,
) -> None:
    """Export with progress bars; see `infimm_fast.export.export_onnx` for the options and for what can be refused."""
    _log_to(console)
    source, processor = _source(console, model, dtype)
    if fold:
        source, processor = _folded(source, processor, dtype, share_weights)
    with progress_bars(console) as progress:
        export_onnx(
            source,
            out,
            dtype=dtype,
            share_weights=share_weights,
            processor=processor,
            verify=verify,
            progress=progress,
            **options,
        )
    console.print(f"Wrote {out}{'' if verify else ', not verified'}", highlight=False)


def run_verify(console: Console, folder: Path) -> None:
    """Hash every file of an artifact."""
    with progress_bars(console) as progress:
        files = verify_files(folder, progress)
    console.print(f"{folder}: all {len(files)} files are as they were written", highlight=False, soft_wrap=True)


def _log_to(console: Console) -> None:
    """Show what the exporters log (peak memory, large activations) between the bars."""
    logger = logging.getLogger("infimm_fast.export")
    logger.setLevel(logging.INFO)
    logger.handlers = [RichHandler(console=console, show_path=False, show_time=False)]
    logger.propagate = False


def _source(
    console: Console, name: str, dtype: str | None
) -> tuple[InfiMMHDForConditionalGeneration | Path, InfiMMHDProcessor | None]:
    """Return the folder of a model, or a model with random weights for the name of a preset."""
    if Path(name).is_dir():
        return Path(name), None
    if name not in PRESETS:
        raise ConfigurationError(f"{name!r} is neither the folder of a model nor one of the presets {', '.join(PRESETS)}")
    config = make_preset(name)
    processor = InfiMMHDProcessor.from_config(config, byte_tokenizer())
    processor.write_token_ids(config)
    console.print(f"[bold yellow]Random weights[/] (preset {name}): answers will mean nothing.", highlight=False)
    torch.manual_seed(0)
    check_dtype(dtype or "float32")
    model = InfiMMHDForConditionalGeneration._from_config(config, dtype=DTYPES[dtype or "float32"])
    return model.eval(), processor


def _folded(source: Any, processor: Any, dtype: str | None, share_weights: bool) -> tuple[Any, Any]:
    """Return a model with its gates folded, and its processor."""
    from infimm_fast.integrations.optimization import optimize

    if share_weights:
        raise ConfigurationError("--fold makes new weights, and --share-weights points at the old ones; give one of them")
    if dtype is not None:
        check_dtype(dtype)
    if isinstance(source, Path):
        family = family_of(source)
        processor = family.load_processor(source)
        source = family.load_model(source, None if dtype is None else DTYPES[dtype])
    optimize(source.requires_grad_(False), fold=True)
    return source, processor
