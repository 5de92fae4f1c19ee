"""The gated residual without triton: backends and the operator's composite, kept rows, LayerNorm, typed errors."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from infimm_fast.kernels import BackendUnavailableError, KernelArgumentError, gated_residual
from infimm_fast.kernels.common import launch
from infimm_fast.kernels.residual.reference import gated_residual_reference
from interpreter import load_file

CASES = load_file(Path(__file__).with_name("gated_residual_cases.py"))


def make(channels=6, gate_size=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 4, channels, generator=generator, dtype=torch.float64).to(dtype)
    gate, weight, bias = (torch.randn(n, generator=generator).to(dtype) for n in (gate_size or channels, channels, channels))
    return x, y, gate, torch.tensor([1.0, 0.0, 0.5]), weight, bias


def plain(x, y, gate, keep, weight, bias, eps):
    """Channel by channel with Python's numbers: shares no code with the backends."""
    out, normed = torch.empty_like(x), torch.empty_like(x)
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            for channel in range(x.shape[2]):
                slope = torch.tanh(gate[channel % len(gate)]).item()
                moved = keep[row].item() * slope * y[row, token, channel].item()
                out[row, token, channel] = x[row, token, channel].item() + moved
            mean = out[row, token].mean()
            variance = ((out[row, token] - mean) ** 2).mean()
            normed[row, token] = (out[row, token] - mean) / (variance + eps) ** 0.5 * weight + bias
    return out, normed


@pytest.mark.parametrize("backend", ("sdpa", "reference", "auto"))
@pytest.mark.parametrize("gate_size", (1, 6))
def test_backends_against_a_loop(backend, gate_size):
    x, y, gate, keep, weight, bias = make(gate_size=gate_size)
    out, normed = plain(x, y, gate, keep, weight, bias, 0.1)
    options = {"norm_weight": weight, "norm_bias": bias, "norm_eps": 0.1, "backend": backend}
    torch.testing.assert_close(gated_residual(x, y, gate, keep, **options), (out, normed))
    torch.testing.assert_close(gated_residual(x, y, gate, keep, backend=backend), out)
    everything, _ = plain(x, y, gate, torch.ones(3), weight, bias, 0.1)
    torch.testing.assert_close(gated_residual(x, y, gate, backend=backend), everything)


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
@pytest.mark.parametrize("keep", CASES.KEEPS)
@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
def test_error_budget(dtype, keep, backend):
    CASES.check_case(130, 5, dtype, keep=keep, backend=backend)
    CASES.check_case(24, 5, dtype, keep=keep, backend=backend, gate="scalar", gate_dtype="float32", norm=False)


@pytest.mark.parametrize("layout", CASES.LAYOUTS)
def test_views(layout):
    CASES.check_case(72, 5, "bfloat16", layout=layout, backend="sdpa")


