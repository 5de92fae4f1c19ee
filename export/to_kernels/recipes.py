"""What is exported: launcher calls whose kernels are recorded, and the contiguous entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from infimm_fast.dtypes import dtype_name
from infimm_fast.export.to_kernels.sources import (
    CROSS_ROWS,
    cross_attention_source,
    subimage_source,
)
from infimm_fast.kernels.common.cases import Case, Job
from infimm_fast.kernels.common.offline import KernelSource, Launch, recorded_launches, source_of
from infimm_fast.kernels.interval.cases import OP as CROSS
from infimm_fast.kernels.interval.cases import make_sizes
from infimm_fast.kernels.subimage.cases import OP as SUBIMAGE
from infimm_fast.kernels.subimage.config import SHORT

# Sizes of the recorded calls; no kernel is specialised for them, but for a token count's remainder.
TILES, TOKENS = 2, 1025
_META = torch.device("meta")


@dataclass(frozen=True)
class Request:
    """What a set of kernels is compiled for.

    Attributes:
        heads: of the contiguous entries, which have it compiled in.
        head_dim: D.
        dtype: of queries, keys, values and output.
        sm: compute capability, 90 for a Hopper.
    """

    heads: int
    head_dim: int
    dtype: torch.dtype
    sm: int


@dataclass(frozen=True)
class Recipe:
    """One way to call an op, and the kernels behind it.

    Attributes:
        op: name of the op.
        variant: what is special about the call; part of the file names.
        about: the same in words.
        grids: kernel -> number of programs, in integers: over the kernel's parameters and constants, `batch` (tiles or batch
            rows) and ``cdiv(a, b)``, the quotient rounded up.
    """

    op: str
    variant: str
    about: str
    grids: dict[str, str]


_SUBIMAGE_GRIDS = {
    "forward_kernel": "(cdiv(max_tokens - PEEL, BLOCK_M) + PEEL) * num_heads * batch",
    "rotate_kernel": "cdiv(num_tokens, ROWS) * num_heads * batch",
    "subimage_attention_entry": "(cdiv(num_tokens - PEEL, BLOCK_M) + PEEL) * H * batch",
    "subimage_attention_packed_entry": "(cdiv(num_tokens - PEEL, BLOCK_M) + PEEL) * H * batch",
}
_CROSS_GRIDS = {
    "forward_kernel": "cdiv(num_tokens * GROUP, BLOCK_M) * num_kv_heads * batch",
    "plan_kernel": "cdiv(batch, ROWS)",
    "decode_kernel": "cdiv(batch, ROWS) * num_units * num_kv_heads",
    "combine_kernel": "num_rows",
    "interval_attention_entry": "cdiv(num_tokens * GROUP, BLOCK_M) * cdiv(H, GROUP) * batch",
}
RECIPES = (
    Recipe("subimage_attention", "packed", f"qkv contiguous, {TOKENS} tokens or 1 + a multiple of BLOCK_N", _SUBIMAGE_GRIDS),
    Recipe("subimage_attention", "packed_masked", "qkv contiguous, any number of tokens", _SUBIMAGE_GRIDS),
    Recipe("subimage_attention", "peeled", "any strides, a class token in front of full tiles", _SUBIMAGE_GRIDS),
    Recipe("subimage_attention", "masked", "any strides, any number of tokens", _SUBIMAGE_GRIDS),
    Recipe("subimage_attention", "rope", "any strides, a class token, rotary position embedding", _SUBIMAGE_GRIDS),
    Recipe("subimage_attention", "short", f"any strides, up to {SHORT} tokens", _SUBIMAGE_GRIDS),
    Recipe("interval_attention", "contiguous", "contiguous, a prompt", _CROSS_GRIDS),
    Recipe("interval_attention", "contiguous_decode", "contiguous, one token, keys not split", _CROSS_GRIDS),
    Recipe("interval_attention", "prompt", "any strides, a prompt", _CROSS_GRIDS),
    Recipe("interval_attention", "short", "any strides, a short prompt", _CROSS_GRIDS),
    Recipe("interval_attention", "decode", "any strides, a step of several batch rows, keys split", _CROSS_GRIDS),
    Recipe("interval_attention", "decode_one", "any strides, a step of one batch row, keys split", _CROSS_GRIDS),
)
PARAMETERS = {
    "q_ptr": "queries",
    "k_ptr": "keys",
    "v_ptr": "values",
    "qkv_ptr": "[batch, num_tokens, 3, H, D]",
    "x_ptr": "keys before the rotation",
    "cos_ptr": "cosines, fp32 [num_tokens - prefix, D]",
    "sin_ptr": "sines, like the cosines",
    "range_ptr": "kv_range [batch, num_tokens, 2], int64",
    "plan_ptr": "workspace: int32 [cdiv(batch, ROWS), 7, ROWS], written by plan_kernel",
    "part_ptr": "workspace: fp32 [splits, batch, num_tokens, heads, D]",
    "part_lse_ptr": "workspace: fp32 [splits, batch, num_tokens, heads]",
    "out_ptr": "output, contiguous",
    "lse_ptr": "output: log-sum-exp, fp32 [batch, heads, num_tokens]",
    "scale": "multiplies the scores; D ** -0.5 as a rule",
    "num_tokens": "tokens of a tile or batch row",
    "max_tokens": "the same as num_tokens",
    "num_heads": "heads",
    "num_kv_heads": "heads of keys and values",
    "num_keys": "rows of keys and values",
    "num_batches": "batch rows",
    "num_rows": "batch * num_tokens * heads",
    "num_units": "see choose_split in kernels/interval/config.py",
    "num_splits": "see choose_split",
    "max_splits": "see choose_split",
    "pool": "see choose_split",
    "group_size": "query heads of one KV head",
    "rope_prefix": "leading tokens that are not rotated",
    "prefix": "leading tokens that are not rotated",
}


def describe_parameter(name: str) -> str:
    """Return what one parameter means."""
    if name.startswith("stride_r"):
        return "stride of kv_range, in elements"
    if name.startswith("stride_"):
        axis = {"b": "batch", "n": "token", "h": "head"}[name[-1]]
        return f"{axis} stride of {name[len('stride_') : -1]}, in units of ALIGN elements"
    return PARAMETERS[name]


def sources_of(recipe: Recipe, request: Request) -> Iterator[tuple[KernelSource, Launch | None, int]]:
    """Yield each kernel of a recipe, with the recorded launch and its batch unless it is an entry."""
    runner = _RUNNERS[recipe.op, recipe.variant]
    with recorded_launches() as launches:
        result = runner(request)
    if isinstance(result, KernelSource):
        yield result, None, 0
        return
    for launch in launches:
        yield source_of(launch), launch, result


def _subimage_entry(tokens: int | None) -> Callable[[Request], KernelSource]:
    return lambda r: subimage_source(r.heads, r.head_dim, r.dtype, tokens, r.sm, r.head_dim**-0.5, packed=True)


def _cross_entry(rows: int) -> Callable[[Request], KernelSource]:
    return lambda r: cross_attention_source(r.heads, r.heads, r.head_dim, r.dtype, torch.int64, r.sm, r.head_dim**-0.5, rows)


def _subimage(tokens: int, *, peel: bool = True, rope: bool = False) -> Callable[[Request], int]:
    def run(request: Request) -> int:
        sizes = {"tiles": TILES, "tokens": tokens, "heads": request.heads, "head_dim": request.head_dim, "rope": int(rope)}
        job = Job("forward", Case("exported", sizes), dtype_name(request.dtype), request.sm)
        config = SUBIMAGE.config(job)
        inputs = SUBIMAGE.make_inputs(job.case, request.dtype, _META)
        SUBIMAGE.launch(job, inputs, replace(config, peel=config.peel and peel))
        return TILES

    return run


def _cross(kernel: str, tokens: int, batch: int = TILES) -> Callable[[Request], int]:
    def run(request: Request) -> int:
        heads = request.heads
        sizes = make_sizes(batch, tokens, heads, heads, request.head_dim, shared=1, kv_blocks=1)
        job = Job(kernel, Case("exported", sizes), dtype_name(request.dtype), request.sm)
        CROSS.launch(job, CROSS.make_inputs(job.case, request.dtype, _META), CROSS.config(job))
        return batch

    return run


_RUNNERS: dict[tuple[str, str], Callable[[Request], Any]] = {
    ("subimage_attention", "packed"): _subimage_entry(TOKENS),
    ("subimage_attention", "packed_masked"): _subimage_entry(None),
    ("subimage_attention", "peeled"): _subimage(TOKENS),
    ("subimage_attention", "masked"): _subimage(729, peel=False),
    ("subimage_attention", "rope"): _subimage(TOKENS, rope=True),
    ("subimage_attention", "short"): _subimage(SHORT - 1),
    ("interval_attention", "contiguous"): _cross_entry(CROSS_ROWS["prompt"]),
    ("interval_attention", "contiguous_decode"): _cross_entry(CROSS_ROWS["decode"]),
    ("interval_attention", "prompt"): _cross("forward", CROSS_ROWS["prompt"]),
    ("interval_attention", "short"): _cross("forward", CROSS_ROWS["short"]),
    ("interval_attention", "decode"): _cross("decode", CROSS_ROWS["decode"]),
    ("interval_attention", "decode_one"): _cross("decode", CROSS_ROWS["decode"], batch=1),
}


def evaluate_grid(formula: str, values: dict[str, Any], batch: int) -> int:
    """Return the number of programs that a formula gives for a kernel's arguments and constants."""
    names = {**values, "batch": batch, "cdiv": lambda a, b: -(-a // b)}
    return int(eval(formula, {"__builtins__": {}}, names))
