"""The launch configuration is a pure function, and the host launches without reading an interval."""

from __future__ import annotations

import itertools

import pytest
import torch

from infimm_fast.kernels.common.configs import ARCHITECTURES
from infimm_fast.kernels.interval.config import (
    DECODE_TOKENS,
    KERNELS,
    MAX_SPLITS,
    MIN_SPLITS,
    PLAN_ROWS,
    choose_config,
    choose_split,
)
from infimm_fast.kernels.interval.options import Options, Saved


def test_every_row_is_a_launchable_shape() -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for kernel, arch, dtype, head_dim, rows in itertools.product(
        KERNELS, ARCHITECTURES, dtypes, range(8, 129, 8), (1, 8, 17, 64, 65, 4096)
    ):
        config = choose_config(kernel, head_dim, dtype, rows, arch)
        powers = (config.block_m, config.block_n, *config.cover)
        assert all(size >= 16 and size & (size - 1) == 0 for size in powers)
        assert head_dim <= sum(config.cover) < 2 * max(16, head_dim)
        assert config.num_warps in (4, 8) and not config.peel


def test_only_the_bucket_of_the_rows_decides() -> None:
    for arch, kernel in itertools.product(ARCHITECTURES, KERNELS):
        assert len({choose_config(kernel, 64, torch.bfloat16, rows, arch) for rows in range(65, 4096)}) == 1


def test_decode_takes_the_smallest_tile_that_holds_a_group() -> None:
    sizes = {rows: choose_config("decode", 64, torch.bfloat16, rows, 90).block_m for rows in (1, 8, 16, 17, 40, 64, 200)}
    assert sizes == {1: 16, 8: 16, 16: 16, 17: 32, 40: 64, 64: 64, 200: 64}


def test_decode_leaves_room_for_rows_to_fold() -> None:
    def tile(rows: int, batch: int) -> int:
        return choose_config("decode", 64, torch.bfloat16, rows, 90, batch=batch).block_m

    assert {batch: tile(1, batch) for batch in (1, 16, 17, 64, 1000)} == {1: 16, 16: 16, 17: 32, 64: 32, 1000: 32}
    assert (tile(8, 4), tile(40, 4), tile(64, 64), tile(200, 2)) == (32, 64, 64, 64)


@pytest.mark.parametrize(("tokens", "group"), [(1, 1), (3, 2), (8, 8)])
@pytest.mark.parametrize("batch", [1, 2, 64, PLAN_ROWS, 5000])
def test_splits(batch: int, tokens: int, group: int) -> None:
    config = choose_config("decode", 64, torch.bfloat16, tokens * group, 90, batch=batch)
    tiles = -(-tokens * group // config.block_m)
    for keys in (0, 1, 63, 1025, 10250, 10**7):
        split = choose_split(batch, tokens, group, 12, keys, config)
        if split is None:
            assert keys < 2 * 8 * 64
            continue
        assert 2 <= split.splits <= MAX_SPLITS and split.splits & (split.splits - 1) == 0
        assert keys // split.splits >= 256
        if keys >= 10250:
            assert split.splits >= MIN_SPLITS
        # Every tile can have one unit, and no tile more than it may have splits.
        assert min(batch, PLAN_ROWS) * tiles <= split.units <= split.splits * min(batch, PLAN_ROWS) * tiles
    assert choose_split(batch, DECODE_TOKENS + 1, group, 12, 10250, config) is None


@pytest.mark.parametrize("tokens", [1, DECODE_TOKENS, DECODE_TOKENS + 1])
@pytest.mark.parametrize("batch", [1, 2, PLAN_ROWS + 1])
def test_launches_depend_on_shapes_only(batch: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values: a captured CUDA graph can follow intervals that change in place."""
    jit = pytest.importorskip("triton.runtime.jit", reason="needs triton")
    from infimm_fast.kernels.interval.backward import launch_backward
    from infimm_fast.kernels.interval.forward import launch_forward

    launched = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *_, grid, **__: launched.append((self.__name__, grid)))
    q = torch.empty(batch, tokens, 12, 64, device="meta", dtype=torch.bfloat16)
    k, v = torch.empty(2, 10250, 12, 64, device="meta", dtype=torch.bfloat16)
    kv_range = torch.empty(batch, tokens, 2, device="meta", dtype=torch.int64)
    out, lse = launch_forward(q, k, v, kv_range, Options(0.125))
    launch_backward(out, Saved(q, k, v, kv_range, out, lse), Options(0.125), (q, k, v))
    forwards = ["forward_kernel"]
    if tokens <= DECODE_TOKENS:
        forwards = ["decode_kernel", "combine_kernel"] if batch == 1 else ["plan_kernel", "decode_kernel", "combine_kernel"]
    assert [name for name, _ in launched] == [*forwards, "delta_kernel", "query_kernel", "key_value_kernel"]
    if tokens <= DECODE_TOKENS:
        config = choose_config("decode", 64, torch.bfloat16, tokens, 80, batch=batch)
        split = choose_split(batch, tokens, 1, 12, 10250, config)
        assert split is not None
        chunks = -(-batch // PLAN_ROWS)
        assert dict(launched)["decode_kernel"] == (chunks * split.units * 12,)
        assert batch == 1 or dict(launched)["plan_kernel"] == (chunks,)
