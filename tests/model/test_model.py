"""The model as its users meet it: batches, generation, decoders, saving, errors."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    TextStreamer,
)

from infimm_fast import InfiMMHDConfig, InfiMMHDForConditionalGeneration, preset
from infimm_fast.errors import ConfigurationError, ImageCountError, ImageInputError

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def with_backend(model, name):
    model = copy.deepcopy(model)
    model.set_backend(name)
    return model


@torch.no_grad()
def test_images_of_different_grids_at_once_equal_one_at_a_time(tiny_model, processor, pictures):
    together = processor.image_processor(pictures)
    assert together["image_grids"].tolist() == [[1, 1], [1, 2], [2, 2], [2, 1]]
    assert len(together["pixel_values"]) == 1 + 3 + 5 + 3
    features, offsets = tiny_model.get_image_features(together["pixel_values"], together["image_grids"])
    assert offsets.tolist() == [0, 65, 65 * 4, 65 * 9, 65 * 12]
    for index, picture in enumerate(pictures):
        alone = processor.image_processor(picture)
        expected, _ = tiny_model.get_image_features(alone["pixel_values"], alone["image_grids"])
        torch.testing.assert_close(features[offsets[index] : offsets[index + 1]], expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("backend", ("sdpa", "reference"))
@pytest.mark.parametrize("only_immediate", (True, False))
def test_rows_of_a_batch_equal_the_rows_alone(tiny_model, processor, pictures, backend, only_immediate):
    model = with_backend(tiny_model, backend)
    model.config.only_attend_immediate_image = only_immediate
    texts = ["see <image> and <image>: what?", "no picture here", "<image>", "first text, then <image> and text"]
    rows = [[pictures[1], pictures[2]], [], [pictures[0]], [pictures[3]]]
    batch = processor(text=texts, images=rows)
    logits = model(**batch).logits
    for row, (text, images) in enumerate(zip(texts, rows, strict=True)):
        alone = processor(text=text, images=[images] if images else None)
        expected = model(**alone).logits[0]
        torch.testing.assert_close(logits[row, -len(expected) :], expected, **CLOSE)


@torch.no_grad()
def test_the_picture_matters_and_only_after_its_token(tiny_model, processor, pictures):
    text = "before <image> after"
    first = tiny_model(**processor(text=text, images=pictures[1])).logits
    second = tiny_model(**processor(text=text, images=pictures[2])).logits
    position = processor.tokenizer(text)["input_ids"].index(tiny_model.config.image_token_id)
    torch.testing.assert_close(first[:, :position], second[:, :position], **CLOSE)
    assert ((first - second).abs().amax(-1)[0, position:] > 1e-3).all()


@torch.no_grad()
def test_rows_without_a_picture_equal_the_language_model(tiny_model, processor):
    inputs = processor(text="only text")
    expected = tiny_model.language_model(**inputs).logits
    torch.testing.assert_close(tiny_model(**inputs).logits, expected, **CLOSE)


@torch.no_grad()
def test_all_previous_images_are_visible_if_configured(tiny_model, processor, pictures):
    text = "<image><image> text"
    results = []
    for only_immediate in (True, False):
        model = with_backend(tiny_model, "sdpa")
        model.config.only_attend_immediate_image = only_immediate
        runs = [model(**processor(text=text, images=[first, pictures[2]])).logits[0, -1] for first in pictures[:2]]
        results.append((runs[0] - runs[1]).abs().max().item())
    # Decoder self-attention carries a little of the first picture either way, through the first image token.
    assert results[1] > 0 and results[0] != results[1]


@torch.no_grad()
@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_decoding_with_a_cache_equals_the_whole_forward(tiny_model, processor, pictures, backend):
    model = with_backend(tiny_model, backend)
    texts = ["<image> a question", "two: <image><image> more", "none"]
    inputs = processor(text=texts, images=[[pictures[2]], pictures[:2], []])
    whole, ids, mask = model(**inputs).logits, inputs["input_ids"], inputs["attention_mask"]
    length = ids.shape[1]
    step = model(**{**inputs, "input_ids": ids[:, : length - 3], "attention_mask": mask[:, : length - 3]}, use_cache=True)
    logits = [step.logits]
    for end in range(length - 2, length + 1):
        step = model(
            ids[:, end - 1 : end],
            attention_mask=mask[:, :end],
            past_key_values=step.past_key_values,
            visual_context=step.visual_context,
            use_cache=True,
        )
        logits.append(step.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], whole[real], **CLOSE)


@torch.no_grad()
def test_a_prompt_in_two_parts(tiny_model, processor, pictures):
    """The second part has a picture of its own; `images_seen` says how many stood in the first."""
    inputs = processor(text="one <image> and another <image> end", images=[pictures[1], pictures[2]])
    whole = tiny_model(**inputs).logits
    context = tiny_model.encode_images(inputs["pixel_values"], inputs["image_grids"], inputs["image_counts"])
    ids, split = inputs["input_ids"], 12
    assert (ids[:, :split] == tiny_model.config.image_token_id).sum() == 1
    first = tiny_model(ids[:, :split], visual_context=context, images_seen=torch.tensor([0]), use_cache=True)
    second = tiny_model(
        ids[:, split:], visual_context=context, images_seen=torch.tensor([1]), past_key_values=first.past_key_values
    )
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole, **CLOSE)


def generate(model, inputs, **kwargs):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **kwargs}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
@pytest.mark.parametrize(
    "options", ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}), ids=str
)
def test_generation_over_mixed_grids_equals_the_rows_alone(tiny_model, processor, pictures, backend, options):
    model = with_backend(tiny_model, backend)
    texts = ["<image> what is <image>?", "text only, no picture", "a longer question about <image>, please"]
    rows = [[pictures[1], pictures[2]], [], [pictures[3]]]
    batch = generate(model, processor(text=texts, images=rows), **options)
    returned = options.get("num_return_sequences", 1)
    for row, (text, images) in enumerate(zip(texts, rows, strict=True)):
        alone = generate(model, processor(text=text, images=[images] if images else None), **options)
        assert torch.equal(batch[row * returned : (row + 1) * returned], alone)


def test_sampling_with_several_return_sequences_uses_each_rows_own_picture(tiny_model, processor, pictures):
    """At a temperature near zero all samples are the greedy answer, if every copy sees its own row's pictures."""
    inputs = processor(text=["<image> q", "<image> q"], images=[[pictures[2]], [pictures[3]]])
    greedy = generate(tiny_model, inputs)
    assert not torch.equal(greedy[0], greedy[1])
    sampled = generate(tiny_model, inputs, do_sample=True, temperature=1e-4, num_return_sequences=2)
    assert torch.equal(sampled, greedy.repeat_interleave(2, dim=0))