@pytest.mark.parametrize("norm", (True, False))
@pytest.mark.parametrize("gate_size", (1, 6))
def test_operator_composite(gate_size, norm):
    """The operator's own backward against autograd through the reference."""
    x, y, gate, keep, weight, bias = make(gate_size=gate_size)
    results = []
    for run in (torch.ops.infimm_fast.gated_residual, gated_residual_reference):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, y, gate, *((weight, bias) if norm else ()))]
        options = (0.1, "auto") if run is not gated_residual_reference else (0.1,)
        out, normed = run(*leaves[:3], keep, *(leaves[3:] or (None, None)), *options)
        loss = out.sin().sum() + ((out * normed.cos()).sum() if norm else 0.0)
        results.append((out, *((normed,) if norm else ()), *torch.autograd.grad(loss, leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ("opcheck", "compile", "checkpoint", "other_shapes", "only_one_result_is_used"))
def test_operator(name):
    getattr(CASES, f"check_{name}")(backend="sdpa")


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_rows_that_are_not_kept_never_read_y(backend):
    x, y, gate, keep, weight, bias = make(dtype=torch.float32)
    y[1] = torch.tensor([float("nan"), float("inf"), 1.0, 2.0, float("-inf"), 0.0])
    x[1, 0, 0] = -0.0
    leaves = [tensor.requires_grad_() for tensor in (x, y, gate, weight, bias)]
    out, normed = gated_residual(x, y, gate, keep, norm_weight=weight, norm_bias=bias, backend=backend)
    assert torch.equal(out[1], x[1]) and torch.signbit(out[1, 0, 0])
    (out.sin() + normed.cos()).sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in leaves)
    assert (y.grad[1] == 0).all() and (y.grad[0] != 0).all()


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_keep_is_a_constant(backend):
    x, y, gate, keep, *_ = make()
    keep.requires_grad_()
    gated_residual(x.requires_grad_(), y, gate, keep, backend=backend).sum().backward()
    assert keep.grad is None and (x.grad == 1).all()


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_the_norm_is_that_of_the_stored_sum(backend):
    """In bf16 the rounding between the sum and its LayerNorm is visible: half a percent of a value."""
    x, y, gate, keep, weight, bias = make(channels=512, dtype=torch.bfloat16)
    out, normed = gated_residual(x, y, gate, keep, norm_weight=weight, norm_bias=bias, backend=backend)
    wide = [tensor.double() for tensor in (x, y, gate)]
    distances = []
    for total in (out.double(), gated_residual(*wide, keep)):
        expected = torch.nn.functional.layer_norm(total, (512,), weight.double(), bias.double())
        distances.append((normed != expected.bfloat16()).double().mean())
    assert distances[0] < 0.01 < 0.1 < distances[1]


class Residual(torch.nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, x, y, gate, keep, weight, bias):
        if self.operator:
            return torch.ops.infimm_fast.gated_residual(x, y, gate, keep, weight, bias, 1e-5, "auto")
        return gated_residual(x, y, gate, keep, norm_weight=weight, norm_bias=bias)


@pytest.mark.parametrize("operator", (True, False))
def test_exports_with_free_sizes(operator):
    rows, length = (torch.export.Dim(name, min=2, max=4096) for name in ("rows", "length"))
    shapes = ({0: rows, 1: length}, {0: rows, 1: length}, None, {0: rows}, None, None)
    program = torch.export.export(Residual(operator), make(), dynamic_shapes=shapes)
    nodes = [str(node.target) for node in program.graph.nodes]
    assert nodes.count("infimm_fast.gated_residual.default") == operator
    x, y, gate, keep, weight, bias = make()
    other = (x[:2, :3].clone(), y[:2, :3].clone(), gate, keep[:2], weight, bias)
    torch.testing.assert_close(program.module()(*other), Residual(operator)(*other))


def test_compiles_with_inductor():
    def run(x, y, gate, keep, weight, bias):
        out, normed = torch.ops.infimm_fast.gated_residual(x, y, gate, keep, weight, bias, 1e-5, "auto")
        return (out.sin() * normed).sum()

    inputs = make(dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs if tensor is not inputs[3]]
    expected = torch.autograd.grad(run(*inputs), leaves)
    actual = torch.autograd.grad(torch.compile(run, fullgraph=True)(*inputs), leaves)
    torch.testing.assert_close(actual, expected)


def test_vmap_is_refused():
    x, y, gate, *_ = make()
    with pytest.raises(NotImplementedError, match="cannot be vmapped"):
        torch.vmap(lambda x: torch.ops.infimm_fast.gated_residual(x, y, gate, None, None, None, 1e-5, "auto")[0])(x[None])


def test_explicit_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="triton"):
        gated_residual(*make()[:3], backend="triton")


@pytest.mark.parametrize(("channels", "dtype", "reason"), ((8200, torch.float32, "8192"), (8, torch.float64, "float64")))
def test_auto_falls_back_aloud(channels, dtype, reason):
    x = torch.ones(1, 2, channels, dtype=dtype)
    with mock.patch.object(launch, "resolve_backend", lambda backend, tensor: "triton"):
        with pytest.warns(UserWarning, match=f"falls back to 'sdpa': .*{reason}"):
            gated_residual(x, x, x[0, 0])
        with pytest.raises(KernelArgumentError, match=reason):
            gated_residual(x, x, x[0, 0], backend="triton")
    with warnings.catch_warnings(action="error"):
        gated_residual(x, x, x[0, 0])


