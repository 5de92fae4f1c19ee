"""Cross-attention from text to packed visual tokens, prefill and decode: the op on its own, with K/V given."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from infimm_fast.benchmarks.registry import BenchCase, OpStage, Plan, Series, needs_cuda, register_stage
from infimm_fast.benchmarks.suites import attention as peers
from infimm_fast.benchmarks.suites.attention import Attention, Maker
from infimm_fast.kernels.common.cases import Case, Inputs
from infimm_fast.kernels.interval.cases import OP, make_sizes, row_length, row_ranges, visual_tokens

PREFILL_TOKENS = (128, 512, 2048)
DECODE_ROWS = (1, 8, 64)
# The model's one matrix product makes K/V of all blocks, so that a block's tokens are that many times as far apart.
# Beyond this size of all blocks' K/V the benchmark stores one block's alone, to fit on smaller cards.
_MAX_STRIDED_TOKENS = 2**16


def _sizes(plan: Plan, tiles: int, rows: int = 1, tokens: int = 1, **others: int) -> dict[str, int]:
    """Return the sizes of `rows` rows of `tokens` text tokens, each row with `tiles` tiles; see `make_sizes` for others."""
    config = plan.config
    shape = (rows, tokens, config.cross_attention_heads, config.cross_attention_heads, config.cross_attention_head_dim)
    sizes = make_sizes(*shape, tiles=tiles, tokens_per_tile=config.visual_tokens_per_tile, **others)
    return sizes | {"kv_blocks": len(config.gated_layers) if visual_tokens(sizes) <= _MAX_STRIDED_TOKENS else 1}


def model_cases(plan: Plan) -> Iterator[tuple[Case, tuple[Series, ...]]]:
    """Yield prefill with one picture and with interleaved ones, and decoding with own and with a shared picture."""
    largest = plan.tile_counts[-1]
    # Four of the largest pictures besides, where a picture may have many tiles.
    prefill_tiles = plan.tiles or ((1, largest) if plan.tiny else (1, 4, 10, 40) if largest == 10 else (1, 4))
    lengths = (32, 128) if plan.tiny else PREFILL_TOKENS
    for tiles, tokens in ((tiles, tokens) for tiles in prefill_tiles for tokens in lengths):
        importance = 0 if (tiles, tokens) == (largest, lengths[-1]) else 1 + (tiles != largest)
        for images in (1, 4) if tiles >= 4 else (1,):
            kind = "one picture" if images == 1 else f"{images} interleaved pictures"
            name = f"prefill {tokens} tokens, {tiles} tile{'s' * (tiles > 1)}, {kind}"
            series: list[Series] = []
            if tokens == lengths[-1]:
                series.append((f"prefill {tokens} tokens, {kind}", "tiles", tiles))
            if tiles == largest:
                series.append((f"prefill, {tiles} tiles, {kind}", "text tokens", tokens))
            yield Case(name, _sizes(plan, tiles, 1, tokens, images=images), importance=importance), tuple(series)
    for rows in (1, 4) if plan.tiny else DECODE_ROWS:
        for shared in (False, True) if rows > 1 else (False,):
            kind = "one picture for all" if shared else "a picture for each"
            importance = 0 if rows in (1, 64) and not shared else 1
            sizes = _sizes(plan, largest, rows, shared=int(shared))
            case = Case(f"decode batch {rows}, {largest} tiles, {kind}", sizes, importance=importance)
            yield case, ((f"decode, {largest} tiles, {kind}", "batch", rows),)


def _cases(plan: Plan) -> list[BenchCase]:
    """Return `model_cases`, and the backward pass of one prefill."""
    tokens, tiles = (32 if plan.tiny else 512), plan.tile_counts[-1]
    images = min(tiles, 4)
    name = f"prefill {tokens} tokens, {tiles} tiles, {images} pictures, with backward"
    trained = Case(name, _sizes(plan, tiles, 1, tokens, images=images), backward=True)
    return [BenchCase.of_op(OP, case, plan.dtype, series) for case, series in (*model_cases(plan), (trained, ()))]


def all_visible(case: Case) -> bool:
    """Whether every text token sees all of its row's visual tokens, so that no mask is needed."""
    return case.sizes["images"] == 1


def padded(case: Case, packed: torch.Tensor) -> torch.Tensor:
    """Return packed visual tokens ``[S, ...]`` as a batch ``[B, S_row, ...]``, what models without packing keep.

    All rows of a case are equally long, so this is a view; a picture that rows share is not copied for them either.
    """
    rows = 1 if case.sizes["shared"] else case.sizes["rows"]
    batch = packed.unflatten(0, (rows, row_length(case.sizes)))
    return batch.expand(case.sizes["rows"], *batch.shape[1:])


def additive_mask(case: BenchCase, device: torch.device) -> torch.Tensor:
    """Return the dense mask ``[1, 1, T, S_row]`` of every row, 0 or -inf, its lines aligned as fused kernels want them."""
    length = row_length(case.sizes)
    intervals = torch.tensor(row_ranges(case.sizes), device=device)
    index = torch.arange(-(-length // 16) * 16, device=device)
    visible = (index >= intervals[:, :1]) & (index < intervals[:, 1:])
    mask = torch.zeros(visible.shape, dtype=case.torch_dtype, device=device).masked_fill_(~visible, float("-inf"))
    return mask[None, None, :, :length]


def masked_naive(case: BenchCase, device: torch.device) -> Attention:
    """Return the naive path with a dense mask."""
    mask = additive_mask(case, device)
    return lambda q, k, v: peers.naive(q, k, v, mask)


def masked_flex(mode: str) -> Maker:
    """Return what makes FlexAttention with the block mask of a case."""

    def make(case: BenchCase, device: torch.device) -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask

        if all_visible(case):
            return peers.flex(mode)
        start, end = torch.tensor(row_ranges(case.sizes), device=device).T.contiguous()

        def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (key >= start[query]) & (key < end[query])

        shape = (None, None, case.sizes["tokens"], row_length(case.sizes))
        return peers.flex(mode, create_block_mask(visible, *shape, device=str(device)))

    return make


def needs_full_visibility(case: Case, device: torch.device) -> str | None:
    """Requirement of implementations that have no mask and run on a GPU."""
    if not all_visible(case):
        return "has no mask; only where every token sees all of its row's pictures"
    return needs_cuda(case, device)


def _parts(case: BenchCase, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Return queries, and keys and values as padded batches."""
    return inputs["q"], *(padded(case, part) for part in inputs["kv"].unbind(1))


def _masked(backend: SDPBackend | None, case: BenchCase, device: torch.device) -> Attention:
    return peers.sdpa(additive_mask(case, device), backend)


register_stage(OpStage(OP, "cross", _cases))
_register = partial(peers.register_attention, OP.name, _parts)
_register("naive", masked_naive)
_register("sdpa dense mask", partial(_masked, None))
for _name in ("cudnn", "efficient"):
    _register(f"sdpa {_name} dense mask", partial(_masked, peers.FORCED[_name]), requires=needs_cuda)
for _name in ("cudnn", "flash"):
    _unmasked = partial(lambda backend, case, device: peers.sdpa(None, backend), peers.FORCED[_name])
    _register(f"sdpa {_name} unmasked", _unmasked, requires=needs_full_visibility)
for _name, _properties in peers.FLEX_PROPERTIES.items():
    _register(_name, masked_flex(_name), **_properties)
