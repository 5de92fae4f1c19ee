"""``infimm-fast demo``: one picture through every stage, once for each backend, compared and timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BatchFeature

from infimm_fast.cli.doctor import FUSED, backends
from infimm_fast.cli.stages import StageResults, median_seconds, now
from infimm_fast.cli.tiles import draw_tiles
from infimm_fast.errors import CheckpointError, ConfigurationError
from infimm_fast.images import load_image
from infimm_fast.integrations.optimization import optimize
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.presets import preset as make_preset
from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor
from infimm_fast.models.infimm_hd.tokenization_bytes import byte_tokenizer

BASELINE = "reference"
STAGES = ("tiling", "vision", "K/V projection", "prefill", "per token")

# Largest deviation from the baseline, over its largest value, that counts as the same result.
_LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def run_demo(
    console: Console,
    image_file: Path,
    prompt: str,
    *,
    checkpoint: Path | None,
    preset: str,
    output: Path,
    device_name: str,
    dtype_name: str,
    max_new_tokens: int,
    repeats: int,
    export: bool = False,
) -> bool:
    """Run the demo; return whether all backends gave the same results."""
    device = _choose_device(device_name)
    dtype = _choose_dtype(dtype_name, device)
    picture = load_image(str(image_file))
    model, processor = _load(console, checkpoint, preset, device, dtype)
    tiles, grid = processor.image_processor.cut(picture)
    output.mkdir(parents=True, exist_ok=True)
    draw_tiles(picture, tiles, grid).save(output / "tiles.png")
    console.print(
        f"{image_file.name}: {picture.width} x {picture.height} pixels -> {grid[0]} x {grid[1]} sub-images"
        f"{' and a thumbnail' if len(tiles) > grid[0] * grid[1] else ''}, drawn in {output / 'tiles.png'}",
        highlight=False,
    )
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(images=picture, text=text).to(device)
    results = {}
    names = [name for name, runs, _ in backends(device) if runs]
    for name in names:
        if name == FUSED:
            optimize(model.requires_grad_(False))
        else:
            model.set_backend(name)
        with console.status(f"running {name} ..."):
            results[name] = _run_stages(model, inputs, max_new_tokens, repeats)
    if export:
        from infimm_fast.cli.demo_export import run_exported

        results["onnxruntime"] = run_exported(console, model, processor, inputs, output / "onnx", max_new_tokens, repeats)
    tiling = median_seconds(lambda: processor.image_processor(picture), repeats, device)
    for result in results.values():
        result.seconds["tiling"] = tiling
    for name, runs, remark in backends(device):
        console.print(f"{name if runs else f'no column for {name}'}: {remark}", highlight=False, markup=False)
    answer = processor.decode(results["sdpa"].tokens, skip_special_tokens=True)
    console.print(f"Question: {prompt}", highlight=False, markup=False)
    console.print(f"Answer:   {answer!r}", highlight=False, markup=False)
    passed = _print_parity(console, results, dtype)
    _print_latency(console, results, f"{device}, {str(dtype).removeprefix('torch.')}, {_describe(inputs, model)}")
    return passed


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device {name!r} is not known; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device {name!r} was asked for, but no CUDA GPU is visible; use cpu")
    return device


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {str(dtype).removeprefix("torch."): dtype for dtype in _LIMITS}
    if name not in known:
        raise ConfigurationError(f"dtype {name!r} is not known; use auto, {', '.join(known)}")
    return known[name]


def _load(
    console: Console, checkpoint: Path | None, preset: str, device: torch.device, dtype: torch.dtype
) -> tuple[InfiMMHDForConditionalGeneration, InfiMMHDProcessor]:
    if checkpoint is not None:
        if not (checkpoint / "config.json").is_file():
            raise CheckpointError(f"{checkpoint} is not a folder made by `infimm-fast convert`: it has no config.json")
        model = InfiMMHDForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
        return model.to(device).eval(), InfiMMHDProcessor.from_pretrained(checkpoint)
    config = make_preset(preset)
    processor = InfiMMHDProcessor.from_config(config, byte_tokenizer())
    processor.write_token_ids(config)
    console.print(
        f"[bold yellow]Random weights[/] (preset {preset}): the answer means nothing; give --checkpoint for real ones.",
        highlight=False,
    )
    # Closed gates would hide the picture from the language model, and with it every error.
    config.gate_initializer_range = config.gate_initializer_range or 0.5
    torch.manual_seed(0)
    with torch.device(device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = InfiMMHDForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(previous)
    return model.eval(), processor


@torch.inference_mode()
def _run_stages(
    model: InfiMMHDForConditionalGeneration, inputs: BatchFeature, max_new_tokens: int, repeats: int
) -> StageResults:
    """Run and time every stage after tiling."""
    results, device = StageResults(), model.device
    pixels = {"pixel_values": inputs["pixel_values"], "image_grids": inputs["image_grids"]}

    def timed(stage: str, run: Callable[[], Any]) -> Any:
        value = run()
        results.seconds[stage] = median_seconds(run, repeats, device)
        return value

    features, _ = timed("vision", lambda: model.get_image_features(**pixels))
    key_values = timed("K/V projection", lambda: [block.attn.project_visual(features) for block in model.gated_blocks])
    context = model.encode_images(**pixels)
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "visual_context": context}
    prefill = timed("prefill", lambda: model(**prompt, use_cache=True, logits_to_keep=1))
    results.tensors = {
        "vision": features,
        "K/V projection": torch.stack([torch.stack(pair) for pair in key_values]),
        "prefill": prefill.logits,
    }
    logits, step_logits, seconds = prefill.logits, [], []
    for _ in range(max_new_tokens):
        token = logits[:, -1].argmax(-1, keepdim=True)
        results.tokens.append(int(token))
        started = now(device)
        step = model(
            input_ids=token,
            past_key_values=prefill.past_key_values,
            visual_context=context,
            logits_to_keep=1,
            use_cache=True,
        )
        logits = step.logits
        seconds.append(now(device) - started)
        step_logits.append(logits)
    results.seconds["per token"] = statistics.median(seconds)
    results.tensors["per token"] = torch.cat(step_logits, dim=1)
    return results


def _print_parity(console: Console, results: dict[str, StageResults], dtype: torch.dtype) -> bool:
    """Print the deviation of each backend from the baseline; return whether all are within the limit."""
    others = [name for name in results if name != BASELINE]
    table = Table(
        "stage", *(f"{name} against {BASELINE}" for name in others), title="Parity: largest deviation / largest value"
    )
    baseline, limit, passed = results[BASELINE], _LIMITS[dtype], True
    for stage, expected in baseline.tensors.items():
        cells = []
        for name in others:
            deviation = ((results[name].tensors[stage] - expected).abs().max() / expected.abs().max()).item()
            within = deviation <= limit
            passed &= within
            cells.append(f"{deviation:.1e} {'[green]ok[/]' if within else '[bold red]FAILED[/]'}")
        table.add_row(stage, *cells)
    same = [results[name].tokens == baseline.tokens for name in others]
    table.add_row("answer", *("[green]same tokens[/]" if equal else "[yellow]other tokens[/]" for equal in same))
    table.caption = f"limit {limit:g}"
    console.print(table)
    # With 16-bit weights two near-equal logits may legitimately swap; in float32 tokens must agree.
    return passed and (all(same) or dtype != torch.float32)


def _print_latency(console: Console, results: dict[str, StageResults], title: str) -> None:
    table = Table("stage", *(f"{name} ms" for name in results), title=f"Latency: {title}")
    for stage in STAGES:
        baseline = results[BASELINE].seconds[stage]
        cells = []
        for name, result in results.items():
            speed_up = "" if name == BASELINE or stage == "tiling" else f"  {baseline / result.seconds[stage]:.2f}x"
            cells.append(f"{result.seconds[stage] * 1e3:.2f}{speed_up}")
        table.add_row(stage + (" (*)" if stage == "K/V projection" else ""), *cells)
    table.caption = (
        f"median; x: speed-up over {BASELINE}; (*) once for a picture, but {BASELINE} does it again in every step"
    )
    console.print(table)


def _describe(inputs: BatchFeature, model: InfiMMHDForConditionalGeneration) -> str:
    tiles, length = len(inputs["pixel_values"]), inputs["input_ids"].shape[1]
    return f"{tiles} tiles = {tiles * model.config.visual_tokens_per_tile} visual tokens, {length} text tokens"
