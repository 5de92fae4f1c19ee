"""``infimm-fast convert``."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from transformers import AutoTokenizer

from infimm_fast.errors import ConfigurationError
from infimm_fast.models.infimm_hd.checkpoint import convert_checkpoint
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.presets import PRESETS
from infimm_fast.models.infimm_hd.presets import preset as make_preset


def run_convert(
    console: Console,
    source: Path,
    destination: Path,
    preset: str | None,
    config_file: Path | None,
    tokenizer_folder: Path | None,
    max_shard_gb: float,
) -> None:
    """Convert with a progress bar; see `infimm_fast.convert_checkpoint` for what can be refused."""
    config = _load_config(preset, config_file)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder) if tokenizer_folder is not None else None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task(f"{source.name} -> {destination}", total=None)
        convert_checkpoint(
            source,
            destination,
            config,
            tokenizer,
            max_shard_bytes=int(max_shard_gb * 1e9),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    console.print(f"Wrote {destination}", highlight=False)
    if tokenizer is None:
        console.print("The folder has no tokenizer: give --tokenizer to make it complete.", highlight=False)


def _load_config(preset: str | None, config_file: Path | None) -> InfiMMHDConfig:
    if (preset is None) == (config_file is None):
        raise ConfigurationError(f"give either --preset ({', '.join(PRESETS)}) or --config with the file of a configuration")
    if preset is not None:
        return make_preset(preset)
    assert config_file is not None
    try:
        return InfiMMHDConfig.from_dict(json.loads(config_file.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{config_file} is not a JSON file: {error}") from error