def test_pictures_are_encoded_once_and_can_be_asked_again(tiny_model, processor, pictures, monkeypatch):
    calls = []
    original = tiny_model.vision_tower.forward
    monkeypatch.setattr(tiny_model.vision_tower, "forward", lambda *args: calls.append(1) or original(*args))
    inputs = processor(text="<image> q", images=pictures[2])
    expected = generate(tiny_model, inputs, num_beams=2)
    assert len(calls) == 1
    context = tiny_model.encode_images(inputs["pixel_values"], inputs["image_grids"])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(generate(tiny_model, {**text, "visual_context": context}, num_beams=2), expected)
    assert torch.equal(generate(tiny_model, {**text, "visual_context": context}, num_beams=2), expected)
    assert len(calls) == 2


def test_streaming(tiny_model, processor, pictures, capsys):
    inputs = processor(text="<image> q", images=pictures[0])
    tokens = generate(tiny_model, inputs, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert processor.decode(tokens[0]) in capsys.readouterr().out


def test_generated_image_tokens_do_not_disturb(tiny_model, processor, pictures):
    """A model may produce <image>; without a cache the step sees it among its inputs."""
    inputs = processor(text="<image> q", images=pictures[2])
    force = [[1, tiny_model.config.image_token_id]]

    def forced(batch_id, ids):
        step = ids.shape[0] - inputs["input_ids"].shape[1]
        return [force[0][1]] if step == 1 else list(range(tiny_model.config.text_config.vocab_size))

    with_cache = generate(tiny_model, inputs, prefix_allowed_tokens_fn=forced)
    without = generate(tiny_model, inputs, prefix_allowed_tokens_fn=forced, use_cache=False)
    assert with_cache[0, 1] == tiny_model.config.image_token_id
    assert torch.equal(with_cache, without)


SMALL_TEXT = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}


@pytest.mark.parametrize(
    "text_config",
    (LlamaConfig(**SMALL_TEXT), MistralConfig(**SMALL_TEXT), Qwen2Config(**SMALL_TEXT, tie_word_embeddings=True)),
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("gate", ("vector", "scalar"))
def test_decoders(text_config, gate, processor, pictures, tmp_path):
    config = preset("tiny")
    config = InfiMMHDConfig(
        **{
            **config.to_dict(),
            "text_config": text_config.to_dict(),
            "cross_attention_gate": gate,
            "cross_attention_every_n_layers": 2,
        }
    )
    torch.manual_seed(0)
    model = InfiMMHDForConditionalGeneration(config).eval()
    assert [block.attn_gate.numel() for block in model.gated_blocks] == [64 if gate == "vector" else 1] * 2
    inputs = processor(text=["<image> q", "no"], images=[[pictures[1]], []])
    other = processor(text=["<image> q", "no"], images=[[pictures[2]], []])
    with torch.no_grad():
        logits = model(**inputs).logits
        assert (logits[0, -1] - model(**other).logits[0, -1]).abs().max() > 1e-3
        torch.testing.assert_close(with_backend(model, "reference")(**inputs).logits, logits, **CLOSE)
    generated = generate(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, InfiMMHDForConditionalGeneration)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, logits)
    assert torch.equal(generate(loaded, inputs), generated)
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == bool(text_config.tie_word_embeddings)


