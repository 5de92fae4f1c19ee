"""Golden case D: resizing of learned positions and patch kernels."""

import pytest
import torch

import golden
from infimm_fast.models.infimm_hd.position_embedding import resize_patch_embedding, resize_position_embedding

CASES = {"up4to8_f32": 8, "up4to8_f16": 8, "up4to8_bf16": 8, "down8to4_f32": 4, "up16to32_f32": 32}


def test_float32_is_kept():
    data = golden.tensors("case_d_posembed")
    resized = resize_position_embedding(data["up4to8_f32.in.pos_embed"], 8)
    assert resized.dtype == torch.float32
    golden.assert_close(resized, data["up4to8_f32.unrounded.pos_embed"], 1e-6, "positions")


@pytest.mark.parametrize("case", CASES)
def test_positions_after_the_rounding_of_the_authors(case):
    """They round the patches' positions through fp16, and keep the class token's."""
    data = golden.tensors("case_d_posembed")
    resized = resize_position_embedding(data[f"{case}.in.pos_embed"], CASES[case])
    rounded = torch.cat((resized[:, :1], resized[:, 1:].half().float()), dim=1)
    expected = data[f"{case}.out.pos_embed"].float()
    ulp = torch.finfo(torch.float16).eps
    assert (rounded - expected).abs().max() <= ulp * expected.abs().max()
    assert torch.equal(resized[:, :1], data[f"{case}.in.pos_embed"][:, :1].float())


def test_patch_kernels():
    data = golden.tensors("case_d_posembed")
    case = "up4to8_patch16to14_f32"
    resized = resize_patch_embedding(data[f"{case}.in.patch_embed.proj.weight"], 14)
    expected = data[f"{case}.out.patch_embed.proj.weight"].float()
    assert (resized.half().float() - expected).abs().max() <= torch.finfo(torch.float16).eps * expected.abs().max()
    golden.assert_close(
        resize_position_embedding(data[f"{case}.in.pos_embed"], 8)[:, 1:].half().float(),
        data[f"{case}.out.pos_embed"][:, 1:].float(),
        1e-3,
        "positions",
    )


def test_equal_sizes_are_untouched():
    data = golden.tensors("case_d_posembed")
    positions, kernels = data["same4_f32.in.pos_embed"], data["same4_f32.in.patch_embed.proj.weight"]
    assert resize_position_embedding(positions, 4) is positions
    assert resize_patch_embedding(kernels, 14) is kernels
