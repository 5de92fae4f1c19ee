"""Cross-attention from text to packed visual tokens, prefill and decode: the op on its own, with K/V given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from infimm_fast.benchmarks.cases import BACKWARD_FACTOR, item_size
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
from infimm_fast.kernels import interval_attention
from infimm_fast.kernels.interval.reference import interval_attention_reference
from infimm_fast.models.infimm_hd.costs import attention_flops

NAME = "interval_attention"
PREFILL_TOKENS = (128, 512, 2048)
DECODE_ROWS = (1, 8, 64)
# The model's one matrix product makes K/V of all blocks, so that a block's tokens are that many times as far apart.
# Beyond this size of all blocks' K/V the benchmark stores one block's alone, to fit on smaller cards.
_MAX_STRIDED_TOKENS = 2**16
# Text tokens do not see each other: the fp64 reference computes a few of each checked row.
_CHECKED_ROWS, _CHECKED_TOKENS = 2, 64

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attention_sizes(plan: Plan, rows: int, tokens: int, tiles: int, images: int, shared: bool) -> dict[str, int]:
    """Return the sizes of a case: `rows` rows of `tokens` text tokens, each row with `tiles` tiles in `images` pictures."""
    config = plan.config
    visual = tiles * config.visual_tokens_per_tile * (1 if shared else rows)
    return {
        "rows": rows,
        "tokens": tokens,
        "tiles": tiles,
        "images": images,
        "shared": int(shared),
        "tokens_per_tile": config.visual_tokens_per_tile,
        "heads": config.cross_attention_heads,
        "head_dim": config.cross_attention_head_dim,
        "kv_blocks": len(config.gated_layers) if visual <= _MAX_STRIDED_TOKENS else 1,
    }


def row_length(sizes: dict[str, int]) -> int:
    """Visual tokens of one row."""
    return sizes["tiles"] * sizes["tokens_per_tile"]


def visual_tokens(sizes: dict[str, int]) -> int:
    """Visual tokens of all rows."""
    return row_length(sizes) * (1 if sizes["shared"] else sizes["rows"])


def row_ranges(sizes: dict[str, int]) -> list[tuple[int, int]]:
    """Return the interval of each text token of a row, counted from the row's first visual token.

    Pictures stand evenly in the text, the first at its start; a token sees the latest one. The tiles are dealt to them as
    evenly as they go.
    """
    tiles, images, tokens = sizes["tiles"], sizes["images"], sizes["tokens"]
    bounds = [0]
    for image in range(images):
        bounds.append(bounds[-1] + (tiles // images + (image < tiles % images)) * sizes["tokens_per_tile"])
    latest = [token * images // tokens for token in range(tokens)]
    return [(bounds[image], bounds[image + 1]) for image in latest]


def visible_pairs(sizes: dict[str, int]) -> int:
    """Sum over all text tokens of the visual tokens that they see."""
    return sizes["rows"] * sum(end - start for start, end in row_ranges(sizes))


def all_visible(case: Case) -> bool:
    """Whether every text token sees all of its row's visual tokens, so that no mask is needed."""
    return case.sizes["images"] == 1


def make_kv_range(case: Case, device: torch.device) -> torch.Tensor:
    """Return int64 ``[B, T, 2]``."""
    one = torch.tensor(row_ranges(case.sizes), device=device)
    first = torch.arange(case.sizes["rows"], device=device) * (0 if case.sizes["shared"] else row_length(case.sizes))
    return one + first[:, None, None]


