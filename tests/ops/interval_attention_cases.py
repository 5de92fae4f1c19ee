"""One case of gated cross-attention, forward and backward, against the fp64 reference; in any process, on any device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.common.numerics import Errors, assert_error_budget, outlier_normal, poisoned_memory
from infimm_fast.kernels.interval import api
from infimm_fast.kernels.interval.config import (
    DECODE_TOKENS,
    MIN_BLOCKS_PER_UNIT,
    PLAN_ROWS,
    choose_config,
    choose_split,
)
from infimm_fast.kernels.interval.reference import interval_attention_reference
from mutation import mutated


def check_case(
    head_dim: int,
    tokens: int,
    keys: int,
    dtype: str,
    *,
    rows: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    ranges: str = "random",
    index: str = "int64",
    layout: str = "apart",
    scale: float | None = None,
    gradients: bool = True,
    backend: str = "triton",
    device: str = "cpu",
    config: dict[str, Any] | None = None,
    mutation: tuple[str, str, str] | None = None,
) -> dict[str, Errors]:
    """Assert that output, log-sum-exp, dq, dk and dv are within the budget and fully written.

    Args:
        head_dim: D.
        tokens: T.
        keys: S.
        dtype: name of a torch dtype.
        rows: B.
        heads: Hq.
        kv_heads: Hkv.
        ranges: a key of `RANGES`.
        index: dtype of the intervals.
        layout: how tensors lie in memory, a key of `LAYOUTS`.
        scale: passed on; default ``D ** -0.5``.
        gradients: check them too.
        backend: passed on. For Triton, queries and gradients of tokens that see nothing are NaN.
        device: where the kernel runs.
        config: fields of `LaunchConfig` that replace the chosen ones.
        mutation: (file, text, replacement): run kernels with this text of their source replaced.
    """
    kind = getattr(torch, dtype)
    seed = head_dim + tokens + keys
    q = outlier_normal(rows, tokens, heads, head_dim, dtype=kind, seed=seed)
    kv = outlier_normal(keys, 2, kv_heads, head_dim, dtype=kind, seed=seed + 1)
    grad = outlier_normal(rows, tokens, heads, head_dim, dtype=kind, seed=seed + 2)
    kv_range = RANGES[ranges](rows, tokens, keys).to(getattr(torch, index))

    def state(wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(wide, copy=True).requires_grad_() for x in (q, kv)]
        k, v = leaves[1].unbind(1)
        out, lse = interval_attention_reference(leaves[0], k, v, kv_range, scale or head_dim**-0.5)
        (out + sum(leaf.sum() * 0.0 for leaf in leaves)).backward(grad.to(wide))  # also if nothing is seen at all
        return [out.detach(), lse.detach(), leaves[0].grad, *leaves[1].grad.unbind(1)]

    exact, plain = state(torch.float64), state(kind)
    bounds = kv_range.clamp(0, keys)
    empty = bounds[..., 0] >= bounds[..., 1]
    spoiled, spoiled_grad = q.clone(), grad.clone()
    if backend == "triton":
        spoiled[empty] = float("nan")
        spoiled_grad[empty] = float("nan")
    pack, unpack = LAYOUTS[layout]
    q_leaf, kv_leaf, stored_range = (x.to(device) for x in pack(spoiled, kv.clone(), kv_range))
    q_leaf.requires_grad_(gradients)
    kv_leaf.requires_grad_(gradients)
    with poisoned_memory(), changed_config(config), mutated("interval", mutation):
        out, lse = api.interval_attention(
            *unpack(q_leaf, kv_leaf, stored_range), scale=scale, return_lse=True, backend=backend
        )
        if gradients:
            out.backward(spoiled_grad.to(device))
    assert lse.dtype == torch.float32 and not lse.requires_grad and out.dtype == kind
    assert (out[empty] == 0).all(), "out: a token that sees nothing is not 0"
    actual = [out.detach(), lse]
    if gradients:
        actual += unpack(q_leaf.grad, kv_leaf.grad, stored_range)[:3]
        assert (actual[2][empty] == 0).all(), "dq: a token that sees nothing has a gradient"
    results = zip(("out", "lse", "dq", "dk", "dv"), actual, plain, exact, strict=False)
    return {name: assert_error_budget(name, a.cpu(), p, e) for name, a, p, e in results}


def _random(rows: int, tokens: int, keys: int) -> torch.Tensor:
    """Any intervals; among them empty, reversed, full ones and ones that have to be clamped."""
    generator = torch.Generator().manual_seed(rows + tokens + keys)
    result = torch.randint(0, keys + 1, (rows, tokens, 2), generator=generator).sort(dim=-1).values
    special = torch.tensor([[0, 0], [keys, 0], [0, keys], [-3, keys + 3], [keys - 1, keys], [0, 1]])
    count = min(len(special), tokens - 1)
    result[0, 1 : 1 + count] = special[:count]
    return result


def _cut(rows: int, tokens: int, keys: int) -> torch.Tensor:
    """Boundaries on both sides of multiples of a block's 16, 32 or 64 keys."""
    token = torch.arange(rows * tokens).view(rows, tokens)
    start = (token % 3) * 16 + token % 5 - 2
    return torch.stack((start, start + 29 + (token % 4) * 16), dim=-1)


