"""What only a GPU can show: bf16, large shapes, 64-bit offsets, CUDA graphs, agreement between runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infimm_fast.kernels.common.numerics import assert_error_budget, outlier_normal
from infimm_fast.kernels.subimage.api import subimage_attention, subimage_attention_packed
from infimm_fast.kernels.subimage.config import HEAD_DIMS
from interpreter import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CASES = load_file(Path(__file__).with_name("subimage_attention_cases.py"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tokens", [1, 17, 65, 257, 729, 1025])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_error_budget(head_dim: int, tokens: int, dtype: str) -> None:
    CASES.check_case(head_dim=head_dim, tokens=tokens, dtype=dtype, device="cuda")


@pytest.mark.parametrize("layout", ["apart", "heads_first", "offset", "broad", "strided"])
@pytest.mark.parametrize("rope", [None, "interleaved", "halves"])
@pytest.mark.parametrize("head_dim", [72, 112])
def test_views_and_rope(head_dim: int, rope: str | None, layout: str) -> None:
    CASES.check_case(head_dim=head_dim, tokens=300, dtype="bfloat16", device="cuda", rope=rope, layout=layout)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[300, 1, 0, 257], [65, 64, 129, 300]], ids=str)
def test_lengths(lengths: list[int], causal: bool) -> None:
    CASES.check_case(head_dim=112, tokens=300, dtype="bfloat16", device="cuda", tiles=4, lengths=lengths, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal: bool) -> None:
    offsets = [0, 64, 65, 65, 300]
    CASES.check_case(head_dim=80, tokens=300, dtype="bfloat16", device="cuda", tiles=1, offsets=offsets, causal=causal)


def test_batch_stride_beyond_32_bits() -> None:
    """Two tiles more than 2^31 elements apart; a 32-bit offset would read and write somewhere else."""
    tokens, heads, head_dim, distance = 130, 2, 72, 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 3 * 2 * distance:
        pytest.skip("needs 13 GB of free GPU memory")
    values = outlier_normal(2, tokens, 3, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    storage = torch.empty(distance + values[0].numel(), dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided(values.shape, (distance, *values.stride()[1:]))
    far.copy_(values)
    assert torch.equal(subimage_attention_packed(far), subimage_attention_packed(values))
    grads = []
    for qkv in (far, values):
        leaf = qkv.detach().requires_grad_()
        subimage_attention(*leaf.unbind(2)).float().sin().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0].contiguous(), grads[1])


def test_cuda_graph() -> None:
    qkv = outlier_normal(4, 1025, 3, 16, 112, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        subimage_attention_packed(qkv)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = subimage_attention_packed(qkv)
    qkv.copy_(outlier_normal(*qkv.shape, dtype=torch.bfloat16, device="cuda", seed=9))
    graph.replay()
    assert torch.equal(out, subimage_attention_packed(qkv))


def test_gradients_are_deterministic() -> None:
    qkv = outlier_normal(4, 1025, 3, 16, 112, dtype=torch.bfloat16, device="cuda").requires_grad_()
    grad = outlier_normal(4, 1025, 16, 112, dtype=torch.bfloat16, device="cuda", seed=1)
    first, *others = (torch.autograd.grad(subimage_attention_packed(qkv), qkv, grad)[0] for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


def test_compiled_model_agrees() -> None:
    qkv = outlier_normal(2, 257, 3, 4, 80, dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(lambda x: subimage_attention_packed(x * 2), fullgraph=True)
    assert torch.equal(compiled(qkv), subimage_attention_packed(qkv * 2))


def test_model_sized_batch_against_sdpa() -> None:
    """Ten tiles of InfiMM-HD's tower, too large for the fp64 reference: SDPA in fp32 is the exact one."""
    qkv = outlier_normal(10, 1025, 3, 16, 112, dtype=torch.bfloat16, device="cuda")
    exact = subimage_attention_packed(qkv.float(), backend="sdpa")
    plain = subimage_attention_packed(qkv, backend="reference")
    assert_error_budget("out", subimage_attention_packed(qkv), plain, exact)


@pytest.mark.parametrize("name", ["opcheck", "compile", "checkpoint"])
def test_operators(name: str) -> None:
    getattr(CASES, f"check_{name}")(backend="triton", device="cuda")
