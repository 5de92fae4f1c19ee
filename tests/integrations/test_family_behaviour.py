"""The model as other libraries use it: pipelines, streaming, Auto classes, accelerate, peft, quantised layers."""

import copy
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, TextIteratorStreamer, pipeline

import infimm_fast
from infimm_fast import InfiMMHDForConditionalGeneration, InfiMMHDProcessor, preset
from infimm_fast.models.infimm_hd.tokenization_bytes import byte_tokenizer

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def noise(seed, size=(90, 200)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=("tiny-zephyr", pytest.param("tiny", marks=pytest.mark.slow)))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    torch.manual_seed(0)
    return InfiMMHDForConditionalGeneration(preset(name)).eval()


@pytest.fixture(scope="module")
def processor(name):
    return InfiMMHDProcessor.from_config(preset(name), byte_tokenizer())


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def user(*pictures, text="What is it?"):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}],
    }


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def encode(processor, chat):
    return processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


CHATS = (
    [user(noise(1))],
    [user(noise(2), noise(3), text="Which is larger?"), assistant("The second."), user(text="Sure?")],
    [user(noise(4), text="And this?"), assistant("A cat."), user(noise(5), noise(1), text="These two?")],
)


def test_pipeline_in_batches_of_two(model, processor):
    """Different numbers of pictures, turns and tiles in one batch give what each chat gives alone."""
    generator = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"generate_kwargs": GREEDY, "return_full_text": False}
    batched = generator(text=list(CHATS), batch_size=2, **options)
    assert len(batched) == 3
    for chat, records in zip(CHATS, batched, strict=True):
        inputs = encode(processor, chat)
        new = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
        assert records[0]["generated_text"] == processor.decode(new, skip_special_tokens=True)
    assert len({records[0]["generated_text"] for records in batched}) > 1


def test_pipeline_from_a_folder_with_text_and_picture(folder):
    infimm_fast.register_auto()
    generator = pipeline("image-text-to-text", model=str(folder))
    records = generator(images=noise(1), text="<image> what?", generate_kwargs=GREEDY)
    assert records[0]["input_text"] == "<image> what?" and records[0]["generated_text"].startswith("<image> what?")


def test_a_conversation_reuses_its_pictures(model, processor):
    """A second turn with a picture of its own: the context is extended, not encoded again."""
    first = [user(noise(1), noise(2))]
    inputs = encode(processor, first)
    context = model.encode_images(inputs["pixel_values"], inputs["image_grids"])
    answer = model.generate(inputs["input_ids"], visual_context=context, **GREEDY)
    text = processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    second = [*first, assistant(text), user(noise(3), text="And this?")]
    whole = encode(processor, second)
    new = processor.image_processor(noise(3))
    context = context.append(model.encode_images(new["pixel_values"], new["image_grids"]))
    assert torch.equal(
        model.generate(whole["input_ids"], visual_context=context, **GREEDY), model.generate(**whole, **GREEDY)
    )


def test_streaming_from_another_thread(model, processor):
    inputs = encode(processor, CHATS[1])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    expected = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert streamed == processor.decode(expected)


FRESH = """
import sys
import infimm_fast
infimm_fast.register_auto()
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": [{"type": "image", "image": sys.argv[2]}, {"type": "text", "text": "What?"}]}]
options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
inputs = processor.apply_chat_template(chat, **options)
print(model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0).tolist()[0])
"""


