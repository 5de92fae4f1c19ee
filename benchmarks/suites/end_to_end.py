"""From the bytes of JPEG files to the first token, and from token to token; and what of it happens before the model."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from infimm_fast.benchmarks.cases import language_bytes, language_flops, vision_bytes, vision_flops
from infimm_fast.benchmarks.registry import BenchCase, Plan, Prepared, Stage, register_implementation, register_stage
from infimm_fast.benchmarks.suites.language import PROMPT_TOKENS, run_from_cache
from infimm_fast.benchmarks.suites.model import (
    ModelStage,
    key_values_of,
    load_model,
    make_context,
    make_ids,
    register_model_stage,
)
from infimm_fast.dtypes import DTYPES
from infimm_fast.images import load_image
from infimm_fast.kernels.common.cases import Inputs, Outputs
from infimm_fast.models.infimm_hd.costs import key_value_flops, resampler_flops
from infimm_fast.models.infimm_hd.image_processing_infimm_hd import InfiMMHDImageProcessor
from infimm_fast.models.infimm_hd.presets import preset
from infimm_fast.models.infimm_hd.tiling import tile_count

_BATCHES = (1, 4, 16)


def make_jpeg(side: int, seed: int) -> bytes:
    """Return a square picture as a JPEG file: coarse colours with fine noise, so that it is as large as a photograph."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + generator.integers(-8, 9, smooth.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _batches(plan: Plan) -> tuple[int, ...]:
    return (1, 2) if plan.tiny else _BATCHES


def _picture_sizes(plan: Plan, rows: int) -> dict[str, int]:
    """Return sizes of a batch with one picture for each row, each of the largest grid."""
    config = plan.config
    side = config.max_grid * config.vision_config.image_size
    return {
        "rows": rows,
        "side": side,
        "tiles": rows * tile_count(config.max_grid, config.max_grid, config.always_thumbnail),
    }


class Preprocess(Stage):
    """JPEG files to normalised tiles on the device. The reference cuts with the same code and normalises plainly."""

    name, section = "preprocess", "preprocess"
    wall_clock = True

    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return batches of pictures of the largest grid."""
        config, cases = plan.config, []
        for rows in _batches(plan):
            sizes = _picture_sizes(plan, rows)
            values = sizes["tiles"] * config.vision_config.num_channels * config.vision_config.image_size**2
            cases.append(
                BenchCase(
                    name=f"{rows} picture{'s' * (rows > 1)} of {sizes['side']} x {sizes['side']}",
                    sizes=sizes,
                    dtype=plan.dtype,
                    flops=2 * values,
                    bytes=values * DTYPES[plan.dtype].itemsize,
                    importance=0 if rows == 1 else 2,
                    preset=plan.preset,
                    pictures=rows,
                )
            )
        return cases

    def make_inputs(self, case: BenchCase, device: torch.device, seed: int) -> Inputs:
        """Return the files and the processor."""
        processor = InfiMMHDImageProcessor.from_config(preset(case.preset))
        jpegs = [make_jpeg(case.sizes["side"], seed + row) for row in range(case.sizes["rows"])]
        return {"processor": processor, "jpegs": jpegs, "device": device}

    def reference(self, case: BenchCase, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the tiles, normalised in `dtype`."""
        processor = inputs["processor"]
        tiles = [tile for jpeg in inputs["jpegs"] for tile in processor.cut(jpeg)[0]]
        pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2).to(inputs["device"])
        # In at least fp32, as every processor does before it rounds to the model's dtype.
        wide = torch.promote_types(dtype, torch.float32)
        mean, std = (
            torch.tensor(stat, dtype=wide, device=pixels.device).view(3, 1, 1)
            for stat in (processor.image_mean, processor.image_std)
        )
        return {"out": ((pixels.to(wide) / 255 - mean) / std).to(dtype)}


