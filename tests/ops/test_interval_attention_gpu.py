"""What only a GPU can show: bf16, large shapes, 64-bit offsets, CUDA graphs, agreement between runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infimm_fast.kernels.common.numerics import outlier_normal
from infimm_fast.kernels.interval.api import interval_attention
from infimm_fast.kernels.subimage.config import HEAD_DIMS
from interpreter import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CASES = load_file(Path(__file__).with_name("interval_attention_cases.py"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 2050), (8, 333), (9, 100), (300, 2050)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_error_budget(head_dim: int, tokens: int, keys: int, dtype: str) -> None:
    CASES.check_case(head_dim, tokens, keys, dtype, rows=3, heads=4, device="cuda")


@pytest.mark.parametrize("ranges", ["distinct", "shared", "grouped", "alone", "ragged"])
@pytest.mark.parametrize("rows", [64, 300])
def test_decode_of_large_batches(rows: int, ranges: str) -> None:
    CASES.check_case(64, 1, 4100, "bfloat16", rows=rows, ranges=ranges, gradients=False, device="cuda")


@pytest.mark.parametrize("ranges", list(CASES.RANGES))
@pytest.mark.parametrize("tokens", [1, 5, 128, 515])
def test_intervals(tokens: int, ranges: str) -> None:
    CASES.check_case(64, tokens, 4100, "bfloat16", rows=4, ranges=ranges, device="cuda")


@pytest.mark.parametrize("layout", list(CASES.LAYOUTS))
@pytest.mark.parametrize("tokens", [3, 100])
def test_views(tokens: int, layout: str) -> None:
    CASES.check_case(72, tokens, 700, "bfloat16", layout=layout, index="int32", device="cuda")


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (12, 1), (64, 1)])
@pytest.mark.parametrize("tokens", [1, 8, 77])
def test_grouped_heads(tokens: int, heads: int, kv_heads: int) -> None:
    CASES.check_case(128, tokens, 700, "bfloat16", heads=heads, kv_heads=kv_heads, device="cuda")


def _decode_inputs(rows: int = 8, tokens: int = 1, keys: int = 10250) -> tuple[torch.Tensor, ...]:
    q = outlier_normal(rows, tokens, 12, 64, dtype=torch.bfloat16, device="cuda")
    kv = outlier_normal(keys, 2, 12, 64, dtype=torch.bfloat16, device="cuda", seed=1)
    return q, *kv.unbind(1), CASES.RANGES["ragged"](rows, tokens, keys).cuda()


@pytest.mark.parametrize("tokens", [1, 8, 200])
def test_cuda_graph_follows_changed_ranges(tokens: int) -> None:
    q, k, v, kv_range = inputs = _decode_inputs(tokens=tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        interval_attention(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = interval_attention(*inputs, validate=True, return_lse=True)
    ranges = [CASES.RANGES[name](8, tokens, len(k)).cuda() for name in ("distinct", "shared", "grouped", "alone", "full")]
    for changed in (kv_range.flip(0), kv_range * 0, kv_range // 2, *ranges, ranges[0]):
        kv_range.copy_(changed)
        graph.replay()
        expected, expected_lse = interval_attention(q, k, v, kv_range, return_lse=True)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_token_stride_beyond_32_bits() -> None:
    """The last keys lie more than 2^31 elements after the first; a 32-bit offset would read somewhere else."""
    keys, stride = 1025, 2**21 + 2**12
    if torch.cuda.mem_get_info()[0] < 3 * 2 * keys * stride:
        pytest.skip("needs 13 GB of free GPU memory")
    q, k, v, _ = _decode_inputs(rows=2, tokens=40, keys=keys)
    storage = torch.empty(keys * stride, dtype=torch.bfloat16, device="cuda")
    far_k, far_v = (storage[first:].as_strided(k.shape, (stride, 64, 1)) for first in (0, 4096))
    far_k.copy_(k)
    far_v.copy_(v)
    for tokens in (1, 40):
        kv_range = CASES.RANGES["ragged"](2, tokens, keys).cuda()
        results = []
        for keys_values in ((k, v), (far_k, far_v)):
            leaves = [x.detach().requires_grad_() for x in (q[:, :tokens], *keys_values)]
            out = interval_attention(*leaves, kv_range)
            results.append((out, *torch.autograd.grad(out.float().sin().sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_are_deterministic() -> None:
    q, k, v, kv_range = _decode_inputs(rows=8, tokens=300)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    runs = [torch.autograd.grad(interval_attention(*leaves, kv_range).float().sin().sum(), leaves) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_compiled_model_agrees() -> None:
    inputs = _decode_inputs(rows=2, tokens=50)
    compiled = torch.compile(lambda q, *rest: interval_attention(q * 2, *rest), fullgraph=True)
    assert torch.equal(compiled(*inputs), interval_attention(inputs[0] * 2, *inputs[1:]))


@pytest.mark.parametrize(
    "name", ["opcheck", "compile", "checkpoint", "deterministic", "decode_deterministic", "nothing_to_see"]
)
def test_operator(name: str) -> None:
    getattr(CASES, f"check_{name}")(backend="triton", device="cuda")
