"""Attention inside tiles: the towers of published models, every head dim of the configuration table, odd sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch

from infimm_fast.kernels.common.cases import (
    BACKWARD_FACTOR,
    BENCH,
    GATE,
    PROFILE,
    SMALL,
    TUNE,
    Case,
    Cost,
    Inputs,
    Job,
    Op,
    Outputs,
    Rules,
    spread,
)
from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.common.numerics import outlier_normal
from infimm_fast.kernels.subimage.api import subimage_attention, subimage_attention_packed
from infimm_fast.kernels.subimage.config import HEAD_DIMS, choose_config
from infimm_fast.kernels.subimage.options import Options, Saved

# (tiles, tokens, heads, head dim) of attention in vision towers, by published configurations. Tiles of a large picture, or
# of the model's own limit.
TOWERS = {
    # 448 px, patch 14, class token; a 3 x 3 grid and the thumbnail.
    "InfiMM-HD": (10, 1025, 16, 112),
    # EVA02-CLIP-L at 336 px: one tile.
    "InfiMM-Zephyr": (1, 577, 16, 64),
    # so400m, patch 14, 384 px, no class token; four tiles and the thumbnail.
    "SigLIP": (5, 729, 16, 72),
    # Llama-3.2-Vision: 560 px, four tiles of 1601 tokens padded to 1608 that see each other.
    "Mllama": (1, 6432, 16, 80),
    # InternViT-300M at 448 px; twelve tiles and the thumbnail.
    "InternViT": (13, 1025, 16, 64),
    # CLIP-L at 336 px as in LLaVA-NeXT; four tiles and the thumbnail.
    "CLIP-L": (5, 577, 16, 64),
}
_TUNED = ("InfiMM-HD", "SigLIP", "Mllama", "InternViT")
# Tokens of what the gate compiles: a class token in front of full tiles, a tail, RoPE in the prologue, a window.
_GATED = {"peeled": 1025, "masked": 729, "rope": 1025, "short": 49}
# Tiles do not see each other, and the fp64 reference of all of them would not fit.
_CHECKED_TILES = 2
_GRADIENTS = ("dq", "dk", "dv")
# Products of matrices that a kernel computes.
_PRODUCTS = {"forward": 2, "backward_kv": 4, "backward_q": 3}


def _sizes(tiles: int, tokens: int, heads: int, head_dim: int, **flags: int) -> dict[str, int]:
    return {"tiles": tiles, "tokens": tokens, "heads": heads, "head_dim": head_dim, **flags}


def _make_cases() -> Iterator[Case]:
    for name, shape in TOWERS.items():
        first, rope = name == "InfiMM-HD", name == "InfiMM-Zephyr"
        uses = (BENCH, *(TUNE,) * (name in _TUNED), *(PROFILE,) * (name in _TUNED[1:]))
        yield Case(name, _sizes(*shape), importance=int(not first), uses=uses)
        if name in _TUNED:
            uses = (BENCH, TUNE, PROFILE) if first else (TUNE,)
            yield Case(
                f"{name}, with backward", _sizes(*shape), True, 1 if first else 2, uses, ("backward_kv", "backward_q")
            )
        if rope:
            yield Case(f"{name}, rope", _sizes(*shape, rope=1), uses=(PROFILE,))
    yield Case("InternViT-6B", _sizes(10, 1025, 25, 128), uses=(PROFILE,))
    for head_dim in sorted({*HEAD_DIMS} - {TOWERS[name][3] for name in _TUNED}):
        sizes = _sizes(10, 1025, 16, head_dim)
        yield Case(f"head dim {head_dim}", sizes, importance=2, uses=(TUNE,))
        yield Case(f"head dim {head_dim}, with backward", sizes, True, 3, (TUNE,), ("backward_kv", "backward_q"))
    for variant, tokens in _GATED.items():
        # In 32 bits the masked one, whose code contains the others'.
        dtypes = ("bfloat16", "float32") if variant == "masked" else ("bfloat16",)
        kernels = ("forward", "backward_kv", "backward_q") if variant in ("peeled", "masked") else ("forward",)
        for head_dim in HEAD_DIMS:
            sizes = _sizes(10, tokens, 16, head_dim, rope=int(variant == "rope"))
            yield Case(f"{variant}, head dim {head_dim}", sizes, len(kernels) > 1, 1, (GATE,), kernels, dtypes)
    for name, sizes in {
        # 129 tokens are a class token and full tiles of any width.
        "peeled": _sizes(2, 129, 3, 72, apart=1),
        "rope": _sizes(1, 77, 2, 80, rope=1, apart=1),
        "lengths": _sizes(3, 83, 1, 112, lengths=1, apart=1),
        "sequences": _sizes(1, 101, 2, 88, sequences=1, causal=1, apart=1),
        "window": _sizes(3, 49, 1, 104, packed=1),
    }.items():
        yield Case(f"small, {name}", sizes, backward=True, uses=(SMALL,))


class SubimageAttention(Op):
    """Self-attention of tiles on ``[tiles, tokens, 3, heads, head_dim]``, as a qkv projection writes it.

    Sizes: tiles, tokens, heads, head_dim; as flags rope (all but a class token are rotated), lengths (tiles of different
    lengths), sequences (several end to end in the only tile), causal, packed (the public function of that name), apart (q, k
    and v are tensors of their own, so that a sanitizer sees an access beside one). Small cases compare the log-sum-exp too.
    """

    name = "subimage_attention"
    leaves = ("qkv",)
    kernels: ClassVar = {
        "forward": "forward_kernel",
        "rotate": "rotate_kernel",
        "delta": "delta_kernel",
        "backward_kv": "key_value_kernel",
        "backward_q": "query_kernel",
    }
    fixed = ("rotate", "delta")
    cases = tuple(_make_cases())
    # On 90 masked and with triton 3.6 only, one store before the loop and one load behind it.
    spills: ClassVar = {
        ("backward_kv", "bfloat16", 88, 120): 4,
        ("backward_kv", "bfloat16", 88, 90): 2,
        ("backward_kv", "bfloat16", 96, 90): 2,
    }

    def make_inputs(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Return qkv, views of its parts without a history, the options of the call, and the gradient of the output."""
        sizes, tokens = case.sizes, case.sizes["tokens"]
        shape = (sizes["tiles"], tokens, 3, sizes["heads"], sizes["head_dim"])
        qkv = outlier_normal(*shape, dtype=dtype, device=device, seed=seed).requires_grad_(case.backward)
        options: dict[str, Any] = {"is_causal": bool(sizes.get("causal"))}
        if sizes.get("rope"):
            angle = torch.arange((tokens - 1) * sizes["head_dim"] // 2, device=device).view(tokens - 1, -1)
            angle = angle.repeat_interleave(2, 1)
            options |= {"rope_cos": angle.cos(), "rope_sin": angle.sin(), "rope_prefix": 1}
        if sizes.get("lengths"):
            # All tokens, none, some.
            lengths = [(tokens, 0, tokens * 4 // 9)[tile % 3] for tile in range(sizes["tiles"])]
            options["seqlens"] = torch.tensor(lengths, dtype=torch.int32, device=device)
        if sizes.get("sequences"):
            # An empty one in the middle; the last tokens belong to none.
            ends = [0, tokens // 6 + 1, tokens // 6 + 1, tokens - tokens // 9]
            options |= {
                "cu_seqlens": torch.tensor(ends, dtype=torch.int32, device=device),
                "max_seqlen": ends[-1] - ends[-2],
            }
        q, k, v = qkv.detach().unbind(2)
        if sizes.get("apart"):
            q, k, v = (x.clone(memory_format=torch.contiguous_format).requires_grad_(case.backward) for x in (q, k, v))
        inputs: Inputs = {"qkv": qkv, "q": q, "k": k, "v": v, "options": options}
        if case.backward:
            inputs["gradients"] = (outlier_normal(*q.shape, dtype=dtype, device=device, seed=seed + 1),)
        return inputs

    def call(self, case: Case, inputs: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
        """Return the output, and the log-sum-exp of a small case."""
        options = inputs["options"] | {"backend": backend, "return_lse": SMALL in case.uses}
        if case.sizes.get("packed"):
            return _as_tuple(subimage_attention_packed(inputs["qkv"], **options))
        # With a backward pass the views are made anew: those made before a CUDA graph is captured belong to another
        # stream, and autograd would have to wait for that.
        made_anew = case.backward and not case.sizes.get("apart")
        parts = inputs["qkv"].unbind(2) if made_anew else (inputs[name] for name in "qkv")
        return _as_tuple(subimage_attention(*parts, **options))

    def leaves_of(self, case: Case) -> tuple[str, ...]:
        """Return the leaves of a case."""
        return ("q", "k", "v") if case.sizes.get("apart") else self.leaves

    def reference(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the plain statement's result on the checked tiles."""
        chosen = self._checked_tiles(case)
        qkv = inputs["qkv"].detach()[chosen].to(dtype).requires_grad_(case.backward)
        out, lse = subimage_attention(*qkv.unbind(2), **inputs["options"], return_lse=True, backend="reference")
        outputs = {"out": out.detach(), "lse": lse} if SMALL in case.uses else {"out": out.detach()}
        if not case.backward:
            return outputs
        (gradient,) = torch.autograd.grad(out, qkv, inputs["gradients"][0][chosen].to(dtype))
        return outputs | dict(zip(_GRADIENTS, gradient.unbind(2), strict=True))

    def checked(self, case: Case, results: tuple[torch.Tensor, ...]) -> Outputs:
        """Return outputs and gradients of the checked tiles, the gradients apart."""
        chosen, names = self._checked_tiles(case), ("out", "lse") if SMALL in case.uses else ("out",)
        parts = dict(zip(names, results, strict=False))
        if case.backward:
            gradients = results[len(names) :]
            parts |= zip(_GRADIENTS, gradients if case.sizes.get("apart") else gradients[0].unbind(2), strict=True)
        return {name: part[chosen] for name, part in parts.items()}

    def _checked_tiles(self, case: Case) -> list[int]:
        tiles = case.sizes["tiles"]
        return spread(tiles, tiles if SMALL in case.uses else _CHECKED_TILES)

    def cost(self, case: Case, dtype: torch.dtype, kernel: str | None = None) -> Cost:
        """Return operations on true sizes, and the bytes of q, k, v, out and, of a backward pass, of their gradients."""
        sizes = case.sizes
        pairs, channels = sizes["tiles"] * sizes["tokens"] ** 2, sizes["heads"] * sizes["head_dim"]
        tensor = sizes["tiles"] * sizes["tokens"] * channels * dtype.itemsize
        flops = 4 * pairs * channels
        if kernel is not None:
            # q, k, v and out; or q, k, v, the output's gradient and one or two gradients.
            return Cost(flops * _PRODUCTS[kernel] // 2, {"forward": 4, "backward_kv": 6, "backward_q": 5}[kernel] * tensor)
        # Forward: q, k, v, out. Backward besides: the output and its gradient, q, k, v again, and three gradients.
        backward = int(flops * BACKWARD_FACTOR) if case.backward else 0
        return Cost(flops + backward, (4 + 8) * tensor if case.backward else 4 * tensor)

    def kernels_of(self, case: Case) -> tuple[str, ...]:
        """Return forward, what turns keys before it, and the three kernels of a backward pass."""
        turned = ("rotate",) * bool(case.sizes.get("rope"))
        return *turned, "forward", *("delta", "backward_kv", "backward_q") * case.backward

    def width(self, case: Case) -> int:
        """Return the head dim."""
        return case.sizes["head_dim"]

    def config(self, job: Job) -> LaunchConfig:
        """Return the shipped configuration."""
        sizes, dtype = job.case.sizes, getattr(torch, job.dtype)
        rope = bool(sizes.get("rope"))
        return choose_config(job.kernel, sizes["head_dim"], dtype, sizes["tokens"], job.arch, rope=rope)

    def launch(self, job: Job, inputs: Inputs, config: LaunchConfig) -> Any:
        """Run one launcher; gradients are written as the packed one of qkv."""
        from infimm_fast.kernels.subimage.backward import launch_backward
        from infimm_fast.kernels.subimage.forward import launch_forward

        options = Options(job.case.sizes["head_dim"] ** -0.5, **inputs["options"])
        q, k, v = (inputs[name] for name in "qkv")
        if job.kernel == "forward":
            return launch_forward(q, k, v, options, config=config)
        forward = replace(job, kernel="forward")
        out, lse = inputs.get("forward") or launch_forward(q, k, v, options, config=self.config(forward))
        packed = torch.empty_like(inputs["qkv"])
        configs = {name: self.config(replace(job, kernel=name)) for name in ("backward_kv", "backward_q")}
        configs[job.kernel] = config
        (gradient,), gradients = inputs["gradients"], packed.unbind(2)
        launch_backward(gradient, Saved(q, k, v, out, lse), options, gradients, configs)
        return out, packed

    def rules(self, job: Job, config: LaunchConfig) -> Rules:
        """The peeled token and RoPE's partners are read one element at a time; nothing else may be.

        Pieces of 16 channels can leave a thread 8 bytes, and a backward reads the log-sum-exp and delta by 4.
        """
        tiled = not config.peel and not job.case.sizes.get("rope") and job.dtype != "float32"
        rows = config.block_n if job.kernel == "backward_kv" else config.block_m
        return Rules(no_elements=tiled, mostly_wide=tiled and job.kernel == "forward", tensor_rows=rows)


def _as_tuple(results: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


OP = SubimageAttention()
