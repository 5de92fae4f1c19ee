"""The attention of one layer of a vision tower over a batch of tiles."""

from __future__ import annotations

from functools import partial

import torch

from infimm_fast.benchmarks.registry import BenchCase, OpStage, Plan, needs_cuda, own_cases, register_stage
from infimm_fast.benchmarks.suites.attention import FLEX_PROPERTIES, FORCED, flex, naive, register_attention, sdpa
from infimm_fast.kernels.common.cases import Case, Inputs
from infimm_fast.kernels.subimage.cases import OP


def _cases(plan: Plan) -> list[BenchCase]:
    """Return the preset's tower at every number of tiles, the backward pass of the largest, and other towers."""
    vision, largest = plan.config.vision_config, plan.tile_counts[-1]
    shape = {"tokens": vision.tokens_per_tile, "heads": vision.num_attention_heads, "head_dim": vision.head_dim}
    cases = []
    for tiles in plan.tile_counts:
        name, importance = f"{plan.preset}, {tiles} tile{'s' * (tiles > 1)}", 0 if tiles == largest else 2
        case = Case(name, {"tiles": tiles} | shape, importance=importance)
        cases.append(BenchCase.of_op(OP, case, plan.dtype, series=((plan.preset, "tiles", tiles),)))
    trained = Case(f"{plan.preset}, {largest} tiles, with backward", {"tiles": largest} | shape, backward=True)
    cases.append(BenchCase.of_op(OP, trained, plan.dtype))
    if plan.tiles is None and not plan.tiny:
        known = [(case.sizes, case.backward) for case in cases]
        cases += [case for case in own_cases(OP, plan.dtype) if (case.sizes, case.backward) not in known]
    return cases


def _parts(case: BenchCase, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Return q, k and v as a qkv projection leaves them."""
    return inputs["qkv"].unbind(2)


register_stage(OpStage(OP, "ops", _cases))
_register = partial(register_attention, OP.name, _parts)
_register("naive", lambda case, device: naive)
_register("naive compiled", lambda case, device: torch.compile(naive, dynamic=False), setup_seconds=10)
_register("sdpa", lambda case, device: sdpa())
for _name, _backend in FORCED.items():
    _register(f"sdpa {_name}", partial(lambda backend, case, device: sdpa(None, backend), _backend), requires=needs_cuda)
for _name, _properties in FLEX_PROPERTIES.items():
    _register(_name, partial(lambda mode, case, device: flex(mode), _name), **_properties)