def make_attention_cases(plan: Plan, make: Callable[..., Case]) -> list[Case]:
    """Return prefill with one picture and with interleaved ones, and decoding with own and with a shared picture.

    Args:
        plan: of the run.
        make: takes name, sizes, importance and series.
    """
    cases = []
    largest = plan.tile_counts[-1]
    # Four of the largest pictures besides, where a picture may have many tiles.
    prefill_tiles = plan.tiles or ((1, largest) if plan.tiny else (1, 4, 10, 40) if largest == 10 else (1, 4))
    lengths = (32, 128) if plan.tiny else PREFILL_TOKENS
    for tiles in prefill_tiles:
        for tokens in lengths:
            importance = 0 if (tiles, tokens) == (largest, lengths[-1]) else 1 + (tiles != largest)
            for images in (1, 4) if tiles >= 4 else (1,):
                kind = "one picture" if images == 1 else f"{images} interleaved pictures"
                sizes = attention_sizes(plan, 1, tokens, tiles, images, shared=False)
                name = f"prefill {tokens} tokens, {tiles} tile{'s' * (tiles > 1)}, {kind}"
                series: list[Series] = []
                if tokens == lengths[-1]:
                    series.append((f"prefill {tokens} tokens, {kind}", "tiles", tiles))
                if tiles == largest:
                    series.append((f"prefill, {tiles} tiles, {kind}", "text tokens", tokens))
                cases.append(make(name, sizes, importance, tuple(series)))
    for rows in (1, 4) if plan.tiny else DECODE_ROWS:
        for shared in (False, True) if rows > 1 else (False,):
            kind = "one picture for all" if shared else "a picture for each"
            sizes = attention_sizes(plan, rows, 1, largest, 1, shared)
            importance = 0 if rows in (1, 64) and not shared else 1
            batch: Series = (f"decode, {largest} tiles, {kind}", "batch", rows)
            cases.append(make(f"decode batch {rows}, {largest} tiles, {kind}", sizes, importance, (batch,)))
    return cases


