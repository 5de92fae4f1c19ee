"""The language model with its gated blocks: prefill of a prompt, and one decoding step."""

from __future__ import annotations

import torch
from transformers import DynamicCache

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
        return lambda: (
            model(input_ids=ids, visual_context=context, images_seen=seen, use_cache=True, logits_to_keep=1).logits
        )


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
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shape = (2, case.sizes["rows"], text.num_key_value_heads, case.sizes["past"], head_dim)
        past = [
            random_tensor(*shape, dtype=case.torch_dtype, device=device, seed=seed + 1 + layer)
            for layer in range(text.num_hidden_layers)
        ]
        # The row's picture stands in the prompt; the new token is text.
        return inputs | {"ids": inputs["ids"] * 0 + 5, "past": past}

    def make_run(self, case: Case, inputs: Inputs) -> Run:
        """Return one step."""
        model, ids = inputs["model"], inputs["ids"]
        return decode_step(model, ids, make_context(model, inputs["features"], len(ids)), inputs["past"])


def decode_step(model, ids: torch.Tensor, context, past: list[torch.Tensor]) -> Run:
    """Return a function that runs one decoding step from the same cache every time and gives the logits.

    Args:
        model: the model.
        ids: new tokens ``[B, 1]``.
        context: the pictures.
        past: keys and values of each layer, ``[2, B, heads, past, head_dim]``.
    """
    cache = DynamicCache(config=model.config.text_config)
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    kept = [(layer.keys, layer.values) for layer in cache.layers]

    def run() -> torch.Tensor:
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        return model(input_ids=ids, past_key_values=cache, visual_context=context, use_cache=True, logits_to_keep=1).logits

    return run


register_model_implementations(Prefill)
register_model_implementations(Decode)
