"""The language model with its gated blocks: prefill of a prompt, and one decoding step."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PretrainedConfig

from infimm_fast.benchmarks.cases import language_bytes, language_flops
from infimm_fast.benchmarks.inputs import random_tensor
from infimm_fast.benchmarks.registry import Case, Inputs, Plan, Run, register_op
from infimm_fast.benchmarks.suites.model import (
    ModelOp,
    load_model,
    make_context,
    make_ids,
    register_model_implementations,
)

PROMPT_TOKENS = 128
_BATCHES = (1, 4, 16)


def _visual_tokens(plan: Plan) -> int:
    return plan.tile_counts[-1] * plan.config.visual_tokens_per_tile


def _inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Return the model, a prompt and the visual tokens of a picture for each row."""
    model = load_model(case.preset, case.dtype, device)
    rows, width = case.sizes["rows"], model.config.vision_config.hidden_size
    return {
        "model": model,
        "ids": make_ids(model.config, rows, case.sizes["tokens"], device),
        "features": random_tensor(rows * case.sizes["visual"], width, dtype=case.torch_dtype, device=device, seed=seed),
    }


@register_op
class Prefill(ModelOp):
    """A prompt through the language model; the pictures are encoded, and their K/V projected if the implementation does."""

    name = "prefill"
    section = "prefill"
    largest_graph = 1

    def cases(self, plan: Plan) -> list[Case]:
        """Return batches of short prompts, and longer prompts."""
        sizes = [*((rows, PROMPT_TOKENS) for rows in _BATCHES), (1, 512), (1, 2048)]
        if plan.tiny:
            sizes = [(1, 32), (2, 32), (1, 128)]
        visual = _visual_tokens(plan)
        return [
            Case(
                name=f"batch {rows}, {tokens} tokens",
                sizes={"rows": rows, "tokens": tokens, "visual": visual},
                dtype=plan.dtype,
                flops=language_flops(plan.config, rows, tokens, 0, visual),
                bytes=language_bytes(plan.config, plan.dtype, rows, tokens, 0, rows * visual),
                importance=0 if rows == 1 and tokens == sizes[0][1] else 2,
                series=(("batch 1", "text tokens", tokens),) if rows == 1 else (),
                preset=plan.preset,
            )
            for rows, tokens in sizes
        ]

    def make_inputs(self, case: Case, device: torch.device, seed: int) -> Inputs:
        """Return the model, the prompt and the visual tokens."""
        return _inputs(case, device, seed)

    def make_run(self, case: Case, inputs: Inputs) -> Run:
        """Return a pass over the whole prompt that fills a cache and gives the last token's logits."""
        model, ids = inputs["model"], inputs["ids"]
        context = make_context(model, inputs["features"], len(ids))
        # Said in words, since reading it off the tokens makes the host wait.
        seen = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        # Empty, but there: a cache that comes into being while a graph is captured may copy from the host.
        shape = _cache_shape(model.config.text_config, len(ids), 0)
        past = [torch.empty(shape, dtype=model.dtype, device=ids.device)] * model.config.text_config.num_hidden_layers
        return run_from_cache(model, ids, context, past, images_seen=seen)


@register_op
class Decode(ModelOp):
    """One new token for each row, after a prompt with a picture."""

    name = "decode_step"
    section = "decode"
    largest_graph = 1

    def cases(self, plan: Plan) -> list[Case]:
        """Return batches."""
        past, visual = (32 if plan.tiny else PROMPT_TOKENS), _visual_tokens(plan)
        return [
            Case(
                name=f"batch {rows}, after {past} tokens",
                sizes={"rows": rows, "tokens": 1, "past": past, "visual": visual},
                dtype=plan.dtype,
                flops=language_flops(plan.config, rows, 1, past, visual),
                bytes=language_bytes(plan.config, plan.dtype, rows, 1, past, rows * visual),
                importance=0 if rows == 1 else 2,
                series=(("one step", "batch", rows),),
                preset=plan.preset,
            )
            for rows in ((1, 2) if plan.tiny else _BATCHES)
        ]

    def make_inputs(self, case: Case, device: torch.device, seed: int) -> Inputs:
        """Return the model, the new tokens, the visual tokens, and keys and values of the prompt for each layer."""
        inputs = _inputs(case, device, seed)
        text = inputs["model"].config.text_config
        shape = _cache_shape(text, case.sizes["rows"], case.sizes["past"])
        past = [
            random_tensor(*shape, dtype=case.torch_dtype, device=device, seed=seed + 1 + layer)
            for layer in range(text.num_hidden_layers)
        ]
        # The row's picture stands in the prompt; the new token is text.
        return inputs | {"ids": inputs["ids"] * 0 + 5, "past": past}

    def make_run(self, case: Case, inputs: Inputs) -> Run:
        """Return one step."""
        model, ids = inputs["model"], inputs["ids"]
        return run_from_cache(model, ids, make_context(model, inputs["features"], len(ids)), inputs["past"])


def _cache_shape(text: PretrainedConfig, rows: int, tokens: int) -> tuple[int, ...]:
    """Return the shape of one layer's keys and values."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2, rows, text.num_key_value_heads, tokens, head_dim


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


register_model_implementations(Prefill)
register_model_implementations(Decode)
