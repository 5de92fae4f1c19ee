"""Contexts that are shared, joined, appended to, moved and stored."""

import pytest
import torch

from infimm_fast import VisualContext
from infimm_fast.errors import CheckpointError, ImageCountError


@pytest.fixture(scope="module")
def encode(tiny_model, processor):
    @torch.no_grad()
    def run(*rows):
        inputs = processor.image_processor([list(row) for row in rows])
        return tiny_model.encode_images(inputs["pixel_values"], inputs["image_grids"], inputs["image_counts"])

    return run


@torch.no_grad()
def logits(model, processor, texts, context):
    batch = processor.tokenizer(texts, padding=True, return_tensors="pt")
    return model(**batch, visual_context=context).logits


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_all_keys_and_values_come_from_one_product(tiny_model, encode, pictures):
    context = encode(pictures[1:3])
    assert context.key_values[0][0].stride(0) == len(tiny_model.gated_blocks) * 2 * 12 * 64
    for block, (key, value) in zip(tiny_model.gated_blocks, context.key_values, strict=True):
        expected = block.attn.project_visual(context.features)
        assert_same(key, expected[0])
        assert_same(value, expected[1])


def test_rows_can_share_a_picture(tiny_model, processor, encode, pictures):
    shared = encode([pictures[2]]).select_rows(torch.tensor([0, 0, 0]))
    texts = ["<image> what?", "<image> where?", "<image> why?"]
    separate = encode(*[[pictures[2]]] * 3)
    assert shared.nbytes * 3 == separate.nbytes
    assert_same(logits(tiny_model, processor, texts, shared), logits(tiny_model, processor, texts, separate))
    repacked = shared.repack()
    assert repacked.nbytes == separate.nbytes
    assert torch.equal(repacked.row_images, separate.row_images)
    assert_same(repacked.features, separate.features)


def test_concatenated_requests(tiny_model, processor, encode, pictures):
    joined = VisualContext.concatenate((encode(pictures[:2], []), encode([pictures[3]])))
    expected = encode(pictures[:2], [], [pictures[3]])
    assert torch.equal(joined.image_offsets, expected.image_offsets)
    assert torch.equal(joined.row_images, expected.row_images)
    texts = ["<image> or <image>", "none", "<image>"]
    assert_same(logits(tiny_model, processor, texts, joined), logits(tiny_model, processor, texts, expected))


@pytest.mark.parametrize("only_immediate", (True, False))
def test_appended_pictures_follow_the_rows_own(tiny_model, processor, encode, pictures, only_immediate):
    appended = encode([pictures[0]], [pictures[1]], []).append(encode([pictures[2]], [], [pictures[3]]))
    expected = encode([pictures[0], pictures[2]], [pictures[1]], [pictures[3]])
    texts = ["<image> then <image>", "<image>", "<image>"]
    tiny_model.config.only_attend_immediate_image = only_immediate
    try:
        assert_same(logits(tiny_model, processor, texts, appended), logits(tiny_model, processor, texts, expected))
    finally:
        tiny_model.config.only_attend_immediate_image = True
    assert appended.nbytes == expected.nbytes


def test_dropping_pictures(encode, pictures):
    context = encode(pictures[:3], [pictures[3]])
    chosen = context.repack([[2], [3]])
    expected = encode([pictures[2]], [pictures[3]])
    assert_same(chosen.features, expected.features)
    assert torch.equal(chosen.image_offsets, expected.image_offsets)
    assert context.repack([[], []]).nbytes == 0


@pytest.mark.parametrize("with_keys", (True, False))
def test_saved_contexts_load(encode, pictures, tmp_path, with_keys):
    context = encode(pictures[1:3], [])
    if not with_keys:
        context = VisualContext(context.features, context.image_offsets, context.row_images)
    context.save(tmp_path / "context.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["context.safetensors"]
    loaded = VisualContext.load(tmp_path / "context.safetensors")
    assert torch.equal(loaded.features, context.features) and torch.equal(loaded.row_images, context.row_images)
    assert (loaded.key_values is None) == (context.key_values is None)
    for mine, theirs in zip(loaded.key_values or (), context.key_values or (), strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_moved_contexts(encode, pictures):
    context = encode([pictures[1]])
    half = context.to(dtype=torch.bfloat16)
    assert half.nbytes * 2 == context.nbytes and half.image_offsets.dtype == torch.int64
    assert half.to("meta").row_images.device.type == "meta"


def test_errors(encode, pictures, tmp_path):
    one, two = encode([pictures[0]]), encode([pictures[0]], [])
    with pytest.raises(ImageCountError, match="1 rows, but 2"):
        one.append(two)
    with pytest.raises(ImageCountError, match="all or none"):
        VisualContext.concatenate((one, VisualContext(one.features, one.image_offsets, one.row_images)))
    with pytest.raises(ImageCountError, match="0 contexts"):
        VisualContext.concatenate(())
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a saved VisualContext"):
        VisualContext.load(tmp_path / "bad")
    with pytest.raises(OSError):
        one.save(tmp_path / "missing" / "context.safetensors")