def _images(rows: int, tokens: int, keys: int) -> torch.Tensor:
    """40 images of different sizes for each row; a token sees the latest one, the first tokens none."""
    count = 40 * rows
    offset = torch.arange(count + 1) * keys // count
    token = torch.arange(tokens)
    latest = (token * 41 // tokens - 1).clamp(min=0) + 40 * torch.arange(rows)[:, None]
    result = torch.stack((offset[latest], offset[latest + 1]), dim=-1)
    result[:, token * 41 // tokens == 0] = 0
    return result


def _ragged(rows: int, tokens: int, keys: int) -> torch.Tensor:
    """Rows with nothing, one key, a few, nearly all; later tokens of a row see a little less."""
    lengths = torch.tensor([keys, 0, 1, 17, keys // 2, 3])[torch.arange(rows) % 6]
    first = (keys - lengths) // 2
    start = first[:, None] + torch.arange(tokens) % 3
    return torch.stack((start, (first + lengths)[:, None].expand_as(start)), dim=-1)


def _grouped(rows: int, tokens: int, keys: int) -> torch.Tensor:
    """Rows with equal hulls, scattered; some share only a start or only an end with a shorter one before them."""
    hulls = torch.tensor([[keys // 3, keys // 2], [0, keys // 2], [0, keys], [keys // 3, keys], [0, 0]])
    row = torch.arange(rows)
    token = torch.arange(tokens)
    inwards = torch.stack((token, -token), dim=-1).flip(0) * 2  # [tokens, 2]; the last token sees most
    return hulls[(row * 7 + row // 3) % len(hulls)][:, None] + inwards


def _distinct(rows: int, tokens: int, keys: int) -> torch.Tensor:
    """A picture of its own for each row, all of one size."""
    bounds = torch.arange(rows + 1) * (keys // rows)
    return torch.stack((bounds[:-1], bounds[1:]), dim=-1)[:, None].repeat(1, tokens, 1)


def _alone(rows: int, tokens: int, keys: int) -> torch.Tensor:
    """One row sees everything, the others nothing."""
    result = torch.full((rows, tokens, 2), keys // 2)
    result[rows // 2] = torch.tensor([0, keys])
    return result


def _constant(start: Callable[[int], int], end: Callable[[int], int]) -> Callable[[int, int, int], torch.Tensor]:
    return lambda rows, tokens, keys: torch.tensor([start(keys), end(keys)]).repeat(rows, tokens, 1)


# Intervals ``[B, T, 2]`` from B, T and S.
RANGES: dict[str, Callable[[int, int, int], torch.Tensor]] = {
    "random": _random,
    "cut": _cut,
    "images": _images,
    "ragged": _ragged,
    "grouped": _grouped,
    "alone": _alone,
    "distinct": _distinct,
    "empty": _constant(lambda keys: keys // 2, lambda keys: keys // 2),
    "full": _constant(lambda keys: 0, lambda keys: keys),
    "shared": _constant(lambda keys: keys // 4, lambda keys: keys // 2 + 1),
}


def _same(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensors


def _split(q: torch.Tensor, kv: torch.Tensor, kv_range: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return q, *kv.unbind(1), kv_range


def _pack_blocks(q: torch.Tensor, kv: torch.Tensor, kv_range: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """K and V of this block among those of five; intervals stored bounds first."""
    others = torch.full((kv.shape[0], 8, *kv.shape[2:]), float("nan"), dtype=kv.dtype)
    return q.transpose(1, 2).contiguous(), torch.cat((others, kv), dim=1), kv_range.permute(2, 1, 0).contiguous()


def _unpack_blocks(q: torch.Tensor, kv: torch.Tensor, kv_range: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return q.transpose(1, 2), *kv[:, 8:].unbind(1), kv_range.permute(2, 1, 0)


def _pack_offset(q: torch.Tensor, kv: torch.Tensor, kv_range: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.nn.functional.pad(q, (3, 2)), torch.nn.functional.pad(kv, (1, 0)), kv_range


def _unpack_offset(q: torch.Tensor, kv: torch.Tensor, kv_range: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return q[..., 3:-2], *kv[..., 1:].unbind(1), kv_range


def _pack_columns(q: torch.Tensor, kv: torch.Tensor, kv_range: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return q.transpose(2, 3).contiguous(), kv.transpose(2, 3).contiguous(), kv_range


def _unpack_columns(q: torch.Tensor, kv: torch.Tensor, kv_range: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return q.transpose(2, 3), *kv.transpose(2, 3).unbind(1), kv_range


# How q ``[B, T, Hq, D]``, kv ``[S, 2, Hkv, D]`` and the intervals may lie in memory: (to storage, storage to q, k, v and
# intervals). "blocks" has a token stride ten times as large, "offset" no aligned address, "columns" a strided last axis.
LAYOUTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "apart": (_same, _split),
    "blocks": (_pack_blocks, _unpack_blocks),
    "offset": (_pack_offset, _unpack_offset),
    "columns": (_pack_columns, _unpack_columns),
}


@contextlib.contextmanager
def changed_config(fields: dict[str, Any] | None) -> Iterator[None]:
    """Replace fields of every chosen `LaunchConfig`."""
    if fields is None:
        yield
        return
    from infimm_fast.kernels.interval import backward, forward

    def choose(*args: Any, **kwargs: Any) -> LaunchConfig:
        return replace(choose_config(*args, **kwargs), **fields)

    with mock.patch.object(forward, "choose_config", choose), mock.patch.object(backward, "choose_config", choose):
        yield


def _inputs(
    tokens: int = 5, head_dim: int = 24, device: str = "cpu", dtype: torch.dtype = torch.float32, rows: int = 2
) -> list[Any]:
    keys = 20
    q = outlier_normal(rows, tokens, 2, head_dim, dtype=dtype, device=device).requires_grad_()
    k = outlier_normal(keys, 1, head_dim, dtype=dtype, device=device, seed=1).requires_grad_()
    v = outlier_normal(keys, 1, head_dim, dtype=dtype, device=device, seed=2).requires_grad_()
    return [q, k, v, _random(rows, tokens, keys).to(device)]


def check_opcheck(backend: str = "triton", device: str = "cpu") -> None:
    """The operator and its backward keep their promises to PyTorch."""
    namespace = torch.ops.infimm_fast
    inputs = _inputs(device=device, rows=1)
    torch.library.opcheck(namespace.interval_attention.default, (*inputs, 0.3, backend))
    plain = [x.detach() for x in inputs]
    out, lse = namespace.interval_attention(*plain, 0.3, backend)
    arguments = (torch.ones_like(out), *plain, out, lse, 0.3, backend)
    torch.library.opcheck(namespace.interval_attention_backward.default, arguments)


def _loss(backend: str) -> Callable[..., torch.Tensor]:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_range: torch.Tensor) -> torch.Tensor:
        return api.interval_attention(q, k, v, kv_range, backend=backend, validate=True).sin().sum()

    return run


def check_compile(backend: str = "triton", device: str = "cpu") -> None:
    """One graph without breaks, with the same numbers, also when the length changes."""
    run = _loss(backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 13):
        q, k, v, _ = inputs = _inputs(tokens, device=device)
        inputs[3].clamp_(0, len(k))
        expected = torch.autograd.grad(run(*inputs), (q, k, v))
        actual = torch.autograd.grad(compiled(*inputs), (q, k, v))
        torch.testing.assert_close(actual, expected)


def check_checkpoint(backend: str = "triton", device: str = "cpu") -> None:
    """Recomputing the forward during the backward gives the same gradients."""
    run = _loss(backend)
    q, k, v, _ = inputs = _inputs(device=device)
    inputs[3].clamp_(0, len(k))
    expected = torch.autograd.grad(run(*inputs), (q, k, v))
    actual = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False), (q, k, v))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_deterministic(backend: str = "triton", device: str = "cpu") -> None:
    """Two runs agree to the bit."""
    runs = []
    for _ in range(2):
        q, k, v, kv_range = _inputs(9, device=device)
        out = api.interval_attention(q, k, v, kv_range, backend=backend)
        runs.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def check_decode_deterministic(backend: str = "triton", device: str = "cpu") -> None:
    """Two runs agree to the bit; the intervals of other rows move a row within rounding."""
    rows, keys = 5, 520
    q = outlier_normal(rows, 1, 2, 64, dtype=torch.float32, device=device)
    k, v = (outlier_normal(keys, 1, 64, dtype=torch.float32, device=device, seed=seed) for seed in (1, 2))
    shared = RANGES["shared"](rows, 1, keys).to(device)
    first, second = (api.interval_attention(q, k, v, shared, return_lse=True, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    others = RANGES["random"](rows, 1, keys).to(device)
    others[3] = shared[3]
    changed = api.interval_attention(q, k, v, others, return_lse=True, backend=backend)
    for now, before in zip(changed, first, strict=True):
        torch.testing.assert_close(now[3], before[3], rtol=1e-5, atol=1e-5)


def check_nothing_to_see(backend: str = "triton", device: str = "cpu") -> None:
    """No keys, no tokens and no rows are ordinary inputs."""
    for rows, tokens, keys in ((2, 3, 0), (2, 0, 5), (0, 3, 5)):
        q = torch.ones(rows, tokens, 4, 8, requires_grad=True, device=device)
        k, v = (torch.ones(keys, 2, 8, requires_grad=True, device=device) for _ in range(2))
        kv_range = torch.tensor([0, 5], device=device).expand(rows, tokens, 2)
        out, lse = api.interval_attention(q, k, v, kv_range, return_lse=True, backend=backend)
        out.sum().backward()
        assert out.shape == q.shape and (out == 0).all() and (lse == float("-inf")).all()
        assert all((x.grad == 0).all() and x.grad.shape == x.shape for x in (q, k, v))


def check_explicit_never_falls_back() -> None:
    """What the kernel does not take is refused by name; it takes CPU tensors here."""
    refused = ((12, torch.float32, "multiples of 8"), (136, torch.float32, "multiples of 8"), (8, torch.float64, "float64"))
    for head_dim, dtype, match in refused:
        try:
            api.interval_attention(*_inputs(3, head_dim, dtype=dtype), backend="triton")
        except api.KernelArgumentError as error:
            assert match in str(error)
        else:
            raise AssertionError(f"accepted {head_dim} {dtype}")


def check_plan(rows: int, tokens: int, group: int, ranges: str, keys: int = 3000) -> None:
    """Every query has its keys in one tile; groups fill tiles; units fit the grid and are about equally long."""
    from infimm_fast.kernels.interval import decode

    config = choose_config("decode", 64, torch.float16, tokens * group, 90, batch=rows)
    split = choose_split(rows, tokens, group, 12, keys, config)
    assert split is not None
    kv_range = RANGES[ranges](rows, tokens, keys)
    plan = torch.empty(decode.FIELDS.value, PLAN_ROWS, dtype=torch.int32)
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "TOKENS": DECODE_TOKENS, "ROWS": PLAN_ROWS}
    decode.plan_kernel[(1,)](
        kv_range, rows, tokens, keys, group, split.pool, split.splits, *kv_range.stride(), plan,
        MIN_BLOCKS=MIN_BLOCKS_PER_UNIT, COMPARED=decode.COMPARED_ROWS, **sizes,
    )  # fmt: skip
    ends, order, first, size, low, high, splits = plan[:, :rows].tolist()
    bounds = kv_range.clamp(0, keys).tolist()
    hulls = []
    for row in bounds:
        seen = [(start, end) for start, end in row if start < end] or [(0, 0)]
        hulls.append((min(start for start, _ in seen), max(end for _, end in seen)))
    assert sorted(order) == list(range(rows)) and list(zip(low, high, strict=True)) == hulls
    units, blocks_of, work = 0, {}, 0
    for row, hull in enumerate(hulls):
        members = [other for other in range(rows) if hulls[other] == hull]
        assert order[first[row] : first[row] + size[row]] == members
        blocks_of[row] = -(-(hull[1] - hull[0]) // config.block_n)
        assert (splits[row] == 0) == (blocks_of[row] == 0) and splits[row] <= split.splits
        if row == members[0]:
            tiles = -(-len(members) * tokens * group // config.block_m)
            units += tiles * splits[row]
            work += tiles * blocks_of[row]
        assert ends[row] == units
    assert units <= split.units
    share = max(MIN_BLOCKS_PER_UNIT, -(-work // split.pool))
    assert all(splits[row] == min(split.splits, -(-blocks_of[row] // share)) for row in range(rows))
