"""The sinusoid of a sub-image's place, against the formula written out."""

import math

import pytest
import torch

from infimm_fast.models.infimm_hd.position_embedding import subimage_position_embedding


def test_formula():
    dim = 16
    embedding = subimage_position_embedding([(2, 5), None, (0, 0)], dim)
    for half, position in ((0, 2), (dim // 2, 5)):
        for i in range(dim // 4):
            angle = position / 10000 ** (4 * i / dim)
            assert embedding[0, half + 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert embedding[0, half + 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert (embedding[1] == 0).all(), "the thumbnail has no place"
    assert embedding[2].tolist() == [0.0, 1.0] * (dim // 2)


@torch.no_grad()
def test_it_is_added_to_every_token_of_its_sub_image(tiny_model, processor, pictures):
    inputs = processor.image_processor(pictures[2])
    features, _ = tiny_model.get_image_features(inputs["pixel_values"], inputs["image_grids"])
    plain = tiny_model.vision_tower(inputs["pixel_values"])
    added = features.view_as(plain) - plain
    expected = subimage_position_embedding([(0, 0), (0, 1), (1, 0), (1, 1), None], 224)
    torch.testing.assert_close(added, expected[:, None].expand_as(added), atol=1e-4, rtol=0)
    tiny_model.config.use_subimage_position_embedding = False
    try:
        features, _ = tiny_model.get_image_features(inputs["pixel_values"], inputs["image_grids"])
    finally:
        tiny_model.config.use_subimage_position_embedding = True
    torch.testing.assert_close(features.view_as(plain), plain)