def _preprocess(case: BenchCase, inputs: Inputs, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Return the function from files to tiles on the device (with their grids), and its stages."""
    processor, jpegs = inputs["processor"], inputs["jpegs"]

    def read() -> list[Image.Image]:
        return [load_image(jpeg) for jpeg in jpegs]

    def copy(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.to(device, case.torch_dtype)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        batch = processor(read())
        return copy(batch["pixel_values"]), batch["image_grids"]

    pictures = read()
    pixels = processor(pictures)["pixel_values"]
    return run, {"jpeg": read, "tiling": lambda: processor(pictures), "copy": lambda: copy(pixels)}


register_stage(Preprocess())


@register_implementation("preprocess", "infimm_fast", ours=True, graph=False)
def _pillow(case: BenchCase, inputs: Inputs) -> Prepared:
    run, stages = _preprocess(case, inputs, inputs["device"])
    return Prepared(lambda: run()[0], stages)


class EndToEnd(ModelStage):
    """JPEG files and a prompt to the first token's logits; stages: how long each part and each further token takes."""

    name, section = "end_to_end", "e2e"
    wall_clock = True

    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return batches of rows with one picture of the largest grid and a prompt each."""
        config, cases = plan.config, []
        tokens = 32 if plan.tiny else PROMPT_TOKENS
        for rows in _batches(plan):
            sizes = _picture_sizes(plan, rows)
            visual = sizes["tiles"] * config.visual_tokens_per_tile
            flops = vision_flops(config, sizes["tiles"]) + resampler_flops(config, sizes["tiles"])
            flops += key_value_flops(config, visual)
            moved = vision_bytes(config, plan.dtype, sizes["tiles"])
            cases.append(
                BenchCase(
                    name=f"batch {rows}, a picture of {sizes['side']} x {sizes['side']} and {tokens} tokens each",
                    sizes=sizes | {"tokens": tokens},
                    dtype=plan.dtype,
                    flops=flops + language_flops(config, rows, tokens, 0, visual // rows),
                    bytes=moved + language_bytes(config, plan.dtype, rows, tokens, 0, visual),
                    importance=0 if rows == 1 else 1,
                    series=(("time to first token", "batch", rows),),
                    preset=plan.preset,
                    pictures=rows,
                )
            )
        return cases

    def make_inputs(self, case: BenchCase, device: torch.device, seed: int) -> Inputs:
        """Return the model, the processor, the files and the prompts."""
        model = load_model(case.preset, case.dtype, device)
        return {
            "model": model,
            "processor": InfiMMHDImageProcessor.from_config(model.config),
            "jpegs": [make_jpeg(case.sizes["side"], seed + row) for row in range(case.sizes["rows"])],
            "ids": make_ids(model.config, case.sizes["rows"], case.sizes["tokens"], device),
        }

    def make_run(self, case: BenchCase, inputs: Inputs) -> Prepared:
        """Return the way to the first token, with its stages and the further tokens' step."""
        model, ids = inputs["model"], inputs["ids"]
        read, stages = _preprocess(case, inputs, model.device)

        def prefill(features: torch.Tensor) -> Any:
            context = make_context(model, features, len(ids))
            return model(input_ids=ids, visual_context=context, use_cache=True, logits_to_keep=1)

        def first_token() -> torch.Tensor:
            return prefill(model.get_image_features(*read())[0]).logits

        # Each stage is timed on what the one before it gives.
        pixels, grids = read()
        features, _ = model.get_image_features(pixels, grids)
        context = make_context(model, features, len(ids))
        filled = prefill(features)
        past = [torch.stack((layer.keys, layer.values)) for layer in filled.past_key_values.layers]
        stages |= {
            "vision": lambda: model.get_image_features(pixels, grids),
            "K/V": lambda: key_values_of(model, features),
            "prefill": lambda: model(input_ids=ids, visual_context=context, use_cache=True, logits_to_keep=1),
            "token": run_from_cache(model, filled.logits[:, -1].argmax(-1, keepdim=True), context, past),
        }
        return Prepared(first_token, stages)


register_model_stage(EndToEnd(), graph=False)
