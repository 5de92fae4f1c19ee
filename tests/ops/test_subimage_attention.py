"""Sub-image attention without triton: the public function, the operators' composite, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from infimm_fast.kernels.common.checks import BackendUnavailableError, KernelArgumentError
from infimm_fast.kernels.common.numerics import outlier_normal
from infimm_fast.kernels.subimage.api import subimage_attention, subimage_attention_packed
from infimm_fast.kernels.subimage.reference import apply_rope, subimage_attention_reference
from interpreter import load_file

CASES = load_file(Path(__file__).with_name("subimage_attention_cases.py"))
VARIANTS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"rope": "interleaved"},
    {"rope": "halves", "prefix": 3},
    {"lengths": [9, 4, 0], "tiles": 3},
    {"lengths": [9, 4], "causal": True, "rope": "interleaved"},
    {"offsets": [0, 3, 3, 9], "tiles": 1},
    {"offsets": [1, 3, 8], "tiles": 1, "causal": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_backends_agree_with_the_reference(variant: dict[str, Any], backend: str) -> None:
    CASES.check_case(head_dim=24, tokens=9, dtype="float32", backend=backend, **variant)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_operator_composite(variant: dict[str, Any], packed: bool) -> None:
    tiles, tokens, heads, head_dim = variant.get("tiles", 2), 9, 2, 24
    rope, prefix = variant.get("rope"), variant.get("prefix", 1) if "rope" in variant else 0
    tables = CASES.rope_tables(tokens - prefix, head_dim, rope == "interleaved") if rope else (None, None)
    seqlens = torch.tensor(variant["lengths"]) if "lengths" in variant else None
    offsets = torch.tensor(variant["offsets"]) if "offsets" in variant else None
    causal = variant.get("causal", False)
    values = outlier_normal(tiles, tokens, 3, heads, head_dim, dtype=torch.float64)
    grad = outlier_normal(tiles, tokens, heads, head_dim, dtype=torch.float64, seed=1)
    options = (0.3, *tables, prefix, rope != "halves", seqlens, offsets, tokens, causal, "auto")

    exact = values.clone().requires_grad_()
    q, k, v = exact.unbind(2)
    if rope:
        q, k = (apply_rope(x, *tables, prefix, rope == "interleaved") for x in (q, k))
    expected, expected_lse = subimage_attention_reference(q, k, v, 0.3, seqlens, offsets, causal)
    expected.backward(grad)

    qkv = values.clone().requires_grad_()
    if packed:
        out, lse = torch.ops.infimm_fast.subimage_attention_packed(qkv, *options)
    else:
        out, lse = torch.ops.infimm_fast.subimage_attention(*qkv.unbind(2), *options)
    out.backward(grad)
    assert out.is_contiguous() and not lse.requires_grad
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse.float())
    torch.testing.assert_close(qkv.grad, exact.grad)


@pytest.mark.parametrize("name", ["opcheck", "compile", "checkpoint"])
def test_operators(name: str) -> None:
    getattr(CASES, f"check_{name}")(backend="sdpa")


def test_compiles_with_inductor() -> None:
    def run(qkv: torch.Tensor) -> torch.Tensor:
        return torch.ops.infimm_fast.subimage_attention_packed(
            qkv, 0.3, None, None, 0, True, None, None, qkv.shape[1], False, "auto"
        )[0].sum()

    qkv = outlier_normal(2, 9, 3, 2, 8, dtype=torch.float32).requires_grad_()
    (expected,) = torch.autograd.grad(run(qkv), qkv)
    (actual,) = torch.autograd.grad(torch.compile(run, fullgraph=True)(qkv), qkv)
    torch.testing.assert_close(actual, expected)


def test_exports_as_one_node_with_a_free_length() -> None:
    class Attention(torch.nn.Module):
        def forward(self, qkv: torch.Tensor) -> torch.Tensor:
            options = (0.3, None, None, 0, True, None, None, qkv.shape[1], False, "auto")
            return torch.ops.infimm_fast.subimage_attention_packed(qkv, *options)[0]

    shape = {"qkv": {0: torch.export.Dim("tiles"), 1: torch.export.Dim("tokens", max=4096)}}
    example = outlier_normal(2, 9, 3, 2, 8, dtype=torch.float32)
    program = torch.export.export(Attention(), (example,), dynamic_shapes=shape)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("infimm_fast.subimage_attention_packed.default") == 1
    other = outlier_normal(3, 17, 3, 2, 8, dtype=torch.float32)
    torch.testing.assert_close(program.module()(other), Attention()(other))


def test_sdpa_backend_exports_without_the_operator() -> None:
    class Attention(torch.nn.Module):
        def forward(self, qkv: torch.Tensor) -> torch.Tensor:
            return subimage_attention_packed(qkv)

    program = torch.export.export(Attention(), (outlier_normal(2, 9, 3, 2, 8, dtype=torch.float32),))
    assert not any("infimm_fast" in str(node.target) for node in program.graph.nodes)


def test_vmap_is_refused() -> None:
    qkv = outlier_normal(4, 2, 9, 3, 2, 8, dtype=torch.float32)
    options = (0.3, None, None, 0, True, None, None, 9, False, "auto")
    with pytest.raises(NotImplementedError, match="cannot be vmapped"):
        torch.vmap(lambda x: torch.ops.infimm_fast.subimage_attention_packed(x, *options)[0])(qkv)


def test_what_padding_holds_does_not_matter() -> None:
    qkv = outlier_normal(2, 9, 3, 2, 8, dtype=torch.float32)
    lengths = torch.tensor([4, 9])
    expected = subimage_attention_packed(qkv, seqlens=lengths)
    qkv[0, 4:] = float("nan")
    for backend in ("sdpa", "reference"):
        torch.testing.assert_close(subimage_attention_packed(qkv, seqlens=lengths, backend=backend), expected)


def _arguments(**changes: Any) -> dict[str, Any]:
    q, k, v = outlier_normal(3, 2, 5, 2, 8, dtype=torch.float32).unbind(0)
    return {"q": q, "k": k, "v": v} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 5, 8)}, r"q has shape"),
        ({"k": torch.zeros(2, 4, 2, 8)}, r"k has shape"),
        ({"v": torch.zeros(2, 5, 2, 8, dtype=torch.float16)}, r"v is torch.float16"),
        ({"q": torch.zeros(2, 5, 2, 8, dtype=torch.int32)}, r"dtype torch.int32"),
        ({"scale": 0.0}, r"scale=0.0"),
        ({"scale": float("nan")}, r"scale=nan"),
        ({"rope_cos": torch.zeros(5, 8)}, r"go together"),
        ({"rope_cos": torch.zeros(4, 8), "rope_sin": torch.zeros(4, 8)}, r"rope_cos has shape"),
        ({"rope_cos": torch.zeros(5, 8), "rope_sin": torch.zeros(5, 8), "rope_prefix": 6}, r"rope_prefix=6"),
        ({"rope_cos": torch.zeros(5, 8).int(), "rope_sin": torch.zeros(5, 8).int()}, r"floating point"),
        ({"seqlens": torch.tensor([1, 2, 3])}, r"seqlens has shape"),
        ({"seqlens": torch.tensor([1.0, 2.0])}, r"seqlens is torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"B = 1"),
        ({"seqlens": torch.tensor([1, 2]), "cu_seqlens": torch.tensor([0, 5])}, r"exclude each other"),
        ({"backend": "flash"}, r"backend='flash'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message) as caught:
        subimage_attention(**_arguments(**changes))
    assert "\n" not in str(caught.value)


def test_bad_packed_arguments_are_named() -> None:
    with pytest.raises(KernelArgumentError, match=r"qkv has shape"):
        subimage_attention_packed(torch.zeros(2, 5, 2, 2, 8))
    qkv = torch.zeros(1, 5, 3, 2, 8)
    tables = {"rope_cos": torch.zeros(4, 8), "rope_sin": torch.zeros(4, 8), "rope_prefix": 1}
    with pytest.raises(KernelArgumentError, match=r"rope_prefix must be 0"):
        subimage_attention_packed(qkv, cu_seqlens=torch.tensor([0, 5]), **tables)
    with pytest.raises(KernelArgumentError, match=r"max_seqlen=0"):
        subimage_attention_packed(qkv, cu_seqlens=torch.tensor([0, 5]), max_seqlen=0)


def test_explicit_triton_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="triton"):
        subimage_attention(**_arguments(backend="triton"))


def test_works_without_triton() -> None:
    """Import, run, differentiate and ask for Triton by name in a process where it is not installed."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from infimm_fast.kernels.subimage.api import subimage_attention_packed
from infimm_fast.kernels.common.checks import BackendUnavailableError
qkv = torch.randn(1, 5, 3, 2, 8, requires_grad=True)
subimage_attention_packed(qkv).sum().backward()
options = (0.3, None, None, 0, True, None, None, 5, False, "auto")
torch.ops.infimm_fast.subimage_attention_packed(qkv, *options)[0].sum().backward()
try:
    subimage_attention_packed(qkv, backend="triton")
except BackendUnavailableError as error:
    print(error)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout


def test_importing_the_operators_imports_no_triton() -> None:
    script = "import sys, infimm_fast.kernels.subimage.api; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
