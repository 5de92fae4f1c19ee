"""Attention from text to packed visual tokens: prompts and decoding steps of a model with 12 heads of 64, other decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from infimm_fast.kernels.interval.api import interval_attention
from infimm_fast.kernels.interval.config import DECODE_TOKENS, choose_config, choose_split
from infimm_fast.kernels.interval.options import Options, Saved
from infimm_fast.kernels.interval.reference import interval_attention_reference

HEAD_DIMS = (64, 72, 80, 88, 96, 104, 112, 128)
Sizes = Mapping[str, int]

# Text tokens do not see each other: the fp64 reference computes a few of each checked row.
_CHECKED_ROWS, _CHECKED_TOKENS = 2, 64
_BACKWARD = ("backward_kv", "backward_q")
# Products of matrices that a kernel computes.
_PRODUCTS = {"forward": 2, "decode": 2, "backward_kv": 4, "backward_q": 3}
# What the gate compiles, (rows, tokens, query heads, KV heads): prompts of a model with 12 heads and of a decoder with
# grouped ones; decode of one row, of folded rows, and of a whole tile from one row.
_GATED = {
    "prompt": (2, 2048, 12, 12),
    "short": (2, 32, 12, 12),
    "grouped": (2, 2048, 32, 8),
    "single": (1, 1, 12, 12),
    "folded": (64, 1, 12, 12),
    "drafted": (4, 8, 64, 8),
}


def make_sizes(
    rows: int, tokens: int, heads: int = 12, kv_heads: int = 12, head_dim: int = 64, **others: int
) -> dict[str, int]:
    """Return the sizes of a case with ten tiles of 1025 tokens in one picture for each row; `others` replace them.

    The matrix product that makes K and V makes those of ten blocks, so that a block's tokens are ten times as far apart.
    With many rows one block's alone are stored, to fit on smaller cards.
    """
    sizes = {"rows": rows, "tokens": tokens, "tiles": 10, "tokens_per_tile": 1025, "images": 1, "shared": 0}
    sizes |= {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "kv_blocks": 10 if rows == 1 else 1}
    return sizes | others


def row_length(sizes: Sizes) -> int:
    """Return the visual tokens of one row."""
    return sizes["tiles"] * sizes["tokens_per_tile"]


def visual_tokens(sizes: Sizes) -> int:
    """Return the visual tokens of all rows."""
    return row_length(sizes) * (1 if sizes["shared"] else sizes["rows"])


def row_ranges(sizes: Sizes, row: int = 0) -> list[tuple[int, int]]:
    """Return the interval of each text token of a row, counted from the row's first visual token.

    Pictures stand evenly in the text, the first at its start; a token sees the latest one. The tiles are dealt to them as
    evenly as they go.
    """
    tiles, images, tokens, length = sizes["tiles"], sizes["images"], sizes["tokens"], row_length(sizes)
    if sizes.get("ragged"):
        # Nothing, one key, an inner interval, everything, bounds that have to be clamped.
        ragged = [(0, length), (5, 5), (length - 1, length), (33, length * 3 // 4), (-3, length + 93), (0, 1)]
        return [ragged[(sizes["ragged"] - 1 + row + token) % len(ragged)] for token in range(tokens)]
    bounds = [0]
    for image in range(images):
        bounds.append(bounds[-1] + (tiles // images + (image < tiles % images)) * sizes["tokens_per_tile"])
    latest = [token * images // tokens for token in range(tokens)]
    return [(bounds[image], bounds[image + 1]) for image in latest]


def visible_pairs(sizes: Sizes) -> int:
    """Return the sum over all text tokens of the visual tokens that they see."""
    return sizes["rows"] * sum(end - start for start, end in row_ranges(sizes))


def make_kv_range(sizes: Sizes, device: torch.device) -> torch.Tensor:
    """Return int64 ``[rows, tokens, 2]``."""
    ranges = torch.tensor([row_ranges(sizes, row) for row in range(sizes["rows"])], device=device)
    first = torch.arange(sizes["rows"], device=device) * (0 if sizes["shared"] else row_length(sizes))
    return ranges + first[:, None, None]


def _make_cases() -> Iterator[Case]:
    for tokens in (128, 512, 2048):
        for images in (1, 4):
            name = f"prefill {tokens} tokens, 10 tiles, {'one picture' if images == 1 else '4 interleaved pictures'}"
            tuned = (TUNE,) * ((tokens, images) == (2048, 1))
            yield Case(name, make_sizes(1, tokens, images=images), importance=int(tokens != 2048), uses=(BENCH, *tuned))
    for rows, shared in ((1, 0), (8, 0), (8, 1), (64, 0), (64, 1)):
        name = f"decode batch {rows}, 10 tiles, {'one picture for all' if shared else 'a picture for each'}"
        uses = (BENCH, *(TUNE,) * (not shared), *(PROFILE,) * (rows != 8 and not shared))
        yield Case(name, make_sizes(rows, 1, shared=shared), False, int(rows == 8 or shared), uses, ("decode",))
    yield Case("prefill 2048 tokens, with backward", make_sizes(1, 2048), True, 0, (PROFILE,))
    trained = make_sizes(1, 512, images=4)
    yield Case("prefill 512 tokens, 10 tiles, 4 pictures, with backward", trained, backward=True, uses=(BENCH,))
    yield Case("512 tokens, with backward", make_sizes(1, 512), True, 1, (TUNE,), _BACKWARD)
    for importance, shape in ((1, (32, 8, 128)), (2, (16, 16, 80))):
        heads = "{}/{} heads of {}".format(*shape)
        yield Case(f"2048 tokens, {heads}", make_sizes(1, 2048, *shape), importance=importance, uses=(TUNE,))
        sizes = make_sizes(1, 512, *shape)
        yield Case(f"512 tokens, {heads}, with backward", sizes, True, importance + 1, (TUNE,), _BACKWARD)
    yield from _gate_cases()
    small = {"tiles": 1, "ragged": 1, "apart": 1, "shared": 1}
    for name, sizes in {
        "prompt": make_sizes(2, 37, 6, 2, 72, tokens_per_tile=207, **small),
        # An inner interval.
        "decode one row": make_sizes(1, 1, 3, 3, 64, tokens_per_tile=1111, **(small | {"ragged": 4})),
        "decode rows": make_sizes(7, 3, 4, 2, 112, tokens_per_tile=1111, **small),
    }.items():
        yield Case(f"small, {name}", sizes, backward=True, uses=(SMALL,))


def _gate_cases() -> Iterator[Case]:
    """All variants in 16 bits, grouped heads at the ends of the table; in fp32 the usual ones."""
    for name, (rows, tokens, heads, kv_heads) in _GATED.items():
        for head_dim in HEAD_DIMS:
            if name in ("grouped", "drafted") and head_dim not in (HEAD_DIMS[0], HEAD_DIMS[-1]):
                continue
            kernels: tuple[str, ...] = ("forward", *_BACKWARD)
            if name in ("short", "single", "drafted"):
                kernels = ("forward",) if name == "short" else ("decode",)
            elif name == "folded":
                # The plan does not depend on the head dim.
                kernels = ("plan",) * (head_dim == HEAD_DIMS[0]) + ("decode", "combine")
            dtypes = ("bfloat16",) if name in ("short", "grouped", "drafted") else ("bfloat16", "float32")
            sizes = make_sizes(rows, tokens, heads, kv_heads, head_dim, shared=1, kv_blocks=10)
            backward = "backward_q" in kernels
            yield Case(f"{name}, head dim {head_dim}", sizes, backward, 1, (GATE,), kernels, dtypes)


class IntervalAttention(Op):
    """Queries ``[rows, tokens, heads, head_dim]`` on keys and values that are views of one projection's output.

    Sizes: see `make_sizes`; `kv_heads` is `heads` where it is left out. As flags shared (all rows see the same picture),
    ragged (intervals of all kinds, dealt to the text tokens in turn, from the first kind on or from that of this number),
    apart (keys and values are tensors of their own, so that a sanitizer sees an access beside one; the log-sum-exp is
    compared too).
    """

    name = "interval_attention"
    leaves = ("q", "kv")
    kernels: ClassVar = {
        "forward": "forward_kernel",
        "plan": "plan_kernel",
        "decode": "decode_kernel",
        "combine": "combine_kernel",
        "delta": "delta_kernel",
        "backward_kv": "key_value_kernel",
        "backward_q": "query_kernel",
    }
    fixed = ("delta",)
    cases = tuple(_make_cases())

    def make_inputs(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Return q, kv, views of its parts without a history, the intervals, and the gradient of the output."""
        sizes = case.sizes
        heads, head_dim = sizes["heads"], sizes["head_dim"]
        q = outlier_normal(sizes["rows"], sizes["tokens"], heads, head_dim, dtype=dtype, device=device, seed=seed)
        shape = (visual_tokens(sizes), sizes["kv_blocks"], 2, sizes.get("kv_heads", heads), head_dim)
        kv = outlier_normal(*shape, dtype=dtype, device=device, seed=seed + 1)[:, 0].requires_grad_(case.backward)
        k, v = kv.detach().unbind(1)
        if sizes.get("apart"):
            k, v = (part.clone(memory_format=torch.contiguous_format).requires_grad_(case.backward) for part in (k, v))
        inputs: Inputs = {"q": q.requires_grad_(case.backward), "kv": kv, "k": k, "v": v}
        inputs["kv_range"] = make_kv_range(sizes, device)
        if case.backward:
            inputs["gradients"] = (outlier_normal(*q.shape, dtype=dtype, device=device, seed=seed + 2),)
        return inputs

    def call(self, case: Case, inputs: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
        """Return the output, and the log-sum-exp if keys and values are apart."""
        if case.sizes.get("apart"):
            q, k, v, kv_range = (inputs[name] for name in ("q", "k", "v", "kv_range"))
            return interval_attention(q, k, v, kv_range, return_lse=True, backend=backend)
        # With a backward pass the views are made anew: those made before a CUDA graph is captured belong to another
        # stream, and autograd would have to wait for that.
        k, v = inputs["kv"].unbind(1) if case.backward else (inputs["k"], inputs["v"])
        return (interval_attention(inputs["q"], k, v, inputs["kv_range"], backend=backend),)

    def leaves_of(self, case: Case) -> tuple[str, ...]:
        """Return the leaves of a case."""
        return ("q", "k", "v") if case.sizes.get("apart") else self.leaves

    def reference(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the plain statement's result for the checked text tokens; all of them before a backward pass."""
        rows, tokens = checked_part(case)
        q, kv = (inputs[name].detach() for name in ("q", "kv"))
        kv_range = inputs["kv_range"]
        if not case.backward:
            # Cast to `dtype` what the checked rows see, one row at a time.
            return {"out": torch.cat([self._reference_of_row(q, kv, kv_range, row, tokens, dtype) for row in rows])}
        q, kv = q.to(dtype).requires_grad_(), kv.to(dtype).requires_grad_()
        out, lse = interval_attention_reference(q, kv[:, 0], kv[:, 1], kv_range, case.sizes["head_dim"] ** -0.5)
        dq, dkv = torch.autograd.grad(out, (q, kv), inputs["gradients"][0].to(dtype))
        also = {"lse": lse.detach()} if case.sizes.get("apart") else {}
        return _name_results(out.detach(), dq, dkv) | also

    def _reference_of_row(
        self, q: torch.Tensor, kv: torch.Tensor, kv_range: torch.Tensor, row: int, tokens: list[int], dtype: torch.dtype
    ) -> torch.Tensor:
        chosen = kv_range[row, tokens].clamp(0, kv.shape[0])  # [t, 2]
        start, end = int(chosen[:, 0].min()), int(chosen[:, 1].max())
        row_q, (k, v) = q[row, tokens][None].to(dtype), kv[start:end].to(dtype).unbind(1)
        return interval_attention_reference(row_q, k, v, (chosen - start)[None], q.shape[-1] ** -0.5)[0]

    def checked(self, case: Case, results: tuple[torch.Tensor, ...]) -> Outputs:
        """Return the output of the checked text tokens, and gradients if there are any."""
        if case.sizes.get("apart"):
            return dict(zip(("out", "lse", "dq", "dk", "dv"), results, strict=True))
        if case.backward:
            return _name_results(*results)
        rows, tokens = checked_part(case)
        return {"out": results[0][rows][:, tokens]}

    def cost(self, case: Case, dtype: torch.dtype, kernel: str | None = None) -> Cost:
        """Return operations on visible pairs, and the bytes of text and visual tensors, each read or written once."""
        sizes = case.sizes
        text = sizes["rows"] * sizes["tokens"] * sizes["heads"] * sizes["head_dim"]
        visual = 2 * visual_tokens(sizes) * sizes.get("kv_heads", sizes["heads"]) * sizes["head_dim"]
        flops = 4 * visible_pairs(sizes) * sizes["heads"] * sizes["head_dim"]
        if kernel is not None:
            texts, visuals = {"backward_kv": (2, 2), "backward_q": (3, 1)}.get(kernel, (2, 1))
            return Cost(flops * _PRODUCTS[kernel] // 2, (texts * text + visuals * visual) * dtype.itemsize)
        # Forward: q, out, k, v. Backward besides: q, k, v again, the output and its gradient, and three gradients.
        backward = int(flops * BACKWARD_FACTOR) if case.backward else 0
        return Cost(flops + backward, (6 * text + 3 * visual if case.backward else 2 * text + visual) * dtype.itemsize)

    def kernels_of(self, case: Case) -> tuple[str, ...]:
        """Return the forward or what decoding splits it into, and the three kernels of a backward pass."""
        backward = ("delta", "backward_kv", "backward_q") * case.backward
        sizes = case.sizes
        heads, kv_heads, rows = sizes["heads"], sizes.get("kv_heads", sizes["heads"]), sizes["rows"]
        config = self.config(Job("decode", case, "bfloat16", 90))
        if choose_split(rows, sizes["tokens"], heads // kv_heads, kv_heads, visual_tokens(sizes), config) is None:
            return "forward", *backward
        return *("plan",) * (rows > 1), "decode", "combine", *backward

    def width(self, case: Case) -> int:
        """Return the head dim."""
        return case.sizes["head_dim"]

    def config(self, job: Job) -> LaunchConfig:
        """Return the shipped configuration; all kernels of a decoding step have that of "decode"."""
        sizes, dtype = job.case.sizes, getattr(torch, job.dtype)
        kernel = "decode" if job.kernel in ("plan", "combine") else job.kernel
        if kernel == "forward" and sizes["tokens"] <= DECODE_TOKENS:
            kernel = "decode"
        rows = sizes["tokens"] * sizes["heads"] // sizes.get("kv_heads", sizes["heads"])
        return choose_config(kernel, sizes["head_dim"], dtype, rows, job.arch, batch=sizes["rows"])

    def launch(self, job: Job, inputs: Inputs, config: LaunchConfig) -> Any:
        """Run one launcher; the gradients of k and v are two contiguous tensors."""
        from infimm_fast.kernels.interval.backward import launch_backward
        from infimm_fast.kernels.interval.forward import launch_forward

        options = Options(job.case.sizes["head_dim"] ** -0.5)
        q, k, v, kv_range = (inputs[name].detach() for name in ("q", "k", "v", "kv_range"))
        if not job.kernel.startswith("backward"):
            return launch_forward(q, k, v, kv_range, options, config=config)
        forward_config = self.config(replace(job, kernel="forward"))
        out, lse = inputs.get("forward") or launch_forward(q, k, v, kv_range, options, config=forward_config)
        dq, dkv = q.new_empty(q.shape), k.new_empty((2, *k.shape))
        configs = {name: self.config(replace(job, kernel=name)) for name in ("backward_kv", "backward_q")}
        configs[job.kernel] = config
        (gradient,), gradients = inputs["gradients"], (dq, dkv[0], dkv[1])
        launch_backward(gradient, Saved(q, k, v, kv_range, out, lse), options, gradients, configs)
        return out, dq, dkv.transpose(0, 1)

    def rules(self, job: Job, config: LaunchConfig) -> Rules:
        """The plan reads no rows, and combining multiplies none."""
        if job.kernel == "plan":
            return Rules(wide=False)
        rows = {"combine": 0, "backward_kv": config.block_n}.get(job.kernel, config.block_m)
        return Rules(no_elements=job.dtype != "float32" and job.kernel != "combine", tensor_rows=rows)


def _name_results(out: torch.Tensor, dq: torch.Tensor, dkv: torch.Tensor) -> Outputs:
    return {"out": out, "dq": dq, "dk": dkv[:, 0], "dv": dkv[:, 1]}


def checked_part(case: Case) -> tuple[list[int], list[int]]:
    """Return which rows, and which text tokens of each, are compared with the reference; all before a backward pass."""
    if case.backward:
        return list(range(case.sizes["rows"])), list(range(case.sizes["tokens"]))
    return spread(case.sizes["rows"], _CHECKED_ROWS), spread(case.sizes["tokens"], _CHECKED_TOKENS)


OP = IntervalAttention()
