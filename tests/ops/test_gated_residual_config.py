"""The launch configuration is a pure function of the width, and the shares of the programs cover all rows once."""

from __future__ import annotations

import pytest
import torch

from infimm_fast.kernels.common.checks import KernelArgumentError
from infimm_fast.kernels.residual.config import MAX_CHANNELS, MAX_PROGRAMS, choose_config, rows_of_programs
from infimm_fast.kernels.residual.options import Gradients, Options, Saved, Tensors


@pytest.mark.parametrize("channels", [1, 2, 24, 128, 130, 512, 513, 1024, 1280, 2047, 2048, 4096, 5120, 7168, 8192])
def test_every_width_is_covered_by_whole_accesses(channels: int) -> None:
    config = choose_config(channels)
    assert all(size & (size - 1) == 0 for size in (config.block_m, *config.cover))
    smallest = 8 * 32 * config.num_warps // config.block_m
    assert all(piece >= smallest for piece in config.cover)  # 8 elements, 16 bytes in 16 bits, for each thread
    assert channels <= sum(config.cover) < max(channels + smallest, 2 * smallest)
    assert config.block_m * sum(config.cover) <= 24 * 32 * config.num_warps  # elements of a step for each thread


def test_too_wide_rows_are_refused() -> None:
    with pytest.raises(KernelArgumentError, match="up to 8192 channels, not 8193"):
        choose_config(MAX_CHANNELS + 1)


@pytest.mark.parametrize("kernel", MAX_PROGRAMS)
@pytest.mark.parametrize("block_m", [1, 4])
@pytest.mark.parametrize("rows", [1, 3, 4, 255, 256, 257, 2048, 10250, 2**20 + 1])
def test_shares(rows: int, block_m: int, kernel: str) -> None:
    programs, share = rows_of_programs(kernel, rows, block_m)
    assert 1 <= programs <= MAX_PROGRAMS[kernel] and share % block_m == 0
    assert (programs - 1) * share < rows <= programs * share  # all rows, and no program without any


@pytest.mark.parametrize("norm", [True, False])
def test_launches_depend_on_shapes_only(norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values: one launch each way, whatever the flags say."""
    jit = pytest.importorskip("triton.runtime.jit", reason="needs triton")
    from infimm_fast.kernels.residual.backward import launch_backward
    from infimm_fast.kernels.residual.forward import launch_forward

    launched = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *_, grid, **__: launched.append((self.__name__, grid)))
    x, y = torch.empty(2, 3, 1000, 5120, device="meta", dtype=torch.bfloat16)
    vector, keep = torch.empty(5120, device="meta"), torch.empty(3, device="meta", dtype=torch.bool)
    weight = vector if norm else None
    out, normed = launch_forward(Tensors(x, y, vector, keep, weight, weight), Options())
    assert out.shape == x.shape and normed.shape == (x.shape if norm else (0,))
    gradients = Gradients(x, y, vector, vector, vector)
    launch_backward(out, normed, Saved(y, vector, keep, weight, out), Options(), gradients=gradients)
    assert launched == [("forward_kernel", (1500,)), ("backward_kernel", (250,))]
