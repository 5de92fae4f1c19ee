"""The attention of one layer of a vision tower over a batch of tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch

from infimm_fast.benchmarks.registry import (
    BenchCase,
    OpStage,
    Plan,
    needs_cuda,
    own_cases,
    register_implementation,
    register_stage,
)
from infimm_fast.benchmarks.suites.attention import (
    FLEX_MODES,
    FORCED,
    Maker,
    flex,
    flex_properties,
    naive,
    once_for_case,
    sdpa,
)
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


def _on_views(make: Maker) -> Callable[[BenchCase, Inputs], Callable[[], torch.Tensor]]:
    """Prepare an attention on q, k and v as a qkv projection leaves them."""
    make = once_for_case(make)

    def prepare(case: BenchCase, inputs: Inputs) -> Callable[[], torch.Tensor]:
        attention = make(case, inputs["qkv"].device)
        if case.backward:
            # Views made before a CUDA graph is captured belong to another stream; autograd would have to wait for that.
            return lambda: attention(*inputs["qkv"].unbind(2))
        q, k, v = (inputs[name] for name in "qkv")
        return lambda: attention(q, k, v)

    return prepare


register_stage(OpStage(OP, "ops", _cases))
register_implementation(OP.name, "naive")(_on_views(lambda case, device: naive))
register_implementation(OP.name, "naive compiled", setup_seconds=10)(
    _on_views(lambda case, device: torch.compile(naive, dynamic=False))
)
register_implementation(OP.name, "sdpa")(_on_views(lambda case, device: sdpa()))
for _name, _backend in FORCED.items():
    register_implementation(OP.name, f"sdpa {_name}", requires=needs_cuda)(
        _on_views(lambda case, device, backend=_backend: sdpa(None, backend))  # type: ignore[misc]
    )
for _name in FLEX_MODES:
    register_implementation(OP.name, _name, requires=needs_cuda, **flex_properties(_name))(
        _on_views(lambda case, device, mode=_name: flex(mode))  # type: ignore[misc]
    )
