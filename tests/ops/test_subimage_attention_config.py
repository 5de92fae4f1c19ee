"""The launch configuration is a pure function; what it returns can be checked without a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from infimm_fast.kernels.common.checks import KernelArgumentError
from infimm_fast.kernels.common.configs import ARCHITECTURES, architecture_of, cover_of
from infimm_fast.kernels.common.launch import common_alignment, head_strides, rows_are_wide
from infimm_fast.kernels.subimage.config import HEAD_DIMS, KERNELS, choose_config


@pytest.mark.parametrize(
    ("width", "cover"),
    [
        (8, (16,)), (16, (16,)), (24, (32,)), (40, (32, 16)), (56, (64,)), (64, (64,)), (72, (64, 16)), (80, (64, 16)),
        (88, (64, 32)), (96, (64, 32)), (104, (64, 32, 16)), (112, (64, 32, 16)), (120, (128,)), (128, (128,)),
    ],
)  # fmt: skip
def test_cover(width: int, cover: tuple[int, ...]) -> None:
    assert cover_of(width) == cover


def test_every_row_is_a_launchable_shape() -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for kernel, arch, dtype, head_dim, peel in itertools.product(
        KERNELS, ARCHITECTURES, dtypes, range(8, 129, 8), (False, True)
    ):
        for tokens in (1, 17, 64, 65, 577, 729, 1025, 6432):
            config = choose_config(kernel, head_dim, dtype, tokens, arch, peel=peel)
            powers = (config.block_m, config.block_n, *config.cover)
            assert all(size >= 16 and size & (size - 1) == 0 for size in powers)
            assert head_dim <= sum(config.cover) < 2 * max(16, head_dim)
            assert config.num_warps in (4, 8)
            assert not (config.peel and not peel)
            assert config == choose_config(kernel, head_dim, dtype, tokens, arch, peel=peel)


def test_only_the_bucket_and_the_remainder_of_the_length_decide() -> None:
    for arch, head_dim in itertools.product(ARCHITECTURES, HEAD_DIMS):
        configs = {choose_config("forward", head_dim, torch.bfloat16, n, arch) for n in range(65, 4096)}
        assert len(configs) == 2
        assert {config.peel for config in configs} == {False, True}


def test_rotated_queries_take_no_second_piece_of_32_on_hopper() -> None:
    covers = {D: choose_config("forward", D, torch.bfloat16, 1025, 90, rope=True).cover for D in (80, 88, 96)}
    assert covers == {80: (64, 16), 88: (128,), 96: (128,)}
    assert choose_config("forward", 88, torch.bfloat16, 1025, 90).cover == (64, 32)
    assert choose_config("forward", 88, torch.bfloat16, 1025, 80, rope=True).cover == (64, 32)


@pytest.mark.parametrize("tokens", [257, 577, 1025, 1601])
def test_a_class_token_is_peeled_off(tokens: int) -> None:
    assert choose_config("forward", 112, torch.bfloat16, tokens, 90).peel
    assert not choose_config("forward", 112, torch.bfloat16, tokens - 1, 90).peel


def test_architectures() -> None:
    served = {80: 80, 86: 89, 87: 80, 89: 89, 90: 90, 100: 100, 103: 100, 110: 100, 120: 120, 121: 120}
    assert {capability: architecture_of(capability) for capability in served} == served
    with pytest.raises(KernelArgumentError, match=r"8\.0 or later, not 7\.5"):
        architecture_of(75)


def test_alignment_is_read_from_real_strides() -> None:
    packed = torch.empty(2, 5, 3, 16, 72).unbind(2)
    assert common_alignment(*packed) == 8
    assert common_alignment(torch.empty(2, 5, 4, 73)[..., :72]) == 1
    # An axis of size 1 is never stepped over, whatever its stride says.
    assert head_strides(torch.empty(1, 5, 1, 8).as_strided((1, 5, 1, 8), (3, 8, 5, 1))) == (0, 8, 0)
    assert not rows_are_wide(128, *packed)
    assert rows_are_wide(128, torch.empty_strided((2, 5, 4, 8), (8, 2**25, 8, 1), device="meta"))
