"""Prompts and pictures together; the tokenizer of the tiny preset."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from infimm_fast import InfiMMHDProcessor, preset
from infimm_fast.errors import ImageCountError, PromptError
from infimm_fast.models.infimm_hd.tokenization_bytes import END_OF_CHUNK_ID, IMAGE_ID, VOCABULARY_SIZE, byte_tokenizer


def test_byte_tokenizer_round_trips_any_text():
    tokenizer = byte_tokenizer()
    text = "Grüße, 世界!\n\t<image>🦝<|endofchunk|> two  spaces"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2
    assert ids.count(IMAGE_ID) == 1 and ids.count(END_OF_CHUNK_ID) == 1
    assert tokenizer.decode(ids[1:]) == text
    assert len(ids) == 1 + len(text.replace("<image>", "").replace("<|endofchunk|>", "").encode()) + 2
    assert max(tokenizer.get_vocab().values()) < VOCABULARY_SIZE


def test_ids_agree_with_the_preset(processor):
    config = preset("tiny")
    assert processor.token_ids() == {
        "image_token_id": config.image_token_id,
        "end_of_chunk_token_id": config.end_of_chunk_token_id,
    }
    assert processor.tokenizer.pad_token_id == config.text_config.pad_token_id


def test_batches_are_left_padded_and_ragged(processor, pictures):
    batch = processor(text=["<image>", "a longer <image><image>", "no"], images=[[pictures[0]], pictures[1:3], []])
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1] and batch["attention_mask"][0, 0] == 0
    assert batch["image_counts"].tolist() == [1, 2, 0]
    assert len(batch["pixel_values"]) == 1 + 3 + 5


def test_a_flat_list_is_dealt_by_the_tokens(processor, pictures):
    texts = ["<image>", "none", "a longer <image><image>"]
    flat, nested = processor(text=texts, images=pictures[:3]), [[pictures[0]], [], pictures[1:3]]
    expected = processor(text=texts, images=nested)
    for name in expected:
        assert torch.equal(flat[name], expected[name]), name


def test_text_only(processor):
    assert set(processor(text="hello")) == {"input_ids", "attention_mask"}
    assert set(processor(text=["hello", "you"], images=[[], []])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "text, images, error, message",
    (
        ("<image><image>", 1, ImageCountError, "2 <image> tokens, but 1 images"),
        ("<image>", 2, ImageCountError, "1 <image> tokens, but 2 images"),
        ("<image>", 0, ImageCountError, "1 <image> tokens, but 0 images"),
        ("no token", 1, ImageCountError, "0 <image> tokens, but 1 images"),
        (["<image>", "<image>"], [2, 0], ImageCountError, r"\[1, 1\] <image> tokens, but \[2, 0\]"),
        ("", 0, PromptError, "empty"),
        ("  \n", 0, PromptError, "empty"),
        (["fine", ""], 0, PromptError, "empty"),
        ([], 0, PromptError, "empty"),
        (None, 1, PromptError, "empty"),
        ([3], 0, PromptError, "not text"),
    ),
)
def test_misfits(processor, text, images, error, message):
    picture = Image.new("RGB", (20, 20))
    given = [[picture] * count for count in images] if isinstance(images, list) else [picture] * images or None
    with pytest.raises(error, match=message):
        processor(text=text, images=given)


def conversation(picture):
    return [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A raccoon."}]},
        {"role": "user", "content": "Sure?"},
    ]


def test_vicuna_chat_template(processor, pictures):
    text = processor.apply_chat_template(conversation(pictures[0]), add_generation_prompt=True)
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. USER: <image>What is it? ASSISTANT: A raccoon.</s>USER: Sure? ASSISTANT:"
    )
    system = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert system == "Be brief. USER: Hi "


def test_chat_template_to_tensors(processor, pictures):
    batch = processor.apply_chat_template(
        conversation(pictures[2]), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert batch["image_grids"].tolist() == [[2, 2]]
    assert (batch["input_ids"] == IMAGE_ID).sum() == 1
    assert (batch["input_ids"] == 1).sum() == 1, "one beginning-of-text token"


def test_saved_folder_loads_through_auto_classes(processor, pictures, tmp_path):
    preset("tiny").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, InfiMMHDProcessor)
    expected, actual = (each(text="<image> q", images=pictures[2]) for each in (processor, loaded))
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert loaded.chat_template == processor.chat_template
    assert AutoImageProcessor.from_pretrained(tmp_path).tile_size == 112
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"


def test_missing_special_tokens_are_added():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from infimm_fast import InfiMMHDImageProcessor

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")))
    processor = InfiMMHDProcessor(InfiMMHDImageProcessor(), tokenizer)
    assert processor.token_ids() == {"end_of_chunk_token_id": 4, "image_token_id": 5}
