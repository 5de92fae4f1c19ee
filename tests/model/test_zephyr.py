"""InfiMM-Zephyr and the OpenFlamingo form end to end: convert, forward, generate, gradients."""

import copy
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

import golden
import official
from infimm_fast import (
    EvaVisionTower,
    InfiMMHDForConditionalGeneration,
    InfiMMHDImageProcessor,
    InfiMMHDProcessor,
    InfiMMHDVisionConfig,
    convert_checkpoint,
    optimize,
    preset,
    restore,
)
from infimm_fast.errors import ConfigurationError
from infimm_fast.models.infimm_hd.tokenization_bytes import byte_tokenizer

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def make_model(config):
    torch.manual_seed(0)
    return InfiMMHDForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def model():
    return make_model(preset("tiny-zephyr"))


@pytest.fixture(scope="module")
def processor():
    return InfiMMHDProcessor.from_config(preset("tiny-zephyr"), byte_tokenizer())


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Golden case B's tower inside a checkpoint with InfiMM-Zephyr's names, converted."""
    folder = tmp_path_factory.mktemp("zephyr")
    config = preset("tiny-zephyr")
    config.vision_config.image_size = 56  # as in case B
    state = official.zephyr_state_dict(make_model(config))
    tower = {f"model.vision_encoder.{name}": value for name, value in golden.tensors("case_b_state_dict").items()}
    assert tower.keys() <= state.keys()
    torch.save({**state, **tower}, folder / "pytorch_model.bin")
    return state, convert_checkpoint(folder / "pytorch_model.bin", folder / "out", config, byte_tokenizer())


def test_the_names_are_those_of_the_real_checkpoint(converted):
    """Every name, once its numbers are removed, and nothing else."""

    def patterns(names):
        return {re.sub(r"\.\d+\.", ".{N}.", name, count=1) for name in names}

    assert patterns(converted[0]) == set(official.key_patterns("zephyr")["patterns"])


@torch.no_grad()
@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_golden_case_b_inside_the_converted_model(converted, backend):
    model = InfiMMHDForConditionalGeneration.from_pretrained(converted[1], dtype="float32", backend=backend)
    data = golden.tensors("case_b_forward")
    golden.assert_close(model.vision_tower(data["images"]), data["all_features"], golden.FORWARD, "features")
    features, offsets = model.get_image_features(data["images"])
    assert offsets.tolist() == [16 * image for image in range(len(data["images"]) + 1)]
    expected = model.resampler(data["all_features"]).flatten(0, 1)
    golden.assert_close(features, expected, golden.FORWARD, "visual tokens")


def test_the_converted_weights_are_the_originals(converted):
    state, folder = converted
    model = InfiMMHDForConditionalGeneration.from_pretrained(folder, dtype="float32")
    for name, value in model.state_dict().items():
        if not name.startswith("vision_tower."):
            assert torch.equal(value, state[f"model.{official.official_name(name)}"]), name
    processor = InfiMMHDProcessor.from_pretrained(folder)
    assert processor.image_processor.fit == "crop" and "<|system|>" in processor.chat_template


def test_visual_tokens_per_picture_are_the_latents(model, processor):
    pictures = [Image.new("RGB", size) for size in ((50, 50), (300, 100), (40, 200))]
    inputs = processor(text=["<image><image>", "<image>"], images=[pictures[:2], pictures[2:]])
    assert inputs["image_grids"].tolist() == [[1, 1]] * 3 and len(inputs["pixel_values"]) == 3
    context = model.encode_images(**{name: inputs[name] for name in ("pixel_values", "image_grids", "image_counts")})
    latents = model.config.visual_tokens_per_tile
    assert context.image_offsets.tolist() == [0, latents, 2 * latents, 3 * latents] and latents == 16
    assert len(context.features) == 3 * latents


def noise(seed, size=(90, 90)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@torch.no_grad()
def test_rows_alone_and_implementations_agree(model, processor):
    texts, rows = ["<image> and <image>", "none", "see <image>"], [[noise(1), noise(2)], [], [noise(3)]]
    inputs = processor(text=texts, images=rows)
    logits = model(**inputs).logits
    naive = copy.deepcopy(model)
    naive.set_backend("reference")
    assert naive.resampler.layers[0].attn.backend == "reference"
    torch.testing.assert_close(naive(**inputs).logits, logits, **CLOSE)
    for row, (text, images) in enumerate(zip(texts, rows, strict=True)):
        alone = model(**processor(text=text, images=[images] if images else None)).logits[0]
        torch.testing.assert_close(logits[row, -len(alone) :], alone, **CLOSE)
    other = model(**processor(text=texts, images=[rows[0], [], [noise(4)]])).logits
    assert (other[2, -1] - logits[2, -1]).abs().max() > 1e-3


def test_generation_is_the_same_with_and_without_a_cache(model, processor):
    inputs = processor(text=["<image> a question", "two <image><image>"], images=[[noise(1)], [noise(2), noise(3)]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(**inputs, **options)
    assert torch.equal(tokens, model.generate(**inputs, **options, use_cache=False))
    assert len(model.generate(**inputs, **options, num_beams=2, num_return_sequences=2)) == 4


@torch.no_grad()
@pytest.mark.parametrize("fold", (True, False))
def test_optimized_it_gives_the_same(model, processor, fold):
    """Scalar gates, a wide feed-forward, grouped keys in the language model: the fused blocks take them."""
    inputs = processor(
        text=["<image> a question", "none", "two <image><image>"], images=[[noise(1)], [], [noise(2), noise(3)]]
    )
    expected = model(**inputs).logits
    fused = optimize(copy.deepcopy(model).requires_grad_(False), fold=fold)
    torch.testing.assert_close(fused(**inputs).logits, expected, **CLOSE)
    assert fused.resampler.layers[0].attn.backend == "auto"
    assert torch.equal(restore(fused)(**inputs).logits, expected)


def test_every_parameter_that_matters_has_a_gradient(processor):
    model = make_model(preset("tiny-zephyr")).train()
    inputs = processor(text="<image> q", images=noise(1))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    without = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0}
    # The tower's final norm and head make the CLIP embedding, which the language model does not see.
    assert without == {f"vision_tower.{part}.{kind}" for part in ("norm", "head") for kind in ("weight", "bias")}


class Tiles(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.parts = torch.nn.ModuleList([model.vision_tower, model.resampler])
        self.encode = model.encode_tiles

    def forward(self, pixel_values):
        return self.encode(pixel_values)


@torch.no_grad()
def test_tower_and_perceiver_export_with_a_free_number_of_tiles(model):
    tiles = torch.export.Dim("tiles", min=2, max=64)
    pixels = torch.randn(3, 3, 84, 84)
    program = torch.export.export(Tiles(model), (pixels[:2],), dynamic_shapes=({0: tiles},))
    torch.testing.assert_close(program.module()(pixels), model.encode_tiles(pixels), **CLOSE)


def count_runs(model):
    """Count the runs of each layer of tower, Perceiver and language model, by its first norm."""
    runs = Counter()
    for part in (model.vision_tower.blocks, model.resampler.layers, model.language_model.model.layers):
        for layer in part:
            norm = next(module for module in layer.modules() if "Norm" in type(module).__name__)
            norm.register_forward_pre_hook(lambda module, args: runs.update([module]))
    return runs


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
def test_gradient_checkpointing_covers_every_part(processor):
    """Each layer runs again in the backward pass, and the gradients are the same."""
    inputs = processor(text="<image> q", images=noise(1))
    gradients = []
    for checkpointing in (False, True):
        model = make_model(preset("tiny-zephyr")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        runs = count_runs(model)
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        assert len(runs) == 3 + 2 + 4 and set(runs.values()) == {2 if checkpointing else 1}
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name)


@pytest.mark.parametrize("size", ((80, 40), (40, 120), (60, 60)))
def test_crop_takes_the_middle_as_clip_does(size):
    """CLIP scales the shorter side and then cuts; one step does the same without the large picture between them."""
    picture = noise(5, size)
    tiles, grid = InfiMMHDImageProcessor(tile_size=20, max_grid=1, fit="crop").cut(picture)
    assert grid == (1, 1) and len(tiles) == 1
    resized = picture.resize([side * 20 // min(size) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = ((side - 20) // 2 for side in resized.size)
    expected = np.asarray(resized.crop((left, top, left + 20, top + 20)), np.int32)
    assert np.abs(np.asarray(tiles[0], np.int32) - expected).max() <= 1


def test_crop_is_for_single_tiles():
    with pytest.raises(ConfigurationError, match="fit='crop'"):
        InfiMMHDImageProcessor(max_grid=2, fit="crop")


def test_zephyr_chat(processor):
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": "Sure?"},
    ]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "<|system|>\n</s>\n<|user|>\n<image><image>Which?</s>\n<|assistant|>\nThe first.</s>\n<|user|>\nSure?</s>\n"
        "<|assistant|>\n"
    )
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert processor.apply_chat_template(system) == "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n"


CLIP_RENAMES = (
    (r"^vision_model\.", ""),
    (r"embeddings\.class_embedding", "embeddings.class_token"),
    (r"embeddings\.patch_embedding", "embeddings.patch_embed"),
    (r"embeddings\.position_embedding\.weight", "embeddings.position_embedding"),
    (r"pre_layrnorm", "embeddings.norm"),
    (r"post_layernorm", "norm"),
    (r"encoder\.layers\.(\d+)", r"blocks.\1"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"self_attn\.([qkv])_proj\.bias", r"attn.qkv.\1_bias"),
    (r"self_attn\.([qkv])_proj\.weight", r"attn.qkv.weight.\1"),
    (r"layer_norm([12])", r"norm\1"),
)


def clip_state(theirs):
    """The weights of Transformers' CLIP under our names."""
    state = {}
    for name, value in theirs.state_dict().items():
        for pattern, replacement in CLIP_RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = value.view(1, -1, value.shape[-1]) if "class_token" in name or "position" in name else value
    for name in [name for name in state if name.endswith("qkv.weight.q")]:
        stem = name.removesuffix(".q")
        state[stem] = torch.cat([state.pop(f"{stem}.{part}") for part in "qkv"])
    return state


