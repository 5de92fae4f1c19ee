"""What only a GPU can show: bf16, the real width, 64-bit offsets, CUDA graphs, agreement between runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infimm_fast.kernels.common.numerics import outlier_normal
from infimm_fast.kernels.residual.api import gated_residual
from interpreter import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CASES = load_file(Path(__file__).with_name("gated_residual_cases.py"))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("channels", "tokens"), [(128, 700), (130, 33), (4096, 64), (5120, 1), (5120, 515), (8192, 40)])
def test_error_budget(channels: int, tokens: int, dtype: str, norm: bool) -> None:
    CASES.check_case(channels, tokens, dtype, norm=norm, device="cuda")


@pytest.mark.parametrize("keep", list(CASES.KEEPS))
@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize("gate_dtype", ["bfloat16", "float32"])
def test_gates_and_flags(gate_dtype: str, gate: str, keep: str) -> None:
    CASES.check_case(5120, 77, "bfloat16", gate=gate, gate_dtype=gate_dtype, keep=keep, device="cuda")


@pytest.mark.parametrize("layout", list(CASES.LAYOUTS))
def test_views(layout: str) -> None:
    CASES.check_case(5120, 60, "bfloat16", layout=layout, device="cuda")


def _real_inputs(rows: int = 4, tokens: int = 2048) -> list[torch.Tensor]:
    leaves = [
        outlier_normal(*shape, dtype=torch.bfloat16, device="cuda", seed=seed).requires_grad_()
        for seed, shape in enumerate([(rows, tokens, 5120)] * 2 + [(5120,)] * 3)
    ]
    return [*leaves[:3], torch.arange(rows, device="cuda") % 2 == 0, *leaves[3:]]


def _run(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    result = gated_residual(*inputs[:4], norm_weight=inputs[4], norm_bias=inputs[5])
    assert isinstance(result, tuple)
    return result


def test_gradients_are_deterministic() -> None:
    inputs = _real_inputs()
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    runs = []
    for _ in range(5):
        out, normed = _run(inputs)
        runs.append(torch.autograd.grad((out.float().sin() * normed.float()).sum(), leaves))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_cuda_graph_follows_changed_flags() -> None:
    inputs = [tensor.detach() for tensor in _real_inputs(tokens=16)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _run(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(inputs)
    for flags in ([True] * 4, [False] * 4, [False, False, True, False]):
        inputs[3].copy_(torch.tensor(flags))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, _run(inputs), strict=True))


def test_row_stride_beyond_32_bits() -> None:
    """The last rows lie more than 2^31 elements after the first; a 32-bit offset would read somewhere else."""
    rows, stride = 1030, 2**21 + 2**12
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * stride:
        pytest.skip("needs 13 GB of free GPU memory")
    x, y = outlier_normal(2, 1, rows, 128, dtype=torch.bfloat16, device="cuda")
    storage = torch.empty(rows * stride, dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided(y.shape, (0, stride, 1))
    far.copy_(y)
    gate = outlier_normal(128, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(gated_residual(x, far, gate), gated_residual(x, y, gate))


def test_compiled_model_agrees() -> None:
    x, y, gate, keep, *_ = (tensor.detach() for tensor in _real_inputs(tokens=50))
    compiled = torch.compile(lambda x, *rest: gated_residual(x * 2, *rest), fullgraph=True)
    assert torch.equal(compiled(x, y, gate, keep), gated_residual(x * 2, y, gate, keep))


@pytest.mark.parametrize(
    "name", ["opcheck", "compile", "checkpoint", "deterministic", "other_shapes", "only_one_result_is_used"]
)
def test_operator(name: str) -> None:
    getattr(CASES, f"check_{name}")(backend="triton", device="cuda")
