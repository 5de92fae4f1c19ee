"""One case of sub-image attention, forward and backward, against the fp64 reference; in any process, on any device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.common.numerics import Errors, assert_error_budget, outlier_normal, poisoned_memory
from infimm_fast.kernels.subimage import api
from infimm_fast.kernels.subimage.config import choose_config
from infimm_fast.kernels.subimage.reference import apply_rope, subimage_attention_reference
from mutation import mutated


def check_case(
    head_dim: int,
    tokens: int,
    dtype: str,
    *,
    tiles: int = 2,
    heads: int = 2,
    layout: str = "packed",
    rope: str | None = None,
    prefix: int = 1,
    lengths: list[int] | None = None,
    offsets: list[int] | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    backend: str = "triton",
    device: str = "cpu",
    config: dict[str, Any] | None = None,
    mutation: tuple[str, str, str] | None = None,
) -> dict[str, Errors]:
    """Assert that output, log-sum-exp, dq, dk and dv are within the budget and fully written.

    Args:
        head_dim: D.
        tokens: N.
        dtype: name of a torch dtype.
        tiles: B.
        heads: H.
        layout: how q, k, v lie in memory, a key of `LAYOUTS`.
        rope: None, "interleaved" or "halves".
        prefix: tokens that are not rotated; only with `rope`.
        lengths: valid tokens of each tile. What lies behind them is NaN.
        offsets: cumulative offsets of packed sequences.
        max_seqlen: passed on.
        causal: passed on.
        backend: passed on.
        device: where the kernel runs.
        config: fields of `LaunchConfig` that replace the chosen ones.
        mutation: (file, text, replacement): run kernels with this text of their source replaced.
    """
    kind = getattr(torch, dtype)
    values = outlier_normal(3, tiles, tokens, heads, head_dim, dtype=kind, seed=head_dim + tokens)
    grad = outlier_normal(tiles, tokens, heads, head_dim, dtype=kind, seed=1)
    prefix = prefix if rope else 0
    tables = rope_tables(tokens - prefix, head_dim, rope == "interleaved") if rope else (None, None)
    seqlens = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    visibility = {"seqlens": seqlens, "cu_seqlens": cu_seqlens, "is_causal": causal}

    def state(wide: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (values[i].to(wide).requires_grad_() for i in range(3))
        turned = (q, k)
        if rope:
            turned = tuple(apply_rope(x, *tables, prefix, rope == "interleaved") for x in turned)
        out, lse = subimage_attention_reference(*turned, v, head_dim**-0.5, **visibility)
        out.backward(grad.to(wide))
        return [out.detach(), lse.detach(), q.grad, k.grad, v.grad]

    exact, plain = state(torch.float64), state(kind)
    spoiled, spoiled_grad = values.clone(), grad.clone()
    for tile, length in enumerate(lengths or []):
        spoiled[:, tile, max(length, 0) :] = float("nan")
        spoiled_grad[tile, max(length, 0) :] = float("nan")
    pack, unpack = LAYOUTS[layout]
    leaf = pack(spoiled).to(device).requires_grad_()
    options = {
        "rope_cos": to(tables[0], device),
        "rope_sin": to(tables[1], device),
        "rope_prefix": prefix,
        "rope_interleaved": rope != "halves",
        "seqlens": to(seqlens, device),
        "cu_seqlens": to(cu_seqlens, device),
        "max_seqlen": max_seqlen,
        "is_causal": causal,
        "return_lse": True,
        "backend": backend,
    }
    with poisoned_memory(), changed_config(config), mutated("subimage", mutation):
        if layout == "packed":
            out, lse = api.subimage_attention_packed(leaf, **options)
        else:
            out, lse = api.subimage_attention(*unpack(leaf, values.shape), **options)
        out.backward(spoiled_grad.to(device))
    assert lse.dtype == torch.float32 and not lse.requires_grad
    actual = [out.detach(), lse, *unpack(leaf.grad, values.shape)]
    names = ("out", "lse", "dq", "dk", "dv")
    rows = zip(names, actual, plain, exact, strict=True)
    return {name: assert_error_budget(name, a.cpu(), p, e) for name, a, p, e in rows}


def to(tensor: torch.Tensor | None, device: str) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def rope_tables(tokens: int, head_dim: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles that differ between all tokens and pairs."""
    pairs = outlier_normal(tokens, head_dim // 2, dtype=torch.float32, seed=2)
    angles = pairs.repeat_interleave(2, dim=-1) if interleaved else torch.cat((pairs, pairs), dim=-1)
    return angles.cos(), angles.sin()


def _unpack_offset(leaf: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, ...]:
    _, tiles, tokens, heads, head_dim = shape
    return leaf[3:].view(tiles, tokens, 3, heads, head_dim).unbind(2)


# How q, k, v ``[3, B, N, H, D]`` may lie in memory: (values -> leaf, leaf and shape -> the three views ``[B, N, H,
# D]``). "offset" starts at an odd element, so that no address is aligned; "broad" has rows longer than their heads.
LAYOUTS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., tuple[torch.Tensor, ...]]]] = {
    "packed": (lambda x: x.permute(1, 2, 0, 3, 4).contiguous(), lambda leaf, _: leaf.unbind(2)),
    "apart": (lambda x: x.clone(), lambda leaf, _: leaf.unbind(0)),
    "heads_first": (lambda x: x.transpose(2, 3).contiguous(), lambda leaf, _: leaf.transpose(2, 3).unbind(0)),
    "offset": (lambda x: torch.cat((x.new_zeros(3), x.permute(1, 2, 0, 3, 4).flatten())), _unpack_offset),
    "broad": (lambda x: torch.cat((x, x[:, :, :, :1]), dim=3), lambda leaf, _: leaf[:, :, :, :-1].unbind(0)),
    "strided": (lambda x: x.transpose(-1, -2).contiguous(), lambda leaf, _: leaf.transpose(-1, -2).unbind(0)),
}