@pytest.mark.slow
def test_auto_classes_in_a_fresh_process(folder, model, processor, tmp_path):
    noise(1).save(tmp_path / "picture.png")
    command = [sys.executable, "-c", FRESH, str(folder), str(tmp_path / "picture.png")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    expected = model.generate(**encode(processor, [user(noise(1), text="What?")]), **GREEDY)
    assert result.stdout.splitlines()[-1] == str(expected[0].tolist())


@pytest.mark.parametrize("argument", ("dtype", "torch_dtype"))
def test_dtype_on_load(folder, argument, processor):
    model = AutoModelForImageTextToText.from_pretrained(folder, **{argument: torch.bfloat16})
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    inputs = encode(processor, CHATS[0])
    assert model(**inputs).logits.dtype == torch.bfloat16


def test_device_map(folder, model, processor):
    pytest.importorskip("accelerate")
    loaded = AutoModelForImageTextToText.from_pretrained(folder, device_map="auto")
    inputs = encode(processor, CHATS[1])
    assert torch.equal(loaded.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_device_map_with_parts_on_disk(folder, model, processor, tmp_path):
    """Hooks bring the weights in as each part runs; nothing may look at them earlier."""
    pytest.importorskip("accelerate")
    decoder = "language_model.model"
    layers = [f"{decoder}.layers.{index}" for index in range(model.config.text_config.num_hidden_layers)]
    on_disk = ["vision_tower", *layers[1::2], *(["resampler"] if model.resampler is not None else [])]
    in_memory = [*layers[::2], *(f"{decoder}.{part}" for part in ("embed_tokens", "norm", "rotary_emb"))]
    device_map = {**dict.fromkeys(on_disk, "disk"), **dict.fromkeys([*in_memory, "language_model.lm_head"], "cpu")}
    loaded = AutoModelForImageTextToText.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert loaded.gated_blocks[0].attn.kv_proj.weight.is_meta and loaded.vision_tower.norm.weight.is_meta
    inputs = encode(processor, CHATS[1])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, **CLOSE)
    assert torch.equal(loaded.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
def test_training_with_lora_and_gradient_checkpointing(model, processor):
    """Adapters on the language model and on the gated blocks: only they learn, and they do."""
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(model).train()
    base.gradient_checkpointing_enable()
    targets = r"language_model\..*\.(self_attn\.(q|v)_proj|gated_cross_attention\.(attn\.(q|kv|o)_proj|ff\.(up|down)_proj))"
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=targets)
    adapted = peft.get_peft_model(base, config)
    adapted.enable_input_require_grads()
    inputs = processor(text="<image> and <image>: which?", images=[noise(1, (60, 60)), noise(2, (60, 60))])
    trained = [value for value in adapted.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-2)
    losses = []
    for _ in range(4):
        loss = adapted(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        assert all(value.grad is not None for value in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    names = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert all("lora_" in name for name in names)
    assert any("gated_cross_attention.attn.kv_proj" in name for name in names) and any("self_attn" in name for name in names)
    adapted.eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, **CLOSE)
    assert torch.equal(merged.generate(**inputs, **GREEDY), adapted.generate(**inputs, **GREEDY))


@pytest.mark.parametrize(
    "target", ("gated_cross_attention.attn.q_proj", "gated_cross_attention.ff.down_proj"), ids=("attention", "feed-forward")
)
def test_folding_is_refused_by_name_under_lora(model, target):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=rf".*\.{target}"))
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    with pytest.raises(infimm_fast.errors.FoldError, match=rf"{target.split('.', 1)[1]} is a peft\..*Linear"):
        infimm_fast.optimize(adapted.base_model.model)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


class QuantisedLinear(nn.Linear):
    """As bitsandbytes has them: a subclass of Linear whose weight is no matrix of numbers to compute with."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantise(model):
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, QuantisedLinear(module))
    return model


@torch.no_grad()
def test_quantised_layers_are_left_alone(model, processor):
    quantised = quantise(copy.deepcopy(model))
    kept = {name: id(module) for name, module in quantised.named_modules() if isinstance(module, QuantisedLinear)}
    inputs = encode(processor, CHATS[1])
    logits = quantised(**inputs).logits
    quantised.set_backend("reference")
    torch.testing.assert_close(quantised(**inputs).logits, logits, **CLOSE)
    exact = model(**inputs).logits
    assert 0 < (logits - exact).abs().max() < 0.5 * exact.abs().max()
    assert {name: id(module) for name, module in quantised.named_modules() if isinstance(module, QuantisedLinear)} == kept
    with pytest.raises(infimm_fast.errors.FoldError, match="QuantisedLinear"):
        infimm_fast.optimize(quantised.requires_grad_(False))
