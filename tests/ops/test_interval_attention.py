"""Gated cross-attention without triton: backends and the operator's composite, intervals of every kind, typed errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infimm_fast.kernels import BackendUnavailableError, KernelArgumentError, interval_attention
from infimm_fast.kernels.interval.reference import interval_attention_reference
from interpreter import load_file

CASES = load_file(Path(__file__).with_name("interval_attention_cases.py"))


def make(dtype=torch.float32, heads=4, kv_heads=4, head_dim=16, keys=37, rows=3, length=9):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, length, heads, head_dim, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, keys, kv_heads, head_dim, generator=generator, dtype=torch.float64)
    bounds = torch.randint(0, keys + 1, (rows, length, 2), generator=generator)
    kv_range = bounds.sort(dim=-1).values
    kv_range[0, 0] = torch.tensor([5, 5])  # empty
    kv_range[0, 1] = torch.tensor([9, 4])  # start after end: empty too
    kv_range[1, 2] = torch.tensor([0, keys])  # all
    kv_range[1, 3] = torch.tensor([-7, keys + 100])  # clamped to all
    kv_range[2] = 0  # a whole row without anything
    return q.to(dtype), k.to(dtype), v.to(dtype), kv_range


def plain(q, k, v, kv_range, scale):
    """Token by token, in the dtype given: shares no code with the backends."""
    out = torch.zeros_like(q)
    group = q.shape[2] // k.shape[1]
    for row in range(q.shape[0]):
        for token in range(q.shape[1]):
            start, end = max(int(kv_range[row, token, 0]), 0), min(int(kv_range[row, token, 1]), len(k))
            for head in range(q.shape[2]) if start < end else ():
                weights = (k[start:end, head // group] @ q[row, token, head] * scale).softmax(0)
                out[row, token, head] = weights @ v[start:end, head // group]
    return out


@pytest.mark.parametrize("backend", ("sdpa", "reference", "auto"))
@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_backends_against_a_loop(backend, kv_heads):
    q, k, v, kv_range = make(torch.float64, kv_heads=kv_heads)
    expected = plain(q, k, v, kv_range, 16**-0.5)
    torch.testing.assert_close(interval_attention(q, k, v, kv_range, backend=backend), expected)
    torch.testing.assert_close(
        interval_attention(q, k, v, kv_range.int(), scale=0.3, backend=backend), plain(q, k, v, kv_range, 0.3)
    )


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_empty_intervals_give_zeros_and_no_gradient(backend):
    q, k, v, kv_range = make()
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = interval_attention(*tensors, kv_range, backend=backend)
    empty = kv_range.clamp(0, len(k))[..., 0] >= kv_range.clamp(0, len(k))[..., 1]
    assert empty.sum() >= 11 and (out[empty] == 0).all() and (out[~empty] != 0).any(-1).all()
    out.square().sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors)
    assert (q.grad[empty] == 0).all()


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_no_visual_tokens_at_all(backend):
    q, k, v, kv_range = make()
    assert (interval_attention(q, k[:0], v[:0], kv_range, backend=backend) == 0).all()


def test_gradients_of_the_backends_agree():
    q, k, v, kv_range = make(torch.float64, kv_heads=2)
    gradients = []
    for backend in ("sdpa", "reference"):
        tensors = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        interval_attention(*tensors, kv_range, backend=backend).pow(3).sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", ("auto", "sdpa", "reference"))
def test_log_sum_exp(backend):
    q, k, v, kv_range = make(torch.float64)
    q.requires_grad_()
    _, lse = interval_attention(q, k, v, kv_range, return_lse=True, backend=backend)
    assert lse.shape == (3, 4, 9) and (lse[2] == float("-inf")).all()
    assert lse.dtype == torch.float32 and not lse.requires_grad
    expected = torch.logsumexp(torch.einsum("hd,lhd->hl", q[1, 2], k) * 16**-0.5, dim=-1)
    torch.testing.assert_close(lse[1, :, 2], expected.float())


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
@pytest.mark.parametrize("ranges", CASES.RANGES)
def test_error_budget(ranges, backend):
    CASES.check_case(24, 21, 83, "float32", rows=3, heads=4, ranges=ranges, backend=backend)


@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_operator_composite(kv_heads):
    q, k, v, kv_range = make(torch.float64, kv_heads=kv_heads)
    grad = torch.randn_like(q)
    results = []
    for run in (torch.ops.infimm_fast.interval_attention, interval_attention_reference):
        tensors = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        out, lse = run(*tensors, kv_range, 0.3, *(("auto",) if run is not interval_attention_reference else ()))
        out.backward(grad)
        results.append((out, lse.float(), *(tensor.grad for tensor in tensors)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ("opcheck", "compile", "checkpoint"))
def test_operator(name):
    getattr(CASES, f"check_{name}")(backend="sdpa")


def test_operator_without_keys_tokens_or_rows():
    for rows, tokens, keys in ((2, 3, 0), (2, 0, 5), (0, 3, 5)):
        q, k, v = (torch.ones(shape, requires_grad=True) for shape in ((rows, tokens, 4, 8), *[(keys, 2, 8)] * 2))
        kv_range = torch.tensor([0, 5]).expand(rows, tokens, 2)
        out, lse = torch.ops.infimm_fast.interval_attention(q, k, v, kv_range, 0.3, "auto")
        out.sum().backward()
        assert (out == 0).all() and lse.shape == (rows, 4, tokens) and (lse == float("-inf")).all()
        assert all((x.grad == 0).all() for x in (q, k, v))


def test_compiles_with_inductor():
    def run(q, k, v, kv_range):
        return torch.ops.infimm_fast.interval_attention(q, k, v, kv_range, 0.3, "auto")[0].sin().sum()

    q, k, v, kv_range = make()
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    expected = torch.autograd.grad(run(*tensors, kv_range), tensors)
    actual = torch.autograd.grad(torch.compile(run, fullgraph=True)(*tensors, kv_range), tensors)
    torch.testing.assert_close(actual, expected)


class Attention(torch.nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, q, k, v, kv_range):
        if self.operator:
            return torch.ops.infimm_fast.interval_attention(q, k, v, kv_range, 0.3, "auto")[0]
        return interval_attention(q, k, v, kv_range, scale=0.3, validate=True)


@pytest.mark.parametrize("operator", (True, False))
def test_exports_with_free_sizes(operator):
    rows, length, keys = (torch.export.Dim(name, min=2, max=4096) for name in ("rows", "length", "keys"))
    shapes = ({0: rows, 1: length}, {0: keys}, {0: keys}, {0: rows, 1: length})
    program = torch.export.export(Attention(operator), make(kv_heads=2), dynamic_shapes=shapes)
    nodes = [str(node.target) for node in program.graph.nodes]
    assert nodes.count("infimm_fast.interval_attention.default") == operator
    other = make(kv_heads=2, keys=51, rows=5, length=12)
    torch.testing.assert_close(program.module()(*other), Attention(operator)(*other[:3], other[3].clamp(0, 51)))


def test_vmap_is_refused():
    q, k, v, kv_range = make()
    with pytest.raises(NotImplementedError, match="cannot be vmapped"):
        torch.vmap(lambda x: torch.ops.infimm_fast.interval_attention(x, k, v, kv_range, 0.3, "auto")[0])(q[None])


def test_validate():
    q, k, v, kv_range = make()
    for bounds in (kv_range, kv_range.clamp(min=0), kv_range.clamp(max=len(k)).int()):
        with pytest.raises(KernelArgumentError, match=r"kv_range holds bounds from -?\d+ to \d+; accepted are 0 to 37"):
            interval_attention(q, k, v, bounds, validate=True)
    interval_attention(q, k, v, kv_range.clamp(0, len(k)), validate=True)
    interval_attention(q[:0], k, v, kv_range[:0], validate=True)


def test_explicit_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="triton"):
        interval_attention(*make(), backend="triton")


def test_works_without_triton():
    """Import, run, differentiate and ask for Triton by name in a process where it is not installed."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from infimm_fast.kernels.interval.api import interval_attention
