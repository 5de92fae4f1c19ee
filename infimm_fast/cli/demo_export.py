"""The demo's column for ONNX Runtime."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import BatchFeature

from infimm_fast.cli.export import progress_bars
from infimm_fast.cli.stages import StageResults, median_seconds
from infimm_fast.export import export_onnx, load
from infimm_fast.export.models.infimm_hd_runner import Decoding, ExportedInfiMMHD
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.position_embedding import encode_places
from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor
from infimm_fast.models.infimm_hd.tiling import tile_places


def run_exported(
    console: Console,
    model: InfiMMHDForConditionalGeneration,
    processor: InfiMMHDProcessor,
    inputs: BatchFeature,
    folder: Path,
    max_new_tokens: int,
    repeats: int,
) -> StageResults:
    """Export the model, and run and time every stage after tiling in ONNX Runtime on the model's device.

    The graphs are not verified by themselves: the demo's table of parity does that.
    """
    device = model.device
    provider = "cuda" if device.type == "cuda" else "cpu"
    with progress_bars(console) as progress:
        export_onnx(model, folder, processor=processor, verify=False, overwrite=True, progress=progress)
    exported = load(folder, provider, device_id=device.index or 0, threads=torch.get_num_threads())
    assert isinstance(exported, ExportedInfiMMHD)
    with console.status("running onnxruntime ..."):
        return _run_stages(exported, inputs.to("cpu"), max_new_tokens, repeats, device)


def _run_stages(
    exported: ExportedInfiMMHD, inputs: BatchFeature, max_new_tokens: int, repeats: int, device: torch.device
) -> StageResults:
    results, config = StageResults(), exported.config
    tiles = {
        "pixel_values": inputs["pixel_values"].float(),
        "tile_positions": encode_places(tile_places(inputs["image_grids"].tolist(), config.always_thumbnail)),
    }
    vision = exported.run("vision", tiles)
    results.seconds["vision"] = median_seconds(lambda: exported.run("vision", tiles), repeats, device)
    results.seconds["K/V projection"] = median_seconds(lambda: exported.run("cross_kv", vision), repeats, device)
    features = exported.compute("vision", **tiles)["image_features"].flatten(0, 1)
    parts = torch.stack([part[: len(features)] for part in exported.compute("cross_kv", **vision).values()])
    encoded = exported.encode_tiles(*(inputs[name] for name in ("pixel_values", "image_grids", "image_counts")))

    def prefill() -> tuple[Decoding, torch.Tensor]:
        decoding = Decoding(exported, inputs["input_ids"], inputs["attention_mask"], encoded, max_new_tokens)
        return decoding, decoding.step()

    results.seconds["prefill"] = median_seconds(prefill, repeats, device)
    decoding, logits = prefill()
    results.tensors = {"vision": features, "K/V projection": parts.unflatten(0, (-1, 2)), "prefill": logits[:, None]}
    step_logits, seconds = [], []
    for _ in range(max_new_tokens):
        token = logits.argmax(-1)
        results.tokens.append(int(token))
        started = time.perf_counter()
        decoding.append(token)
        logits = decoding.step()
        seconds.append(time.perf_counter() - started)
        step_logits.append(logits[:, None])
    results.seconds["per token"] = statistics.median(seconds)
    results.tensors["per token"] = torch.cat(step_logits, dim=1)
    results.tensors = {stage: tensor.to(device) for stage, tensor in results.tensors.items()}
    return results
