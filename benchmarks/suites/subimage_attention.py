"""The attention of one layer of a vision tower over a batch of tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from infimm_fast.benchmarks.cases import BACKWARD_FACTOR, TOWERS, TowerShape, item_size, self_attention_flops, tower_shape
from infimm_fast.benchmarks.inputs import random_tensor, spread
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
from infimm_fast.kernels import subimage_attention
from infimm_fast.kernels.subimage.reference import subimage_attention_reference

NAME = "subimage_attention"
# Tiles do not see each other, and the fp64 reference of all of them would not fit.
_CHECKED_TILES = 2


@register_op
class SubimageAttention(Op):
    """Self-attention of tiles on ``[B, N, 3, H, D]``, as a qkv projection writes it; the first and last tile are checked."""

    name = NAME
    section = "ops"
    leaves = ("qkv",)

    def cases(self, plan: Plan) -> list[Case]:
        """Return the preset's tower at every number of tiles, other towers, and the backward pass of the largest."""
        counts = plan.tile_counts
        cases = [
            _make_case(
                f"{plan.preset}, {tiles} tile{'s' * (tiles > 1)}",
                tower_shape(plan.config.vision_config, tiles),
                plan,
                importance=0 if tiles == counts[-1] else 2,
                series=((plan.preset, "tiles", tiles),),
            )
            for tiles in counts
        ]
        largest = tower_shape(plan.config.vision_config, counts[-1])
        cases.append(_make_case(f"{plan.preset}, {counts[-1]} tiles, with backward", largest, plan, 1, backward=True))
        if plan.tiles is None and not plan.tiny:
            cases += [_make_case(name, shape, plan, 1) for name, shape in TOWERS.items() if name != "InfiMM-HD"]
        return cases

    def make_inputs(self, case: Case, device: torch.device, seed: int) -> Inputs:
        """Return qkv, views of its parts without a history, and the gradient that arrives at the output."""
        sizes = case.sizes
        shape = (sizes["tiles"], sizes["tokens"], 3, sizes["heads"], sizes["head_dim"])
        qkv = random_tensor(*shape, dtype=case.torch_dtype, device=device, seed=seed).requires_grad_(case.backward)
        q, k, v = qkv.detach().unbind(2)
        inputs: Inputs = {"qkv": qkv, "q": q, "k": k, "v": v}
        if case.backward:
            inputs["gradients"] = (random_tensor(*q.shape, dtype=case.torch_dtype, device=device, seed=seed + 1),)
        return inputs

    def reference(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the plain statement's result on the checked tiles."""
        chosen = spread(case.sizes["tiles"], _CHECKED_TILES)
        qkv = inputs["qkv"].detach()[chosen].to(dtype).requires_grad_(case.backward)
        q, k, v = qkv.unbind(2)
        out, _ = subimage_attention_reference(q, k, v, case.sizes["head_dim"] ** -0.5)
        if not case.backward:
            return {"out": out}
        (gradient,) = torch.autograd.grad(out, qkv, inputs["gradients"][0][chosen].to(dtype))
        return {"out": out.detach()} | _name_gradients(gradient)

    def checked(self, case: Case, outputs: tuple[torch.Tensor, ...]) -> Outputs:
        """Return output and gradients of the checked tiles, the gradients apart."""
        chosen = spread(case.sizes["tiles"], _CHECKED_TILES)
        parts = {"out": outputs[0][chosen]}
        return parts | _name_gradients(outputs[1][chosen]) if case.backward else parts


def _name_gradients(gradient: torch.Tensor) -> Outputs:
    return dict(zip(("dq", "dk", "dv"), gradient.unbind(2), strict=True))


def _make_case(
    name: str,
    shape: TowerShape,
    plan: Plan,
    importance: int,
    backward: bool = False,
    series: tuple[Series, ...] = (),
) -> Case:
    flops = self_attention_flops(shape)
    tensor = shape.tiles * shape.tokens * shape.heads * shape.head_dim * item_size(plan.dtype)
    # Forward: q, k, v, out. Backward besides: the output and its gradient, q, k, v again, and three gradients.
    return Case(
        name=name,
        sizes=vars(shape),
        dtype=plan.dtype,
        flops=flops + int(flops * BACKWARD_FACTOR) if backward else flops,
        bytes=(4 + 8) * tensor if backward else 4 * tensor,
        importance=importance,
        backward=backward,
        series=series,
    )


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Matrix product, softmax, matrix product on ``[B, N, H, D]``, as towers without a fused attention do it."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _forced_sdpa(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return attention


def _ours(backend: str) -> Callable[..., torch.Tensor]:
    return lambda q, k, v: subimage_attention(q, k, v, backend=backend)  # type: ignore[return-value]


def _parts_of(case: Case, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return the function that gives q, k and v to a run.

    With a backward pass every run makes the views anew: those made before a CUDA graph is captured belong to another
    stream, and autograd would have to wait for that.
    """
    if case.backward:
        return lambda: inputs["qkv"].unbind(2)
    parts = tuple(inputs[name] for name in "qkv")
    return lambda: parts


def _on_inputs(attention: Callable[..., torch.Tensor]) -> Callable[[Case, Inputs], Run]:
    def prepare(case: Case, inputs: Inputs) -> Run:
        parts = _parts_of(case, inputs)
        return lambda: attention(*parts())

    return prepare


def _flex(mode: str) -> Callable[[Case, Inputs], Run]:
    def prepare(case: Case, inputs: Inputs) -> Run:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False, mode=mode)
        parts = _parts_of(case, inputs)

        def run() -> torch.Tensor:
            q, k, v = (part.transpose(1, 2) for part in parts())
            return compiled(q, k, v).transpose(1, 2)

        return run

    return prepare


def _compiled_naive(case: Case, inputs: Inputs) -> Run:
    compiled, parts = torch.compile(naive, dynamic=False), _parts_of(case, inputs)
    return lambda: compiled(*parts())


register_implementation(NAME, "naive")(_on_inputs(naive))
register_implementation(NAME, "naive compiled", setup_seconds=10)(_compiled_naive)
register_implementation(NAME, "sdpa")(_on_inputs(_sdpa))
for _name, _backend in {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}.items():
    register_implementation(NAME, _name, requires=needs_cuda)(_on_inputs(_forced_sdpa(_backend)))
register_implementation(NAME, "flex", requires=needs_cuda, setup_seconds=8)(_flex("default"))
register_implementation(NAME, "flex max-autotune", requires=needs_cuda, setup_seconds=30, main_only=True)(
    _flex("max-autotune-no-cudagraphs")
)
register_implementation(NAME, "infimm_fast sdpa", ours=True)(_on_inputs(_ours("sdpa")))
register_implementation(NAME, "infimm_fast", ours=True, requires=needs_cuda)(_on_inputs(_ours("triton")))