from infimm_fast.kernels.common.checks import BackendUnavailableError
q, k, v = (torch.randn(shape, requires_grad=True) for shape in ((1, 5, 2, 8), (7, 2, 8), (7, 2, 8)))
kv_range = torch.tensor([0, 7]).expand(1, 5, 2)
interval_attention(q, k, v, kv_range).sum().backward()
torch.ops.infimm_fast.interval_attention(q, k, v, kv_range, 0.3, "auto")[0].sum().backward()
try:
    interval_attention(q, k, v, kv_range, backend="triton")
except BackendUnavailableError as error:
    print(error)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout


def test_importing_the_operator_imports_no_triton():
    script = "import sys, infimm_fast.kernels.interval.api; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_strided_keys_are_read_in_place():
    q, k, v, kv_range = make()
    packed = torch.stack((k, v), 1)
    expected = interval_attention(q, k, v, kv_range)
    torch.testing.assert_close(interval_attention(q, packed[:, 0], packed[:, 1], kv_range), expected)


@pytest.mark.parametrize("mutation", ("scale", "start", "end", "heads"))
def test_the_comparison_sees_mutations(mutation):
    q, k, v, kv_range = make(torch.float64)
    expected, changed, scale = plain(q, k, v, kv_range, 0.25), kv_range.clone(), 0.25
    if mutation == "scale":
        scale = 0.26
    elif mutation == "start":
        changed[..., 0] += 1
    elif mutation == "end":
        changed[..., 1] -= 1
    else:
        k = k.flip(1)
    out, _ = interval_attention_reference(q, k, v, changed, scale)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(out, expected)


def test_errors():
    q, k, v, kv_range = make()
    cases = (
        ((q[0], k, v, kv_range), {}, r"q has shape \[9, 4, 16\]; expected \[B, T, Hq, D\]"),
        ((q, k[..., :8], v, kv_range), {}, "k has shape"),
        ((q, k, v[:5], kv_range), {}, "v has shape"),
        ((q, k, v, kv_range[:, :3]), {}, "kv_range has shape"),
        ((q, k, v, kv_range.float()), {}, "accepted are int32, int64"),
        ((q, k.half(), v, kv_range), {}, "k is torch.float16"),
        ((q.int(), k.int(), v.int(), kv_range), {}, "q has dtype torch.int32"),
        ((q[:, :, :3], k, v, kv_range), {}, "must be a multiple"),
        ((q, k, v, kv_range), {"backend": "magic"}, "accepted are auto"),
        ((q, k, v, kv_range), {"scale": 0.0}, "scale=0.0"),
        ((q, k, v, kv_range), {"scale": float("nan")}, "scale=nan"),
        ((q, k, v, kv_range.to("meta")), {}, "kv_range is torch.int64 on meta"),
    )
    for arguments, options, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            interval_attention(*arguments, **options)