def test_works_without_triton():
    """Import, run, differentiate and ask for Triton by name in a process where it is not installed."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from infimm_fast.kernels.residual.api import gated_residual
from infimm_fast.kernels.common.checks import BackendUnavailableError
x, y = torch.randn(2, 2, 5, 8, requires_grad=True)
gate = torch.ones(8, requires_grad=True)
gated_residual(x, y, gate).sum().backward()
torch.ops.infimm_fast.gated_residual(x, y, gate, None, None, None, 1e-5, "auto")[0].sum().backward()
try:
    gated_residual(x, y, gate, backend="triton")
except BackendUnavailableError as error:
    print(error)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout


def test_importing_the_operator_imports_no_triton():
    script = "import sys, infimm_fast.kernels.residual.api; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def _mutants(x, y, gate, keep, weight, bias):
    layer_norm, (out, _) = torch.nn.functional.layer_norm, plain(x, y, gate, keep, weight, bias, 0.1)
    return {
        "no gate": (x + keep[:, None, None] * y, None),
        "gate without tanh": (x + keep[:, None, None] * gate * y, None),
        "keep ignored": (x + gate.tanh() * y, None),
        "norm of x": (out, layer_norm(x, x.shape[-1:], weight, bias, 0.1)),
        "another eps": (out, layer_norm(out, x.shape[-1:], weight, bias, 0.101)),
    }


@pytest.mark.parametrize("mutation", ("no gate", "gate without tanh", "keep ignored", "norm of x", "another eps"))
def test_the_comparison_sees_mutations(mutation):
    inputs = make()
    mutant, normed = _mutants(*inputs)[mutation]
    out, expected = gated_residual_reference(*inputs, 0.1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*((mutant, out) if normed is None else (normed, expected)))


def test_errors():
    x, y, gate, keep, weight, bias = make()
    norm = {"norm_weight": weight, "norm_bias": bias}
    cases = (
        ((x[0, 0], y[0, 0], gate), {}, r"x has shape \[6\]; expected \[B, \.\.\., C\]"),
        ((x[..., :0], y[..., :0], gate[:0]), {}, "at least one channel"),
        ((x, y[:2], gate), {}, "y has shape"),
        ((x, y.float(), gate), {}, "y is torch.float32"),
        ((x.int(), y.int(), gate), {}, "x has dtype torch.int32"),
        ((x, y, gate[:4]), {}, r"gate has shape \[4\]; expected \[C\] = \[6\] or \[1\]"),
        ((x, y, gate[0]), {}, "gate has shape"),
        ((x, y, gate.int()), {}, "gate is torch.int32"),
        ((x, y, gate.to("meta")), {}, "gate is torch.float64 on meta"),
        ((x, y, gate, keep[:2]), {}, r"keep has shape \[2\]; expected \[B\] = \[3\]"),
        ((x, y, gate, keep.to("meta")), {}, "keep is torch.float32 on meta"),
        ((x, y, gate, keep.cfloat()), {}, "keep is torch.complex64"),
        ((x, y, gate), {"norm_weight": weight}, "norm_weight and norm_bias go together"),
        ((x, y, gate), {"norm_bias": bias}, "norm_weight and norm_bias go together"),
        ((x, y, gate), norm | {"norm_weight": weight[:4]}, "norm_weight has shape"),
        ((x, y, gate), norm | {"norm_bias": bias[:4]}, "norm_bias has shape"),
        ((x, y, gate), norm | {"norm_bias": bias.float()}, "norm_bias is torch.float32"),
        ((x, y, gate), norm | {"norm_eps": 0.0}, "norm_eps=0.0"),
        ((x, y, gate), norm | {"norm_eps": float("nan")}, "norm_eps=nan"),
        ((x, y, gate), {"backend": "composite"}, "accepted are auto, reference, sdpa, triton"),
    )
    for arguments, options, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            gated_residual(*arguments, **options)