def test_decoder_without_a_layer_list_is_refused():
    from infimm_fast.models.infimm_hd.modeling_gated_cross_attention import insert_gated_cross_attention

    with pytest.raises(ConfigurationError, match="no plain list of layers"):
        insert_gated_cross_attention(torch.nn.Linear(2, 2), {})


def test_saved_configuration_round_trips(tmp_path):
    config = preset("infimm-pretrain-vicuna-7b")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, InfiMMHDConfig)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_backend_is_chosen_on_load(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    model = InfiMMHDForConditionalGeneration.from_pretrained(tmp_path, backend="reference")
    assert model.vision_tower.blocks[0].attn.backend == "reference"
    assert model.gated_blocks[0].attn.backend == "reference"
    with pytest.raises(ConfigurationError, match="choose one of"):
        model.set_backend("fast")


def test_fresh_gated_blocks_on_a_given_language_model(tiny_model, tmp_path):
    """Weights that a checkpoint lacks are initialised, not left as they lie in memory."""
    from safetensors.torch import load_file, save_file

    tiny_model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in state.items() if "gated_cross_attention" not in name and "blocks.0." not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = InfiMMHDForConditionalGeneration.from_pretrained(tmp_path, gate_initializer_range=0.0)
    assert all((block.attn_gate == 0).all() and (block.ff_gate == 0).all() for block in model.gated_blocks)
    fresh = model.vision_tower.blocks[0]
    assert (fresh.attn.qkv.q_bias == 0).all() and (fresh.norm1.weight == 1).all()
    assert fresh.attn.qkv.weight.std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its successor is not in 5.17
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, processor, pictures):
    inputs = processor(text=["<image> q", "<image> r"], images=[[pictures[1]], [pictures[2]]])
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(tiny_model).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("kv_proj" in name for name in gradients[0]) and any("vision_tower" in name for name in gradients[0])
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], msg=name)


def test_other_tile_sizes_resize_the_positions(tiny_model):
    features = tiny_model.vision_tower(torch.randn(1, 3, 140, 140))
    assert features.shape == (1, 101, 224)


def test_errors(tiny_model, processor, pictures):
    inputs = processor(text="<image> q", images=pictures[2])
    ids = inputs["input_ids"]
    with pytest.raises(ImageCountError, match="stand for 1 tiles"):
        tiny_model(ids, pixel_values=inputs["pixel_values"], image_grids=torch.tensor([[1, 1]]))
    with pytest.raises(ImageCountError, match="add up to 2, but there are 1 images"):
        tiny_model(**{**inputs, "image_counts": torch.tensor([2])})
    with pytest.raises(ImageCountError, match="but \\[0\\] images"):
        tiny_model(ids)
    with pytest.raises(ImageCountError, match="pass one of them"):
        tiny_model(**inputs, visual_context=tiny_model.encode_images(inputs["pixel_values"], inputs["image_grids"]))
    with pytest.raises(ImageCountError, match="names pictures"):
        tiny_model(ids, image_counts=torch.tensor([1]))
    with pytest.raises(ImageInputError, match="multiple of 14"):
        tiny_model(ids, pixel_values=torch.zeros(1, 3, 100, 100), image_counts=torch.tensor([1]))
    with pytest.raises(ConfigurationError, match="prefill_chunk_size"):
        tiny_model.generate(**inputs, prefill_chunk_size=4)


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"cross_attention_gate": "matrix"}, "'vector', 'scalar'"),
        ({"backend": "magic"}, "backend"),
        ({"vision_feature_layer": -9}, "vision_feature_layer"),
        ({"cross_attention_every_n_layers": 0}, "at least 1"),
        ({"vision_config": {"hidden_size": 100, "num_attention_heads": 3}}, "not a multiple"),
        ({"vision_config": {"image_size": 100}}, "not a multiple"),
    ),
)
def test_bad_configurations(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        InfiMMHDConfig(**{**preset("tiny").to_dict(), **changes})


def test_unknown_preset():
    with pytest.raises(ConfigurationError, match="tiny"):
        preset("huge")
