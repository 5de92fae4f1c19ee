"""One whole gated block: norm, queries, attention, output projection, gate, feed-forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from infimm_fast.benchmarks import registry
from infimm_fast.benchmarks.registry import BenchCase, Plan, Run, Stage
from infimm_fast.benchmarks.suites import interval_attention as interval
from infimm_fast.benchmarks.suites.attention import Maker, once_for_case, sdpa
from infimm_fast.dtypes import DTYPES
from infimm_fast.kernels.common.cases import Cost, Inputs, Outputs
from infimm_fast.kernels.common.numerics import outlier_normal
from infimm_fast.kernels.interval.cases import checked_part, make_kv_range, visible_pairs, visual_tokens
from infimm_fast.models.infimm_hd import costs
from infimm_fast.models.infimm_hd.fused_gated_cross_attention import FusedGatedCrossAttentionBlock
from infimm_fast.models.infimm_hd.modeling_gated_cross_attention import GatedCrossAttentionBlock

NAME = "gated_block"


class GatedBlock(Stage):
    """A gated block on text states ``[B, T, C]``, with K/V of the pictures given to whoever can use them."""

    name, section = NAME, "cross"

    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return the cases of the op, at the preset's width of the language model."""
        config, cases = plan.config, []
        hidden = config.text_config.hidden_size
        widths = {"hidden": hidden, "visual": config.vision_config.hidden_size}
        widths["inner"] = int(hidden * config.cross_attention_ff_mult)
        for case, series in interval.model_cases(plan):
            sizes, text = case.sizes, case.sizes["rows"] * case.sizes["tokens"]
            moved = costs.gated_block_parameters(config) + 2 * text * hidden
            moved += 2 * visual_tokens(sizes) * sizes["heads"] * sizes["head_dim"]
            cost = Cost(costs.one_gated_block_flops(config, text, visible_pairs(sizes)), moved * DTYPES[plan.dtype].itemsize)
            wider = replace(case, sizes={**sizes, **widths})
            cases.append(BenchCase(**vars(wider), **vars(cost), dtype=plan.dtype, series=series))
        return cases

    def make_inputs(self, case: BenchCase, device: torch.device, seed: int) -> Inputs:
        """Return the block, text states, visual tokens with their keys and values, and the intervals."""
        sizes, dtype = case.sizes, case.torch_dtype
        block = _make_block(case, device, seed)
        features = outlier_normal(visual_tokens(sizes), sizes["visual"], dtype=dtype, device=device, seed=seed + 1)
        shape = (len(features), sizes["kv_blocks"], 2, sizes["heads"], sizes["head_dim"])
        kv = torch.empty(shape, dtype=dtype, device=device)[:, 0]
        kv[:, 0], kv[:, 1] = block.attn.project_visual(features)
        return {
            "block": block,
            "x": outlier_normal(sizes["rows"], sizes["tokens"], sizes["hidden"], dtype=dtype, device=device, seed=seed + 2),
            "features": features,
            "key_value": (kv[:, 0], kv[:, 1]),
            "kv_range": make_kv_range(sizes, device),
            "has_image": torch.ones(sizes["rows"], dtype=torch.bool, device=device),
        }

    def reference(self, case: BenchCase, inputs: Inputs, dtype: torch.dtype) -> Outputs:
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

    def checked(self, case: BenchCase, results: tuple[torch.Tensor, ...]) -> Outputs:
        """Return the output of the checked text tokens."""
        rows, tokens = checked_part(case)
        return {"out": results[0][rows][:, tokens]}


def _make_block(case: BenchCase, device: torch.device, seed: int) -> GatedCrossAttentionBlock:
    """Return a block whose gates and norms all matter."""
    sizes = case.sizes
    with torch.device("meta"):
        mult = sizes["inner"] / sizes["hidden"]
        block = GatedCrossAttentionBlock(sizes["hidden"], sizes["visual"], sizes["heads"], sizes["head_dim"], mult)
    block = block.to(case.torch_dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in block.named_parameters():
        matrix = parameter.ndim == 2
        parameter.normal_(std=parameter.shape[1] ** -0.5 if matrix else 0.5, generator=generator)
        parameter.add_(float(name.endswith("norm.weight")))
    return block


def _plain_block(make: Maker, project: bool = False) -> Callable[[BenchCase, Inputs], Run]:
    """Prepare the block's plain layers around an attention on padded batches.

    Args:
        make: returns the attention.
        project: project the visual tokens again in every run, as models without a cache for them do.
    """
    make = once_for_case(make)

    def prepare(case: BenchCase, inputs: Inputs) -> Run:
        block, x = inputs["block"], inputs["x"]
        attention = make(case, x.device)
        attn, feed_forward = block.attn, block.ff
        keep = inputs["has_image"][:, None, None].to(x.dtype)
        features = interval.padded(case, inputs["features"])  # [B, S_row, C_v]
        cached = [interval.padded(case, tensor) for tensor in inputs["key_value"]]

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


def _our_block(backend: str, fused: bool = False, fold: bool = False) -> Callable[[BenchCase, Inputs], Run]:
    """Prepare the library's block: the plain one with our attention, the fused one, or that folded."""

    def prepare(case: BenchCase, inputs: Inputs) -> Run:
        # A copy, since the blocks of all implementations share their submodules, and those hold the switch.
        block = copy.deepcopy(inputs["block"])
        if fused:
            block = FusedGatedCrossAttentionBlock.from_block(block)
        block.attn.backend = backend
        if fold:
            block.fold()
        arguments = [inputs[name] for name in ("x", "kv_range", "has_image", "features", "key_value")]
        return lambda: block(*arguments)

    return prepare


registry.register_stage(GatedBlock())
_register = partial(registry.register_implementation, NAME)
_register("naive")(_plain_block(interval.masked_naive, project=True))
_register("naive, K/V cached")(_plain_block(interval.masked_naive))
_register("sdpa dense mask")(_plain_block(lambda case, device: sdpa(interval.additive_mask(case, device))))
_register("sdpa unmasked", requires=interval.needs_full_visibility)(_plain_block(lambda case, device: sdpa()))
_register("flex", requires=registry.needs_cuda, setup_seconds=8)(_plain_block(interval.masked_flex("flex")))
_register("infimm_fast", ours=True, requires=registry.needs_cuda)(_our_block("triton"))
_register("fused", ours=True)(_our_block("auto", fused=True))
_register("fused folded", ours=True)(_our_block("auto", fused=True, fold=True))