@register_op
class IntervalAttention(Op):
    """Queries ``[B, T, H, D]`` on keys and values that are views of one projection's output."""

    name = NAME
    section = "cross"
    leaves = ("q", "kv")

    def cases(self, plan: Plan) -> list[Case]:
        """Return prefill and decode cases at the preset's widths, and the backward pass of one prefill."""

        def make(
            name: str, sizes: dict[str, int], importance: int, series: tuple[Series, ...] = (), backward: bool = False
        ) -> Case:
            width = sizes["heads"] * sizes["head_dim"]
            text, visual = sizes["rows"] * sizes["tokens"] * width, 2 * visual_tokens(sizes) * width
            flops = attention_flops(1, visible_pairs(sizes), width)
            # Forward: q, out, k, v. Backward besides: q, k, v again, the output and its gradient, and three gradients.
            return Case(
                name=name,
                sizes=sizes,
                dtype=plan.dtype,
                flops=flops + int(flops * BACKWARD_FACTOR) if backward else flops,
                bytes=(6 * text + 3 * visual if backward else 2 * text + visual) * item_size(plan.dtype),
                importance=importance,
                backward=backward,
                series=series,
            )

        tokens, tiles = (32, plan.tile_counts[-1]) if plan.tiny else (512, plan.tile_counts[-1])
        images = min(tiles, 4)
        sizes = attention_sizes(plan, 1, tokens, tiles, images, shared=False)
        trained = make(f"prefill {tokens} tokens, {tiles} tiles, {images} pictures, with backward", sizes, 1, backward=True)
        return [*make_attention_cases(plan, make), trained]

    def make_inputs(self, case: Case, device: torch.device, seed: int) -> Inputs:
        """Return q, kv, views of its parts without a history, and the intervals."""
        sizes, dtype = case.sizes, case.torch_dtype
        heads, head_dim = sizes["heads"], sizes["head_dim"]
        q = random_tensor(sizes["rows"], sizes["tokens"], heads, head_dim, dtype=dtype, device=device, seed=seed)
        # Grouped heads where a case says so; none of this suite's does, but kernels are tuned for them.
        shape = (visual_tokens(sizes), sizes["kv_blocks"], 2, sizes.get("kv_heads", heads), head_dim)
        kv = random_tensor(*shape, dtype=dtype, device=device, seed=seed + 1)[:, 0].requires_grad_(case.backward)
        k, v = kv.detach().unbind(1)
        inputs: Inputs = {
            "q": q.requires_grad_(case.backward),
            "kv": kv,
            "k": k,
            "v": v,
            "kv_range": make_kv_range(case, device),
        }
        if case.backward:
            inputs["gradients"] = (random_tensor(*q.shape, dtype=dtype, device=device, seed=seed + 2),)
        return inputs

    def reference(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """Return the plain statement's result for the checked text tokens, one row at a time."""
        rows, tokens = checked_part(case)
        parts = []
        for row in rows:
            kv_range = inputs["kv_range"][row, tokens]  # [t, 2]
            start, end = int(kv_range[:, 0].min()), int(kv_range[:, 1].max())
            q, kv = (x.detach().to(dtype) for x in (inputs["q"][row, tokens][None], inputs["kv"][start:end]))
            q, kv = q.requires_grad_(case.backward), kv.requires_grad_(case.backward)
            scale = case.sizes["head_dim"] ** -0.5
            out, _ = interval_attention_reference(q, kv[:, 0], kv[:, 1], (kv_range - start)[None], scale)
            parts.append(out)
        if not case.backward:
            return {"out": torch.cat(parts)}
        dq, dkv = torch.autograd.grad(out, (q, kv), inputs["gradients"][0].to(dtype))
        return _name_results(out.detach(), dq, dkv)

    def checked(self, case: Case, outputs: tuple[torch.Tensor, ...]) -> Outputs:
        """Return the output of the checked text tokens, and gradients if there are any."""
        if case.backward:
            return _name_results(*outputs)
        rows, tokens = checked_part(case)
        return {"out": outputs[0][rows][:, tokens]}


def _name_results(out: torch.Tensor, dq: torch.Tensor, dkv: torch.Tensor) -> Outputs:
    return {"out": out, "dq": dq, "dk": dkv[:, 0], "dv": dkv[:, 1]}


def checked_part(case: Case) -> tuple[list[int], list[int]]:
    """Return which rows, and which text tokens of each, are compared with the reference; all before a backward pass."""
    if case.backward:
        return list(range(case.sizes["rows"])), list(range(case.sizes["tokens"]))
    return spread(case.sizes["rows"], _CHECKED_ROWS), spread(case.sizes["tokens"], _CHECKED_TOKENS)


def padded(case: Case, packed: torch.Tensor) -> torch.Tensor:
    """Return packed visual tokens ``[S, ...]`` as a batch ``[B, S_row, ...]``, what models without packing keep.

    All rows of a case are equally long, so this is a view; a picture that rows share is not copied for them either.
    """
    rows = 1 if case.sizes["shared"] else case.sizes["rows"]
    batch = packed.unflatten(0, (rows, row_length(case.sizes)))
    return batch.expand(case.sizes["rows"], *batch.shape[1:])


def additive_mask(case: Case, device: torch.device) -> torch.Tensor:
    """Return the dense mask ``[1, 1, T, S_row]`` of every row, 0 or -inf, its lines aligned as fused kernels want them."""
    length = row_length(case.sizes)
    intervals = torch.tensor(row_ranges(case.sizes), device=device)
    index = torch.arange(-(-length // 16) * 16, device=device)
    visible = (index >= intervals[:, :1]) & (index < intervals[:, 1:])
    mask = torch.zeros(visible.shape, dtype=case.torch_dtype, device=device).masked_fill_(~visible, float("-inf"))
    return mask[None, None, :, :length]


def naive_attention(mask: torch.Tensor | None) -> Attention:
    """Scores, mask and probabilities in memory, on ``[B, T, H, D]`` and ``[B, S_row, H, D]``."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        scores = scores if mask is None else scores + mask
        return (scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)

    return attention


def sdpa_attention(mask: torch.Tensor | None, backend: SDPBackend | None = None) -> Attention:
    """PyTorch's fused attention, as it chooses or with one backend forced."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attention


def flex_attention_of(case: Case, device: torch.device, mode: str) -> Attention:
    """FlexAttention, compiled, with a block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False, mode=mode)
    intervals = torch.tensor(row_ranges(case.sizes), device=device)
    start, end = intervals[:, 0].contiguous(), intervals[:, 1].contiguous()

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key >= start[query]) & (key < end[query])

    mask = None
    if not all_visible(case):
        mask = create_block_mask(visible, None, None, case.sizes["tokens"], row_length(case.sizes), device=str(device))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask).transpose(1, 2)

    return attention


def needs_full_visibility(case: Case, device: torch.device) -> str | None:
    """Requirement of implementations that have no mask and run on a GPU."""
    if not all_visible(case):
        return "has no mask; only where every token sees all of its row's pictures"
    return needs_cuda(case, device)


def once_for_case(make: Callable[[Case, torch.device], Attention]) -> Callable[[Case, torch.device], Attention]:
    """Return `make` with its last result kept, so that all sets of inputs of a case share masks and compiled functions.

    A mask of its own for each set would make FlexAttention compile anew for each, and give up after eight.
    """
    last: list[tuple[Case, Attention]] = []

    def made(case: Case, device: torch.device) -> Attention:
        if not last or last[0][0] is not case:
            last[:] = [(case, make(case, device))]
        return last[0][1]

    return made


def _peer(make: Callable[[Case, torch.device], Attention]) -> Callable[[Case, Inputs], Run]:
    """Prepare a peer that works on padded batches."""
    make = once_for_case(make)

    def prepare(case: Case, inputs: Inputs) -> Run:
        attention, q = make(case, inputs["q"].device), inputs["q"]
        if case.backward:
            # Views made before a CUDA graph is captured belong to another stream; autograd would have to wait for that.
            return lambda: attention(q, *(padded(case, part) for part in inputs["kv"].unbind(1)))
        k, v = padded(case, inputs["k"]), padded(case, inputs["v"])
        return lambda: attention(q, k, v)

    return prepare


def _ours(backend: str) -> Callable[[Case, Inputs], Run]:
    def prepare(case: Case, inputs: Inputs) -> Run:
        q, k, v, kv_range = (inputs[name] for name in ("q", "k", "v", "kv_range"))

        def run() -> torch.Tensor:
            # With a backward pass the views are made anew; see `_peer`.
            parts = inputs["kv"].unbind(1) if case.backward else (k, v)
            return interval_attention(q, parts[0], parts[1], kv_range, backend=backend)  # type: ignore[return-value]

        return run

    return prepare


def _masked(backend: SDPBackend | None) -> Callable[[Case, torch.device], Attention]:
    return lambda case, device: sdpa_attention(additive_mask(case, device), backend)


def _unmasked(backend: SDPBackend) -> Callable[[Case, torch.device], Attention]:
    return lambda case, device: sdpa_attention(None, backend)


def _flex(mode: str) -> Callable[[Case, torch.device], Attention]:
    return lambda case, device: flex_attention_of(case, device, mode)


register_implementation(NAME, "naive")(_peer(lambda case, device: naive_attention(additive_mask(case, device))))
register_implementation(NAME, "sdpa dense mask")(_peer(_masked(None)))
for _name, _backend in {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}.items():
    register_implementation(NAME, f"sdpa {_name} dense mask", requires=needs_cuda)(_peer(_masked(_backend)))
for _name, _backend in {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}.items():
    register_implementation(NAME, f"sdpa {_name} unmasked", requires=needs_full_visibility)(_peer(_unmasked(_backend)))
register_implementation(NAME, "flex", requires=needs_cuda, setup_seconds=8)(_peer(_flex("default")))
register_implementation(NAME, "flex max-autotune", requires=needs_cuda, setup_seconds=30, main_only=True)(
    _peer(_flex("max-autotune-no-cudagraphs"))
)
register_implementation(NAME, "infimm_fast sdpa", ours=True)(_ours("sdpa"))
register_implementation(NAME, "infimm_fast", ours=True, requires=needs_cuda)(_ours("triton"))
