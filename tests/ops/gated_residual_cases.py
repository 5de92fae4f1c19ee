"""One case of the gated residual, forward and backward, against the fp64 reference; in any process, on any device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from infimm_fast.kernels.common.numerics import Errors, assert_error_budget, outlier_normal, poisoned_memory
from infimm_fast.kernels.residual import api, config
from infimm_fast.kernels.residual.reference import gated_residual_reference
from mutation import mutated

GRADIENTS = ("dx", "dy", "dgate", "dweight", "dbias")
NORM_EPS = 1e-2  # large enough to be seen
# By row of the batch; a name instead of the values, so that a case can be sent to another process.
KEEPS: dict[str, torch.Tensor | None] = {
    "none": None,
    "bool": torch.tensor([True, False, True]),
    "int64": torch.tensor([0, 1, 1]),
    "float32": torch.tensor([0.5, 0.0, -1.25]),
    "nothing": torch.zeros(3, dtype=torch.bool),
}


def check_case(
    channels: int,
    tokens: int,
    dtype: str,
    *,
    gate: str = "vector",
    gate_dtype: str | None = None,
    keep: str = "bool",
    norm: bool = True,
    layout: str = "apart",
    gradients: bool = True,
    backend: str = "triton",
    device: str = "cpu",
    max_programs: int | None = None,
    mutation: tuple[str, str, str] | None = None,
) -> dict[str, Errors]:
    """Assert that the sum, its LayerNorm and all gradients are within the budget and fully written.

    Args:
        channels: C.
        tokens: T, in each of 3 rows.
        dtype: name of a torch dtype.
        gate: "vector" or "scalar".
        gate_dtype: of gate, weight and bias; default `dtype`.
        keep: a key of `KEEPS`.
        norm: with a LayerNorm.
        layout: how x and y lie in memory, a key of `LAYOUTS`.
        gradients: check them too.
        backend: passed on. y is NaN in rows that are not kept.
        device: where the kernel runs.
        max_programs: overrides the number of programs of a launch, so that each takes several steps.
        mutation: (file, text, replacement): run kernels with this text of their source replaced.
    """
    kind, vector_kind = getattr(torch, dtype), getattr(torch, gate_dtype or dtype)
    shape, seed = (3, tokens, channels), channels + tokens
    x, y, grad, grad_normed = (outlier_normal(*shape, dtype=kind, seed=seed + i) for i in range(4))
    vectors = [outlier_normal(1 if gate == "scalar" else channels, dtype=vector_kind, seed=seed + 4, outliers=1)]
    if norm:
        vectors += [outlier_normal(channels, dtype=vector_kind, seed=seed + i) for i in (5, 6)]
    flags = KEEPS[keep]

    def state(run: Callable[..., Any], x: torch.Tensor, y: torch.Tensor, wide: torch.dtype | None) -> list[torch.Tensor]:
        """Results and gradients of one implementation; `wide` converts all floating-point inputs."""
        leaves = [t.detach().to(wide or t.dtype).requires_grad_(gradients) for t in (x, y, *vectors)]
        out, normed = run(*leaves[:3], flags, *(leaves[3:] or (None, None)))
        if not gradients:
            return [out, normed][: 1 + norm]
        outputs, incoming = ([out, normed], [grad, grad_normed]) if norm else ([out], [grad])
        torch.autograd.backward(outputs, [g.to(o.dtype) for o, g in zip(outputs, incoming, strict=True)])
        return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves)]

    def reference(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return gated_residual_reference(*arguments, NORM_EPS)

    exact, plain = state(reference, x, y, torch.float64), state(reference, x, y, None)
    pack, unpack = LAYOUTS[layout]
    dropped = torch.zeros(3, dtype=torch.bool) if flags is None else flags == 0
    spoiled = y.masked_fill(dropped[:, None, None], float("nan"))
    stored = [pack(t).to(device).requires_grad_(gradients) for t in (x, spoiled)]
    leaves = [t.to(device).requires_grad_(gradients) for t in vectors]
    names = ["out", *(["normed"] if norm else []), *(GRADIENTS[: 2 + len(leaves)] if gradients else [])]
    with poisoned_memory(), limited_programs(max_programs), mutated("residual", mutation):
        result = api.gated_residual(
            *(unpack(t) for t in stored),
            leaves[0],
            flags.to(device) if flags is not None else None,
            **({"norm_weight": leaves[1], "norm_bias": leaves[2]} if norm else {}),
            norm_eps=NORM_EPS,
            backend=backend,
        )
        actual = list(result) if norm else [result]
        if gradients:
            incoming = [pack(g).to(device) for g in (grad, grad_normed)][: len(actual)]
            torch.autograd.backward(actual, [unpack(g) for g in incoming])
    assert all(t.dtype == kind for t in actual)
    assert torch.equal(actual[0].cpu()[dropped], x[dropped]), "out: a row that is not kept has changed"
    if gradients:
        actual += [*(unpack(t.grad) for t in stored), *(leaf.grad for leaf in leaves)]
        assert (actual[len(names) - len(leaves) - 1].cpu()[dropped] == 0).all(), "dy: a row that is not kept has a gradient"
    results = zip(names, actual, plain, exact, strict=True)
    return {name: assert_error_budget(name, a.detach().cpu(), p.detach(), e.detach()) for name, a, p, e in results}


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


# How ``[B, T, C]`` may lie in memory: (to storage, back from storage). "swapped" has the batch inside, "wide" rows further
# apart than they are long, "offset" rows that are not aligned, "columns" a strided last axis.
LAYOUTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "apart": (_same, _same),
    "swapped": (lambda x: x.transpose(0, 1).contiguous(), lambda x: x.transpose(0, 1)),
    "wide": (lambda x: torch.nn.functional.pad(x, (8, 16)), lambda x: x[..., 8:-16]),
    "offset": (lambda x: torch.nn.functional.pad(x, (1, 2)), lambda x: x[..., 1:-2]),
    "columns": (lambda x: x.transpose(1, 2).contiguous(), lambda x: x.transpose(1, 2)),
}


@contextlib.contextmanager
def limited_programs(count: int | None) -> Iterator[None]:
    """Launch at most `count` programs."""
    limits = config.MAX_PROGRAMS if count is None else dict.fromkeys(config.MAX_PROGRAMS, count)
    with mock.patch.object(config, "MAX_PROGRAMS", limits):
        yield


def _inputs(tokens: int = 5, channels: int = 24, device: str = "cpu", norm: bool = True) -> list[torch.Tensor]:
    """Return x, y, gate, keep and, with `norm`, weight and bias; two rows, of which the second is not kept."""
    shapes = [(2, tokens, channels), (2, tokens, channels), (channels,), *([(channels,)] * 2 if norm else [])]
    leaves = [
        outlier_normal(*shape, dtype=torch.float32, device=device, seed=seed).requires_grad_()
        for seed, shape in enumerate(shapes)
    ]
    return [*leaves[:3], torch.tensor([True, False], device=device), *leaves[3:]]


def _loss(backend: str) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, keep: torch.Tensor, *norm: torch.Tensor) -> torch.Tensor:
        if not norm:
            return api.gated_residual(x, y, gate, keep, backend=backend).sin().sum()
        out, normed = api.gated_residual(x, y, gate, keep, norm_weight=norm[0], norm_bias=norm[1], backend=backend)
        return (out.sin() * normed).sum()

    return run


def _leaves(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in inputs if tensor.requires_grad]


def check_opcheck(backend: str = "triton", device: str = "cpu") -> None:
    """The operator and its backward keep their promises to PyTorch."""
    namespace = torch.ops.infimm_fast
    for norm in (True, False):
        x, y, gate, keep, *vectors = _inputs(device=device, norm=norm)
        arguments = (x, y, gate, keep if norm else None, *(vectors or (None, None)), 1e-5, backend)
        torch.library.opcheck(namespace.gated_residual.default, arguments)
        plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
        out, normed = namespace.gated_residual(*plain)
        backward = (torch.ones_like(out), torch.ones_like(normed), *plain[1:5], out, 1e-5, backend)
        torch.library.opcheck(namespace.gated_residual_backward.default, backward)


def check_compile(backend: str = "triton", device: str = "cpu") -> None:
    """One graph without breaks, with the same numbers, also when the length changes."""
    run = _loss(backend)
    for norm in (True, False):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
        for tokens in (9, 13):
            inputs = _inputs(tokens, device=device, norm=norm)
            expected = torch.autograd.grad(run(*inputs), _leaves(inputs))
            torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), _leaves(inputs)), expected)


def check_checkpoint(backend: str = "triton", device: str = "cpu") -> None:
    """Recomputing the forward during the backward gives the same gradients."""
    run = _loss(backend)
    for norm in (True, False):
        inputs = _inputs(device=device, norm=norm)
        expected = torch.autograd.grad(run(*inputs), _leaves(inputs))
        again = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(again, _leaves(inputs)), expected, rtol=0, atol=0)


def check_deterministic(backend: str = "triton", device: str = "cpu") -> None:
    """Two runs agree to the bit."""
    inputs = _inputs(9, device=device)
    runs = [torch.autograd.grad(_loss(backend)(*inputs), _leaves(inputs)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def check_other_shapes(backend: str = "triton", device: str = "cpu") -> None:
    """No rows, no axis between batch and channels, and more than one, are ordinary inputs."""
    for shape in ((0, 3, 8), (2, 0, 8), (5, 8), (2, 3, 2, 8), (2, 1, 3)):
        x, y = (outlier_normal(*shape, dtype=torch.float32, device=device, seed=i).requires_grad_() for i in range(2))
        vectors = [torch.ones(shape[-1], device=device, requires_grad=True) for _ in range(3)]
        keep = torch.arange(shape[0], device=device)
        options = {"norm_weight": vectors[1], "norm_bias": vectors[2]}
        expected = api.gated_residual(x, y, vectors[0], keep, **options, backend="reference")
        actual = api.gated_residual(x, y, vectors[0], keep, **options, backend=backend)
        torch.testing.assert_close(actual, expected)
        leaves = [x, y, *vectors]
        gradients = [torch.autograd.grad((o.sin() * n.cos()).sum(), leaves) for o, n in (actual, expected)]
        torch.testing.assert_close(*gradients)


def check_only_one_result_is_used(backend: str = "triton", device: str = "cpu") -> None:
    """A gradient that arrives at the sum or at the LayerNorm alone."""
    for index in range(2):
        gradients = []
        for name in (backend, "reference"):
            x, y, gate, keep, weight, bias = _inputs(device=device)
            result = api.gated_residual(x, y, gate, keep, norm_weight=weight, norm_bias=bias, backend=name)
            leaves = [x, y, gate, *((weight, bias) if index else ())]
            gradients.append(torch.autograd.grad(result[index].sin().sum(), leaves))
        torch.testing.assert_close(*gradients)


def check_explicit_never_falls_back() -> None:
    """What the kernel does not take is refused by name; it takes CPU tensors here."""
    for channels, dtype, match in ((8193, torch.float32, "up to 8192 channels"), (8, torch.float64, "float64")):
        x = torch.ones(1, 2, channels, dtype=dtype)
        try:
            api.gated_residual(x, x, torch.ones(1), backend="triton")
        except api.KernelArgumentError as error:
            assert match in str(error)
        else:
            raise AssertionError(f"accepted {channels} {dtype}")