@torch.no_grad()
@pytest.mark.parametrize("activation", ("quick_gelu", "gelu"))
def test_the_tower_expresses_clip(activation):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96, "image_size": 28}
    theirs = CLIPVisionModel(CLIPVisionConfig(patch_size=14, hidden_act=activation, **sizes)).eval()
    for value in theirs.parameters():  # fresh LayerNorms and biases would hide mistakes
        value.data += 0.1 * torch.randn(value.shape)
    config = {**preset("openflamingo-9b").vision_config.to_dict(), **sizes, "mlp_type": activation}
    ours = EvaVisionTower(InfiMMHDVisionConfig(**config)).eval()
    ours.load_state_dict(clip_state(theirs))
    pixels = torch.randn(2, 3, 28, 28)
    expected = theirs(pixels, output_hidden_states=True)
    torch.testing.assert_close(ours(pixels), expected.hidden_states[-1], **CLOSE)
    torch.testing.assert_close(ours.pool(ours(pixels)), expected.pooler_output, **CLOSE)


def open_flamingo():
    config = preset("tiny-zephyr")
    vision = preset("openflamingo-9b").vision_config.to_dict()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 96, "image_size": 56}
    config.vision_config = InfiMMHDVisionConfig(**{**vision, **sizes, "initializer_range": 0.1})
    config.use_class_token, config.chat_format = False, "plain"
    return config


