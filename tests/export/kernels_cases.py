"""Runs the contiguous entries; imported by the interpreter's process, which has TRITON_INTERPRET=1, and by GPU tests."""

from __future__ import annotations

from typing import Any

import torch

from infimm_fast.export.to_kernels import sources
from infimm_fast.export.to_kernels.recipes import RECIPES, evaluate_grid
from infimm_fast.kernels.common.numerics import assert_error_budget, outlier_normal, poisoned_memory
from infimm_fast.kernels.interval.reference import interval_attention_reference
from infimm_fast.kernels.subimage.reference import subimage_attention_reference

GRIDS = {name: formula for recipe in RECIPES for name, formula in recipe.grids.items() if name.endswith("_entry")}


def run_entry(source: Any, arguments: tuple, batch: int) -> torch.Tensor:
    """Launch an entry with its documented grid; its output is poisoned before."""
    names = [name for name, kind in source.signature.items() if kind != "constexpr"]
    with poisoned_memory():
        out = torch.empty_like(arguments[-1])
    values = dict(zip(names, (*arguments[:-1], out), strict=True)) | source.constants
    programs = evaluate_grid(GRIDS[source.kernel.__name__], values, batch)
    source.kernel[(programs,)](**values, **source.options)
    return out


def check_subimage(
    head_dim: int, tokens: int, dtype: str, packed: bool, known: bool = True, device: str = "cpu", scale: float = 1.0
) -> None:
    """Compare with the reference; `scale` multiplies the kernel's scale, 1 for a correct one."""
    kind = getattr(torch, dtype)
    qkv = outlier_normal(2, tokens, 3, 3, head_dim, dtype=kind, device=device)
    sm = 80 if device == "cpu" else 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    source = sources.subimage_source(3, head_dim, kind, tokens if known else None, sm, head_dim**-0.5 * scale, packed)
    parts = (qkv,) if packed else tuple(part.contiguous() for part in qkv.unbind(2))
    out = run_entry(source, (*parts, tokens, qkv[:, :, 0].contiguous()), 2)
    plain, _ = subimage_attention_reference(*qkv.unbind(2), head_dim**-0.5)
    exact, _ = subimage_attention_reference(*qkv.double().unbind(2), head_dim**-0.5)
    assert_error_budget("out", out, plain, exact)


def check_cross(
    head_dim: int, tokens: int, dtype: str, heads: int = 4, kv_heads: int = 2, index: str = "int64", device: str = "cpu"
) -> None:
    kind = getattr(torch, dtype)
    keys = 75
    q = outlier_normal(3, tokens, heads, head_dim, dtype=kind, device=device)
    k = outlier_normal(keys, kv_heads, head_dim, dtype=kind, device=device, seed=1)
    v = outlier_normal(keys, kv_heads, head_dim, dtype=kind, device=device, seed=2)
    generator = torch.Generator().manual_seed(0)
    kv_range = torch.randint(0, keys + 1, (3, tokens, 2), generator=generator)  # about half of them are empty
    kv_range = kv_range.to(device, getattr(torch, index))
    sm = 80 if device == "cpu" else 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    source = sources.cross_attention_source(
        heads, kv_heads, head_dim, kind, kv_range.dtype, sm, head_dim**-0.5, tokens * heads // kv_heads
    )
    out = run_entry(source, (q, k, v, kv_range, tokens, keys, q), 3)
    plain, _ = interval_attention_reference(q, k, v, kv_range, head_dim**-0.5)
    exact, _ = interval_attention_reference(q.double(), k.double(), v.double(), kv_range, head_dim**-0.5)
    assert_error_budget("out", out, plain, exact)
