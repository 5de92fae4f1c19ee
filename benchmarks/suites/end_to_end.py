"""From the bytes of JPEG files to the first token, and from token to token; and what of it happens before the model."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from infimm_fast.benchmarks.registry import BenchCase, Plan, Prepared, Stage, register_implementation, register_stage
from infimm_fast.benchmarks.suites import model as models
from infimm_fast.benchmarks.suites.language import PROMPT_TOKENS, run_from_cache
from infimm_fast.dtypes import DTYPES
from infimm_fast.images import load_image
from infimm_fast.kernels.common.cases import Inputs, Outputs
from infimm_fast.models.infimm_hd import costs
from infimm_fast.models.infimm_hd.image_processing_infimm_hd import InfiMMHDImageProcessor
from infimm_fast.models.infimm_hd.presets import preset

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


def _picture(plan: Plan) -> tuple[int, costs.PictureCosts]:
    """Return the side of a picture of the largest grid, and what it costs."""
    side = plan.config.max_grid * plan.config.vision_config.image_size
    return side, costs.picture_costs(plan.config, side, side)


def _batches(plan: Plan) -> tuple[int, ...]:
    return (1, 2) if plan.tiny else _BATCHES


class Preprocess(Stage):
    """JPEG files to normalised tiles on the device. The reference cuts with the same code and normalises plainly."""

    name, section = "preprocess", "preprocess"
    wall_clock = True

    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return batches of pictures of the largest grid."""
        side, picture = _picture(plan)
        vision = plan.config.vision_config
        values = picture.tiles * vision.num_channels * vision.image_size**2
        return [
            BenchCase(
                f"{rows} picture{'s' * (rows > 1)} of {side} x {side}",
                {"rows": rows, "side": side, "tiles": rows * picture.tiles},
                importance=0 if rows == 1 else 2,
                dtype=plan.dtype,
                flops=2 * values * rows,
                bytes=values * rows * DTYPES[plan.dtype].itemsize,
                preset=plan.preset,
                pictures=rows,
            )
            for rows in _batches(plan)
        ]

    def make_inputs(self, case: BenchCase, device: torch.device, seed: int) -> Inputs:
        """Return the files and the processor."""
        jpegs = [make_jpeg(case.sizes["side"], seed + row) for row in range(case.sizes["rows"])]
        return {"processor": InfiMMHDImageProcessor.from_config(preset(case.preset)), "jpegs": jpegs, "device": device}

    def reference(self, case: BenchCase, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the tiles, normalised in `dtype`."""
        processor = inputs["processor"]
        tiles = [tile for jpeg in inputs["jpegs"] for tile in processor.cut(jpeg)[0]]
        pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2).to(inputs["device"])
        # In at least float32, as every processor does before it rounds to the model's dtype.
        wide = torch.promote_types(dtype, torch.float32)
        mean, std = (
            torch.tensor(stat, dtype=wide, device=pixels.device).view(3, 1, 1)
            for stat in (processor.image_mean, processor.image_std)
        )
        return {"out": ((pixels.to(wide) / 255 - mean) / std).to(dtype)}


@register_implementation("preprocess", "infimm_fast", ours=True, graph=False)
def _preprocess(case: BenchCase, inputs: Inputs) -> Prepared:
    """Return the way from files to tiles on the device with their grids, and its stages."""
    processor, jpegs, device = inputs["processor"], inputs["jpegs"], inputs["device"]

    def read() -> list[Image.Image]:
        return [load_image(jpeg) for jpeg in jpegs]

    def copy(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.to(device, case.torch_dtype)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        batch = processor(read())
        return copy(batch["pixel_values"]), batch["image_grids"]

    pictures = read()
    pixels = processor(pictures)["pixel_values"]
    return Prepared(run, {"jpeg": read, "tiling": lambda: processor(pictures), "copy": lambda: copy(pixels)})


register_stage(Preprocess())


class EndToEnd(models.ModelStage, Preprocess):
    """JPEG files and a prompt to the first token's logits; stages: how long each part and each further token takes."""

    name, section = "end_to_end", "e2e"

    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return batches of rows with one picture of the largest grid and a prompt each."""
        config, dtype, tokens = plan.config, plan.dtype, 32 if plan.tiny else PROMPT_TOKENS
        side, picture = _picture(plan)
        tiles, visual = picture.tiles, picture.visual_tokens
        return [
            BenchCase(
                f"batch {rows}, a picture of {side} x {side} and {tokens} tokens each",
                {"rows": rows, "side": side, "tiles": rows * tiles, "tokens": tokens},
                importance=0 if rows == 1 else 1,
                dtype=dtype,
                flops=rows * picture.flops + costs.language_flops(config, rows, tokens, 0, visual),
                bytes=costs.vision_bytes(config, dtype, rows * tiles)
                + costs.language_bytes(config, dtype, rows, tokens, 0, rows * visual),
                series=(("time to first token", "batch", rows),),
                preset=plan.preset,
                pictures=rows,
            )
            for rows in _batches(plan)
        ]

    def make_inputs(self, case: BenchCase, device: torch.device, seed: int) -> Inputs:
        """Return the model, the processor, the files and the prompts."""
        model = models.load_model(case.preset, case.dtype, device)
        ids = models.make_ids(model.config, case.sizes["rows"], case.sizes["tokens"], device)
        return super().make_inputs(case, device, seed) | {"model": model, "ids": ids}

    def make_run(self, case: BenchCase, inputs: Inputs) -> Prepared:
        """Return the way to the first token, with its stages and the further tokens' step."""
        model, ids = inputs["model"], inputs["ids"]
        to_tiles = _preprocess(case, inputs)

        def prefill(features: torch.Tensor) -> Any:
            context = models.make_context(model, features, len(ids))
            return model(input_ids=ids, visual_context=context, use_cache=True, logits_to_keep=1)

        def first_token() -> torch.Tensor:
            return prefill(model.get_image_features(*to_tiles.run())[0]).logits

        # Each stage is timed on what the one before it gives.
        pixels, grids = to_tiles.run()
        features, _ = model.get_image_features(pixels, grids)
        context = models.make_context(model, features, len(ids))
        filled = prefill(features)
        past = [torch.stack((layer.keys, layer.values)) for layer in filled.past_key_values.layers]
        stages = to_tiles.stages | {
            "vision": lambda: model.get_image_features(pixels, grids),
            "K/V": lambda: models.key_values_of(model, features),
            "prefill": lambda: model(input_ids=ids, visual_context=context, use_cache=True, logits_to_keep=1),
            "token": run_from_cache(model, filled.logits[:, -1].argmax(-1, keepdim=True), context, past),
        }
        return Prepared(first_token, stages)


models.register_model_stage(EndToEnd(), graph=False)
