"""Costs against numbers worked out by hand, and against PyTorch's own counter on a run of the model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infimm_fast import InfiMMHDForConditionalGeneration, InfiMMHDVisionConfig, preset
from infimm_fast.models.infimm_hd import costs


def test_infimm_hd_at_ten_tiles_by_hand():
    """64 layers: 4 * 1792**2 + 2 * 1792 * 15360 = 67 895 296 weights each; 10 tiles of 1025 tokens; 10 gated blocks."""
    config = preset("infimm-hd-vicuna-13b")
    config.vision_feature_layer = -1
    cost = costs.picture_costs(config, 1344, 1344)
    assert (cost.grid, cost.tiles, cost.visual_tokens) == ((3, 3), 10, 10250)
    patches = 2 * 10 * 1024 * 588 * 1792
    assert cost.vision_linear_flops == 2 * 10250 * 67_895_296 * 64 + patches
    assert cost.vision_linear_flops == pytest.approx(89e12, rel=0.01)
    assert cost.vision_attention_flops == 4 * 10 * 1025 * 1025 * 1792 * 64 == 4_819_763_200_000
    assert cost.key_value_flops == 2 * 10250 * 1792 * 1536 * 10 == 564_264_960_000
    assert cost.key_value_bytes == 314_880_000 and cost.feature_bytes == 36_736_000
    assert cost.score_bytes == 10 * 16 * 1_050_625 * 2 == 336_200_000
    assert cost.resampler_flops == 0
    assert cost.flops == cost.vision_linear_flops + cost.vision_attention_flops + cost.key_value_flops


def test_the_penultimate_layer_saves_a_block():
    config = preset("infimm-hd-vicuna-13b")
    assert config.vision_feature_layer == -2 and costs.vision_layers(config) == 63
    config.vision_feature_layer = 3
    assert costs.vision_layers(config) == 3


def test_infimm_zephyr_by_hand():
    """One tile of 577 tokens whatever the picture; the six Perceiver layers see 577 + 64."""
    config = preset("infimm-zephyr-7b")
    for size in ((336, 336), (8000, 6000)):
        cost = costs.picture_costs(config, *size)
        assert (cost.tiles, cost.visual_tokens) == (1, 64)
        assert cost.vision_linear_flops == 2 * 576 * 588 * 1024 + 24 * 2 * 577 * (4 * 1024**2 + 3 * 1024 * 2730)
        layer = 4 * 64 * 1024 * 512 + 2 * 641 * 1024 * 1024 + 4 * 64 * 641 * 512 + 4 * 64 * 1024 * 4096
        assert cost.resampler_flops == 6 * layer
        assert cost.key_value_flops == 16 * 2 * 64 * 1024 * 1024
        assert cost.key_value_bytes == 64 * 16 * 1024 * 2 == 2_097_152


def test_gated_blocks_by_hand():
    """InfiMM-HD: 10 blocks of width 5120, 768 across, feed-forward 5120."""
    block = 2 * 2 * 7 * 5120 * 768 + 4 * 7 * 10250 * 768 + 2 * 2 * 7 * 5120 * 5120
    assert costs.gated_block_flops(preset("infimm-hd-vicuna-13b"), 7, 10250) == 10 * block


def open_flamingo():
    config = preset("tiny-zephyr")
    vision = preset("openflamingo-9b").vision_config.to_dict()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 96, "image_size": 56}
    config.vision_config = InfiMMHDVisionConfig(**{**vision, **sizes})
    config.use_class_token = False
    return config


@torch.no_grad()
@pytest.mark.parametrize("make", (lambda: preset("tiny"), lambda: preset("tiny-zephyr"), open_flamingo))
def test_against_pytorchs_counter(make):
    """The naive path, whose attention PyTorch sees as matrix products."""
    config = make()
    config.vision_feature_layer = -2
    model = InfiMMHDForConditionalGeneration(config).eval().requires_grad_(False)
    model.set_backend("reference")
    cost = costs.picture_costs(config, 300, 120)
    pixels = torch.randn(cost.tiles, 3, config.vision_config.image_size, config.vision_config.image_size)
    with FlopCounterMode(display=False) as counter:
        features, _ = model.get_image_features(pixels, torch.tensor([cost.grid]))
        key_values = [block.attn.project_visual(features) for block in model.gated_blocks]
    assert counter.get_total_flops() == cost.flops
    assert len(features) == cost.visual_tokens and features.nbytes == 2 * cost.feature_bytes
    assert sum(key.nbytes + value.nbytes for key, value in key_values) == 2 * cost.key_value_bytes
    text, block = torch.randn(1, 5, config.text_config.hidden_size), model.gated_blocks[0]
    everything = torch.tensor([0, len(features)]).expand(1, 5, 2)
    with FlopCounterMode(display=False) as counter:
        block(text, everything, torch.tensor([True]), features)
    projection = cost.key_value_flops // len(model.gated_blocks)
    assert counter.get_total_flops() - projection == costs.gated_block_flops(config, 5, len(features)) // len(key_values)


def test_the_tower_of_infimm_hd_on_ten_tiles():
    # 64 layers, 1025 tokens, width 1792: 4 C^2 + 2 C 15360 weights.
    linear = 2 * 64 * 10250 * (4 * 1792**2 + 2 * 1792 * 15360)
    assert linear == pytest.approx(89.1e12, rel=1e-3)
    # Two products of 1025 x 1025 x 112 in 16 heads.
    attention = 64 * 10 * 16 * 4 * 1025**2 * 112
    assert attention == pytest.approx(4.82e12, rel=1e-3)
    patches = 2 * 10 * 1024 * 3 * 14 * 14 * 1792
    config = preset("infimm-hd-vicuna-13b")
    config.vision_feature_layer = -1
    assert costs.vision_flops(config, 10) == patches + linear + attention


def test_the_paper_sees_the_penultimate_layer():
    config = preset("infimm-hd-vicuna-13b")
    embedding = 2 * 10 * 1024 * 3 * 14 * 14 * 1792
    expected = embedding + (89.08e12 + 4.82e12) * 63 / 64
    assert costs.vision_flops(config, 10) == pytest.approx(expected, rel=1e-3)
    assert costs.vision_bytes(config, "bfloat16", 10) == pytest.approx(63 * 67.9e6 * 2 + 6.0e6 * 2 + 18.4e6 * 2, rel=1e-3)


def test_one_decoding_step_reads_the_weights_the_cache_and_the_pictures():
    config = preset("infimm-hd-vicuna-13b")
    # Without the embedding table: 40 layers of 317 million, the head, 10 gated blocks of 60 million.
    layers = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    gated = 10 * (2 * 5120 * 768 + 2 * 5120**2)
    visual = 10 * 2 * 768 * 10250
    cache = 40 * 2 * 5120 * 129
    expected = 2 * (layers + 5120 * 32002 + gated + visual + cache)
    assert costs.language_bytes(config, "bfloat16", 1, 1, 128, 10250) == expected
    assert 2 * layers == pytest.approx(25.4e9, rel=0.01) and 2 * gated == pytest.approx(1.2e9, rel=0.01)
    assert 2 * visual == pytest.approx(315e6, rel=0.01)
    linear = 2 * (layers + gated + 5120 * 32002)
    attention = 40 * 4 * 5120 * 129 + 10 * 4 * 768 * 10250
    assert costs.language_flops(config, 1, 1, 128, 10250) == linear + attention


def test_a_prompt_counts_causal_pairs_and_one_head():
    config = preset("infimm-hd-vicuna-13b")
    layers = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    gated = 10 * (2 * 5120 * 768 + 2 * 5120**2)
    pairs = 3 * 128 * 129 // 2
    expected = 2 * 3 * 128 * (layers + gated) + 40 * 4 * 5120 * pairs + 10 * 4 * 768 * 3 * 128 * 1025 + 2 * 3 * 5120 * 32002
    assert costs.language_flops(config, 3, 128, 0, 1025) == expected
