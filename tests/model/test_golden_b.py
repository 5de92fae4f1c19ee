"""Golden case B: the EVA02 form of the tower."""

import re

import pytest
import torch

import golden
from infimm_fast import EvaVisionTower, InfiMMHDVisionConfig
from infimm_fast.kernels.subimage.reference import apply_rope
from infimm_fast.models.infimm_hd.position_embedding import axial_rope


def tower_config(backend):
    return InfiMMHDVisionConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=golden.manifest()["case_b"]["mlp_hidden"],
        image_size=56,
        norm_position="pre",
        mlp_type="swiglu",
        use_sub_layer_norm=True,
        use_rope=True,
        projection_dim=32,
        backend=backend,
    )


@pytest.fixture(scope="module", params=("sdpa", "reference"))
def tower(request):
    tower = EvaVisionTower(tower_config(request.param)).eval()
    tower.load_state_dict(tower_state())
    return tower


def tower_state():
    state = {name: value for name, value in golden.tensors("case_b_state_dict").items() if "rope" not in name}
    return {name.removeprefix("vision_tower."): value for name, value in golden.renamed(state, "vision_encoder.").items()}


@torch.no_grad()
def test_features(tower):
    data = golden.tensors("case_b_forward")
    golden.assert_close(tower(data["images"], 0), data["embed"], golden.FORWARD, "embed")
    for layer in range(3):
        golden.assert_close(tower(data["images"], layer + 1), data[f"block.{layer}"], golden.FORWARD, f"block {layer}")
    features = tower(data["images"])
    golden.assert_close(features, data["all_features"], golden.FORWARD, "features")
    golden.assert_close(tower.norm(features)[:, 0], data["pooled"], golden.FORWARD, "pooled")
    golden.assert_close(tower.pool(features), data["pooled_head"], golden.FORWARD, "head")


@torch.no_grad()
def test_epsilons(tower):
    """Scaled-down weights expose a wrong epsilon of any LayerNorm of the tower."""
    data = golden.tensors("case_b_forward")
    scaled = re.compile(
        r"pos_embed|cls_token|patch_embed|attn\.v_proj\.weight|attn\.v_bias|attn\.proj\.|mlp\.w2\.|mlp\.w3\."
    )
    state = {
        name: value.float() * (2**-9 if scaled.search(name) else 1)
        for name, value in golden.tensors("case_b_state_dict").items()
        if "rope" not in name
    }
    try:
        tower.load_state_dict(
            {name.removeprefix("vision_tower."): value for name, value in golden.renamed(state, "vision_encoder.").items()}
        )
        features = tower(data["images"])
        golden.assert_close(features, data["eps_probe.all_features"], golden.FORWARD, "features")
        golden.assert_close(tower.pool(features), data["eps_probe.pooled_head"], golden.FORWARD, "head")
    finally:
        tower.load_state_dict(tower_state())


def test_rope_tables():
    data = golden.tensors("case_b_forward")
    for grid in (6, 24):
        cos, sin = axial_rope(64, grid, 16)
        golden.assert_close(cos, data[f"rope_table.ft{grid}.cos"], golden.FORWARD, f"cos {grid}")
        golden.assert_close(sin, data[f"rope_table.ft{grid}.sin"], golden.FORWARD, f"sin {grid}")


def test_rope_rotation():
    data = golden.tensors("case_b_forward")
    cos, sin = axial_rope(64, 4, 16)
    rotated = apply_rope(data["rope.in"].transpose(1, 2), cos, sin).transpose(1, 2)
    golden.assert_close(rotated, data["rope.out"], golden.FORWARD, "rotated")
