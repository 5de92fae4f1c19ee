"""The model's two halves: the vision tower, and the language model with its gated blocks, a prompt or one step of it."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from infimm_fast.benchmarks.registry import BenchCase, Plan, Run
from infimm_fast.benchmarks.suites.model import ModelStage, load_model, make_context, make_ids, register_model_stage
from infimm_fast.kernels.common.cases import Inputs
from infimm_fast.kernels.common.numerics import outlier_normal
from infimm_fast.models.infimm_hd.costs import language_bytes, language_flops, vision_bytes, vision_flops

PROMPT_TOKENS = 128
_BATCHES = (1, 4, 16)


class VisionTower(ModelStage):
    """Pixels ``[tiles, 3, S, S]`` to features, up to the block that the language model sees."""

    name, section = "vision_tower", "vision"
    largest_graph = 1

    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return the preset's numbers of tiles."""
        config = plan.config
        return [
            BenchCase(
                name=f"{tiles} tile{'s' * (tiles > 1)}",
                sizes={"tiles": tiles},
                dtype=plan.dtype,
                flops=vision_flops(config, tiles),
                bytes=vision_bytes(config, plan.dtype, tiles),
                importance=0 if tiles == plan.tile_counts[-1] else 2,
                series=(("vision tower", "tiles", tiles),),
                preset=plan.preset,
            )
            for tiles in plan.tile_counts
        ]

    def make_inputs(self, case: BenchCase, device: torch.device, seed: int) -> Inputs:
        """Return the model and normalised pixels."""
        model = load_model(case.preset, case.dtype, device)
        vision = model.config.vision_config
        shape = (case.sizes["tiles"], vision.num_channels, vision.image_size, vision.image_size)
        return {"model": model, "pixels": outlier_normal(*shape, dtype=case.torch_dtype, device=device, seed=seed)}

    def make_run(self, case: BenchCase, inputs: Inputs) -> Run:
        """Return a pass of the tower."""
        model, pixels = inputs["model"], inputs["pixels"]
        return lambda: model.vision_tower(pixels, model.config.vision_feature_layer)


class _LanguageStage(ModelStage):
    """What prefill and decoding share: rows of text, each with a picture whose tokens are given."""

    largest_graph = 1

    def make_case(self, plan: Plan, rows: int, tokens: int, past: int, main: bool) -> BenchCase:
        """Return a case of `tokens` new tokens for each row, after `past` others."""
        config, visual = plan.config, plan.tile_counts[-1] * plan.config.visual_tokens_per_tile
        name = f"batch {rows}, after {past} tokens" if past else f"batch {rows}, {tokens} tokens"
        point = ("one step", "batch", rows) if past else ("batch 1", "text tokens", tokens)
        return BenchCase(
            name=name,
            sizes={"rows": rows, "tokens": tokens, "past": past, "visual": visual},
            dtype=plan.dtype,
            flops=language_flops(config, rows, tokens, past, visual),
            bytes=language_bytes(config, plan.dtype, rows, tokens, past, rows * visual),
            importance=0 if main else 2,
            series=(point,) if past or rows == 1 else (),
            preset=plan.preset,
        )

    def make_inputs(self, case: BenchCase, device: torch.device, seed: int) -> Inputs:
        """Return the model, new tokens, the visual tokens, and keys and values of each layer before the new tokens."""
        model, sizes, dtype = load_model(case.preset, case.dtype, device), case.sizes, case.torch_dtype
        ids = make_ids(model.config, sizes["rows"], sizes["tokens"], device)
        shape = (sizes["rows"] * sizes["visual"], model.config.vision_config.hidden_size)
        text = model.config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        # Without a past empty, but there: a cache that comes into being while a graph is captured may copy from the host.
        layer = (2, sizes["rows"], text.num_key_value_heads, sizes["past"], head_dim)
        return {
            "model": model,
            # After a past the row's picture stands in it, and the new token is text.
            "ids": ids * 0 + 5 if sizes["past"] else ids,
            "features": outlier_normal(*shape, dtype=dtype, device=device, seed=seed),
            "past": [
                outlier_normal(*layer, dtype=dtype, device=device, seed=seed + 1 + index)
                for index in range(text.num_hidden_layers)
            ],
        }


class Prefill(_LanguageStage):
    """A prompt through the language model; the pictures are encoded, and their K/V projected if the implementation does."""

    name, section = "prefill", "prefill"

    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return batches of short prompts, and longer prompts."""
        sizes = [*((rows, PROMPT_TOKENS) for rows in _BATCHES), (1, 512), (1, 2048)]
        if plan.tiny:
            sizes = [(1, 32), (2, 32), (1, 128)]
        return [self.make_case(plan, rows, tokens, 0, main=(rows, tokens) == sizes[0]) for rows, tokens in sizes]

    def make_run(self, case: BenchCase, inputs: Inputs) -> Run:
        """Return a pass over the whole prompt that fills a cache and gives the last token's logits."""
        model, ids = inputs["model"], inputs["ids"]
        context = make_context(model, inputs["features"], len(ids))
        # Said in words, since reading it off the tokens makes the host wait.
        seen = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        return run_from_cache(model, ids, context, inputs["past"], images_seen=seen)


class Decode(_LanguageStage):
    """One new token for each row, after a prompt with a picture."""

    name, section = "decode_step", "decode"

    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return batches."""
        past, batches = (32, (1, 2)) if plan.tiny else (PROMPT_TOKENS, _BATCHES)
        return [self.make_case(plan, rows, 1, past, main=rows == 1) for rows in batches]

    def make_run(self, case: BenchCase, inputs: Inputs) -> Run:
        """Return one step."""
        model, ids = inputs["model"], inputs["ids"]
        return run_from_cache(model, ids, make_context(model, inputs["features"], len(ids)), inputs["past"])


def run_from_cache(model, ids: torch.Tensor, context, past: list[torch.Tensor], **inputs: torch.Tensor) -> Run:
    """Return a function that runs new tokens from the same cache every time and gives the last one's logits.

    Args:
        model: the model.
        ids: new tokens ``[B, T]``.
        context: the pictures.
        past: keys and values of each layer, ``[2, B, heads, past, head_dim]``.
        **inputs: others of the model.
    """
    cache = DynamicCache(config=model.config.text_config)
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    # Layers with a sliding window count their tokens besides.
    kept = [dict(vars(layer)) for layer in cache.layers]
    options = {"visual_context": context, "use_cache": True, "logits_to_keep": 1}

    def run() -> torch.Tensor:
        for layer, state in zip(cache.layers, kept, strict=True):
            vars(layer).update(state)
        return model(input_ids=ids, past_key_values=cache, **options, **inputs).logits

    return run


register_model_stage(VisionTower(), gated_blocks=False)
register_model_stage(Prefill())
register_model_stage(Decode())