def test_open_flamingo_form(tmp_path):
    model = make_model(open_flamingo())
    processor = InfiMMHDProcessor.from_config(model.config, byte_tokenizer())
    seen = []
    model.resampler.register_forward_hook(lambda module, args, out: seen.append((args[0].shape, out.shape)))
    inputs = processor(text=["<image>Output: a<|endofchunk|><image>Output:"], images=[[noise(1), noise(2)]])
    with torch.no_grad():
        logits = model(**inputs).logits
    assert seen == [((2, 16, 64), (2, 16, 64))], "patches without the class token, then the latents"
    assert [block.attn_gate.numel() for block in model.gated_blocks] == [1, 1]
    naive = copy.deepcopy(model)
    naive.set_backend("reference")
    with torch.no_grad():
        torch.testing.assert_close(naive(**inputs).logits, logits, **CLOSE)
    model.save_pretrained(tmp_path)
    loaded = InfiMMHDForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, logits)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Output:"}]}]
    turns += [{"role": "assistant", "content": " a dog"}, turns[0]]
    assert processor.apply_chat_template(turns) == "<image>Output: a dog<|endofchunk|><image>Output:"


def test_a_checkpoint_without_a_resampler_gets_a_fresh_one(model, tmp_path):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("resampler.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fresh = InfiMMHDForConditionalGeneration.from_pretrained(tmp_path).resampler
    assert fresh.latents.std().item() == pytest.approx(1.0, rel=0.1)
    assert (fresh.norm.weight == 1).all()


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"resampler_layers": -1}, "resampler_layers=-1"),
        ({"image_fit": "crop", "max_grid": 2}, "image_fit='crop'"),
        ({"chat_format": "opera"}, "chat_format='opera'"),
    ),
)
def test_bad_values_are_refused(changes, message):
    config = preset("tiny-zephyr").to_dict()
    with pytest.raises(ConfigurationError, match=message):
        type(preset("tiny-zephyr")).from_dict({**config, **changes})