@contextlib.contextmanager
def changed_config(fields: dict[str, Any] | None) -> Iterator[None]:
    """Replace fields of every chosen `LaunchConfig`."""
    if fields is None:
        yield
        return
    from infimm_fast.kernels.subimage import backward, forward

    def choose(*args: Any, **kwargs: Any) -> LaunchConfig:
        return replace(choose_config(*args, **kwargs), **fields)

    with mock.patch.object(forward, "choose_config", choose), mock.patch.object(backward, "choose_config", choose):
        yield


def _qkv(tokens: int = 17, head_dim: int = 72, device: str = "cpu") -> torch.Tensor:
    return outlier_normal(1, tokens, 3, 2, head_dim, dtype=torch.float32, device=device).requires_grad_()


def _options(tokens: int, head_dim: int, backend: str, device: str) -> tuple[Any, ...]:
    cos, sin = (table.to(device) for table in rope_tables(tokens - 1, head_dim, True))
    seqlens = torch.tensor([tokens - 2], device=device)
    return (head_dim**-0.5, cos, sin, 1, True, seqlens, None, tokens, False, backend)


def check_opcheck(backend: str = "triton", device: str = "cpu") -> None:
    """Both operators and their backwards keep their promises to PyTorch."""
    qkv, options = _qkv(5, 24, device), _options(5, 24, backend, device)
    namespace = torch.ops.infimm_fast
    apart = tuple(x.detach().requires_grad_() for x in qkv.unbind(2))
    torch.library.opcheck(namespace.subimage_attention.default, (*apart, *options))
    torch.library.opcheck(namespace.subimage_attention_packed.default, (qkv, *options))
    out, lse = namespace.subimage_attention_packed(qkv.detach(), *options)
    plain = tuple(x.detach() for x in apart)
    torch.library.opcheck(namespace.subimage_attention_backward.default, (out, *plain, out, lse, *options))
    torch.library.opcheck(namespace.subimage_attention_packed_backward.default, (out, qkv.detach(), out, lse, *options))


def check_compile(backend: str = "triton", device: str = "cpu") -> None:
    """One graph without breaks, with the same numbers, also when the length changes."""

    def run(qkv: torch.Tensor) -> torch.Tensor:
        return api.subimage_attention_packed(qkv, backend=backend).sin().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (17, 23):
        qkv = _qkv(tokens, device=device)
        (expected,) = torch.autograd.grad(run(qkv), qkv)
        (actual,) = torch.autograd.grad(compiled(qkv), qkv)
        torch.testing.assert_close(actual, expected)


def check_checkpoint(backend: str = "triton", device: str = "cpu") -> None:
    """Recomputing the forward during the backward gives the same gradient."""

    def run(qkv: torch.Tensor) -> torch.Tensor:
        return api.subimage_attention_packed(qkv, backend=backend).sin().sum()

    qkv = _qkv(device=device)
    (expected,) = torch.autograd.grad(run(qkv), qkv)
    (actual,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, qkv, use_reentrant=False), qkv)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_deterministic() -> None:
    """Two runs agree to the bit."""
    grads = []
    for _ in range(2):
        qkv = _qkv(70)
        api.subimage_attention_packed(qkv, backend="triton").sin().sum().backward()
        grads.append(qkv.grad)
    assert torch.equal(*grads)


def check_explicit_never_falls_back() -> None:
    """What the kernel does not take is refused by name; it takes CPU tensors here."""
    refused = ((_qkv(17, 12), "multiples of 8"), (_qkv(17, 136), "multiples of 8"), (_qkv().double(), "float64"))
    for qkv, match in refused:
        try:
            api.subimage_attention_packed(qkv, backend="triton")
        except api.KernelArgumentError as error:
            assert match in str(error)
        else:
            raise AssertionError(f"accepted {list(qkv.shape)} {qkv.dtype}")
