"""One whole gated block: norm, queries, attention, output projection, gate, feed-forward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from infimm_fast.benchmarks.cases import gated_block_parameters, item_size, one_gated_block_flops
from infimm_fast.benchmarks.inputs import random_tensor
from infimm_fast.benchmarks.registry import (
    Case,
    Inputs,
    Op,
    Outputs,
    Plan,
    Run,
    Series,
    needs_cuda,
    register_implementation,
    register_op,
)
from infimm_fast.benchmarks.suites.interval_attention import (
    Attention,
    additive_mask,
    checked_part,
    flex_attention_of,
    make_attention_cases,
    make_kv_range,
    naive_attention,
    needs_full_visibility,
    once_for_case,
    padded,
    sdpa_attention,
    visible_pairs,
    visual_tokens,
)
from infimm_fast.models.infimm_hd.fused_gated_cross_attention import FusedGatedCrossAttentionBlock
from infimm_fast.models.infimm_hd.modeling_gated_cross_attention import GatedCrossAttentionBlock

NAME = "gated_block"


@register_op
class GatedBlock(Op):
    """A gated block on text states ``[B, T, C]``, with K/V of the pictures given to whoever can use them."""

    name = NAME
    section = "cross"

    def cases(self, plan: Plan) -> list[Case]:
        """Return the cases of the op, at the preset's width of the language model."""
        config = plan.config

        def make(name: str, sizes: dict[str, int], importance: int, series: tuple[Series, ...]) -> Case:
            text = sizes["rows"] * sizes["tokens"]
            hidden = config.text_config.hidden_size
            moved = gated_block_parameters(config) + 2 * text * hidden
            moved += 2 * visual_tokens(sizes) * sizes["heads"] * sizes["head_dim"]
            return Case(
                name=name,
                sizes=sizes
                | {
                    "hidden": hidden,
                    "visual": config.vision_config.hidden_size,
                    "inner": int(hidden * config.cross_attention_ff_mult),
                },
                dtype=plan.dtype,
                flops=one_gated_block_flops(config, text, visible_pairs(sizes)),
                bytes=moved * item_size(plan.dtype),
                importance=importance,
                series=series,
            )

        return make_attention_cases(plan, make)

    def make_inputs(self, case: Case, device: torch.device, seed: int) -> Inputs:
        """Return the block, text states, visual tokens with their keys and values, and the intervals."""
        sizes, dtype = case.sizes, case.torch_dtype
        block = _make_block(sizes, dtype, device, seed)
        features = random_tensor(visual_tokens(sizes), sizes["visual"], dtype=dtype, device=device, seed=seed + 1)
        shape = (len(features), sizes["kv_blocks"], 2, sizes["heads"], sizes["head_dim"])
        kv = torch.empty(shape, dtype=dtype, device=device)[:, 0]
        keys, values = block.attn.project_visual(features)
        kv[:, 0], kv[:, 1] = keys, values
        return {
            "block": block,
            "x": random_tensor(sizes["rows"], sizes["tokens"], sizes["hidden"], dtype=dtype, device=device, seed=seed + 2),
            "features": features,
            "key_value": (kv[:, 0], kv[:, 1]),
            "kv_range": make_kv_range(case, device),
            "has_image": torch.ones(sizes["rows"], dtype=torch.bool, device=device),
        }

    def reference(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the plain block's result for the checked text tokens, one row at a time."""
        block = copy.deepcopy(inputs["block"]).to(dtype)
        block.attn.backend = "reference"
        rows, tokens = checked_part(case)
        parts = []
        for row in rows:
            kv_range = inputs["kv_range"][row, tokens]
            start, end = int(kv_range[:, 0].min()), int(kv_range[:, 1].max())
            x, features = inputs["x"][row, tokens][None].to(dtype), inputs["features"][start:end].to(dtype)
            parts.append(block(x, (kv_range - start)[None], inputs["has_image"][:1], features))
        return {"out": torch.cat(parts)}

    def checked(self, case: Case, outputs: tuple[torch.Tensor, ...]) -> Outputs:
        """Return the output of the checked text tokens."""
        rows, tokens = checked_part(case)
        return {"out": outputs[0][rows][:, tokens]}


def _make_block(sizes: dict[str, int], dtype: torch.dtype, device: torch.device, seed: int) -> GatedCrossAttentionBlock:
    """Return a block whose gates and norms all matter."""
    with torch.device("meta"):
        mult = sizes["inner"] / sizes["hidden"]
        block = GatedCrossAttentionBlock(sizes["hidden"], sizes["visual"], sizes["heads"], sizes["head_dim"], mult)
    block = block.to(dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.normal_(std=0.5, generator=generator)
            parameter.add_(float(name.endswith("norm.weight")))
    return block


def _plain_block(make: Callable[[Case, torch.device], Attention], project: bool = False) -> Callable[[Case, Inputs], Run]:
    """Prepare the block's plain layers around an attention on padded batches.

    Args:
        make: returns the attention.
        project: project the visual tokens again in every run, as models without a cache for them do.
    """
    make = once_for_case(make)

    def prepare(case: Case, inputs: Inputs) -> Run:
        block, x = inputs["block"], inputs["x"]
        attention = make(case, x.device)
        attn, feed_forward = block.attn, block.ff
        keep = inputs["has_image"][:, None, None].to(x.dtype)
        features = padded(case, inputs["features"])  # [B, S_row, C_v]
        cached = [padded(case, tensor) for tensor in inputs["key_value"]]

        def run() -> torch.Tensor:
            k, v = cached
            if project:
                k, v = attn.kv_proj(features).unflatten(-1, (2, attn.num_heads, attn.head_dim)).unbind(2)
            q = attn.q_proj(attn.norm(x)).unflatten(-1, (attn.num_heads, attn.head_dim))
            out = attn.o_proj(attention(q, k, v).flatten(2))
            hidden = x + keep * block.attn_gate.tanh() * out
            return hidden + keep * block.ff_gate.tanh() * feed_forward(hidden)

        return run

    return prepare


def _our_block(implementation: str, fused: bool = False, fold: bool = False) -> Callable[[Case, Inputs], Run]:
    """Prepare the library's block: the plain one with our attention, the fused one, or that folded."""

    def prepare(case: Case, inputs: Inputs) -> Run:
        # A copy, since the blocks of all implementations share their submodules, and those hold the switch.
        block = copy.deepcopy(inputs["block"])
        if fused:
            block = FusedGatedCrossAttentionBlock.from_block(block)
        block.attn.backend = implementation
        if fold:
            block.fold()
        arguments = [inputs[name] for name in ("x", "kv_range", "has_image", "features", "key_value")]
        return lambda: block(*arguments)

    return prepare


def _naive(case: Case, device: torch.device) -> Attention:
    return naive_attention(additive_mask(case, device))


register_implementation(NAME, "naive")(_plain_block(_naive, project=True))
register_implementation(NAME, "naive, K/V cached")(_plain_block(_naive))
register_implementation(NAME, "sdpa dense mask")(
    _plain_block(lambda case, device: sdpa_attention(additive_mask(case, device)))
)
register_implementation(NAME, "sdpa unmasked", requires=needs_full_visibility)(
    _plain_block(lambda case, device: sdpa_attention(None))
)
register_implementation(NAME, "flex", requires=needs_cuda, setup_seconds=8)(
    _plain_block(lambda case, device: flex_attention_of(case, device, "default"))
)
register_implementation(NAME, "infimm_fast", ours=True, requires=needs_cuda)(_our_block("triton"))
register_implementation(NAME, "fused", ours=True)(_our_block("auto", fused=True))
register_implementation(NAME, "fused folded", ours=True)(_our_block("auto", fused=True, fold=True))
