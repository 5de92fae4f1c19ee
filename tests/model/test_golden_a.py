"""Golden case A: the whole model against the authors' code."""

import json
import re

import pytest
import torch

import golden
from infimm_fast import InfiMMHDForConditionalGeneration, VisualContext, convert_checkpoint, optimize

RUNS = ("mixed", "textonly_row", "right_pad", "left_pad")
BACKENDS = ("sdpa", "reference", "fused")


@pytest.fixture(scope="module", params=BACKENDS)
def model(request):
    if request.param == "fused":
        return optimize(golden.model_a("sdpa"), fold=False)
    return golden.model_a(request.param)


@pytest.fixture(scope="module")
def folded_model():
    return optimize(golden.model_a("sdpa").requires_grad_(False))


def forward(model, run, **kwargs):
    data = golden.tensors("case_a_forward")
    return model(
        input_ids=data[f"{run}.input_ids"],
        attention_mask=data[f"{run}.attention_mask"],
        labels=data[f"{run}.labels"],
        pixel_values=golden.images_a(),
        image_counts=torch.tensor([2, 2]),
        **kwargs,
    )


@torch.no_grad()
def test_vision_features(model):
    data, tower = golden.tensors("case_a_forward"), model.vision_tower
    images = golden.images_a()
    golden.assert_close(tower(images, 0), data["vision.embed"], golden.FORWARD, "embed")
    for layer in range(4):
        golden.assert_close(tower(images, layer + 1), data[f"vision.block.{layer}"], golden.FORWARD, f"block {layer}")
    features = tower(images)
    golden.assert_close(features, data["vision.all_features"], golden.FORWARD, "features")
    golden.assert_close(tower.pool(features), data["vision.pooled_head"], golden.FORWARD, "head")
    golden.assert_close(tower.norm(features)[:, 0], data["vision.pooled"], golden.FORWARD, "pooled")
    assert torch.equal(tower(images, -2), tower(images, 3))


@torch.no_grad()
@pytest.mark.parametrize("run", RUNS)
def test_gated_blocks_logits_and_loss(model, run):
    data = golden.tensors("case_a_forward")
    outputs = {}
    hooks = [
        block.register_forward_hook(lambda module, args, out, layer=layer: outputs.__setitem__(layer, out))
        for layer, block in zip(model.config.gated_layers, model.gated_blocks, strict=True)
    ]
    result = forward(model, run)
    for hook in hooks:
        hook.remove()
    real = data[f"{run}.attention_mask"].bool()
    for layer in (3, 7):
        golden.assert_close(
            outputs[layer][real], data[f"{run}.gated_block.{layer}"][real], golden.FORWARD, f"gated block {layer}"
        )
    golden.assert_close(result.logits[real], data[f"{run}.logits"][real], golden.FORWARD, "logits")
    assert abs(result.loss - data[f"{run}.loss"]) <= golden.LOSS * data[f"{run}.loss"]


@torch.no_grad()
@pytest.mark.parametrize("run", RUNS)
def test_folded_blocks(folded_model, run):
    test_gated_blocks_logits_and_loss(folded_model, run)


@torch.no_grad()
def test_decoder_layers(model):
    data = golden.tensors("case_a_forward")
    hidden_states = forward(model, "mixed", output_hidden_states=True).hidden_states
    for layer in range(7):  # the entry after the last layer is normed
        golden.assert_close(
            hidden_states[layer + 1], data[f"mixed.flamingo_layer.{layer}"], golden.FORWARD, f"layer {layer}"
        )


@torch.no_grad()
def test_epsilons_of_the_language_side(model):
    """Scaled-down weights expose a wrong epsilon of RMSNorm or of the gated LayerNorms."""
    data = golden.tensors("case_a_forward")
    small = re.compile(r"embed_tokens|o_proj|down_proj")  # the gated blocks' output projections included
    features = model.vision_tower(golden.images_a())
    original = {name: value.clone() for name, value in model.language_model.state_dict().items()}
    try:
        for name, parameter in model.language_model.named_parameters():
            if small.search(name):
                parameter.mul_(2**-9)
        context = context_from(model, features)
        result = model(
            input_ids=data["mixed.input_ids"],
            attention_mask=data["mixed.attention_mask"],
            labels=data["mixed.labels"],
            visual_context=context,
        )
    finally:
        model.language_model.load_state_dict(original)
    golden.assert_close(result.logits, data["eps_probe.mixed.logits"], golden.FORWARD, "logits")
    assert abs(result.loss - data["eps_probe.mixed.loss"]) <= golden.LOSS * data["eps_probe.mixed.loss"]


@torch.no_grad()
def test_epsilon_of_the_tower(model):
    data = golden.tensors("case_a_forward")
    original = {name: value.clone() for name, value in model.vision_tower.state_dict().items()}
    try:
        for name, parameter in model.vision_tower.named_parameters():
            if "attn.proj" in name or "mlp.fc2" in name:
                parameter.mul_(2**-8)
        features = model.vision_tower(golden.images_a())
    finally:
        model.vision_tower.load_state_dict(original)
    golden.assert_close(features, data["eps_probe.vision.all_features"], golden.FORWARD, "features")
    normed = model.vision_tower.norm(data["eps_probe.vision.final_norm.in"])
    golden.assert_close(normed, data["eps_probe.vision.final_norm.out"], golden.FORWARD, "final norm")


def context_from(model, features):
    """The context that `encode_images` makes, from features ``[4, 17, 224]`` given: two rows of two pictures."""
    packed = features.flatten(0, 1)
    key_values = None
    if model.config.backend != "reference":
        key_values = tuple(block.attn.project_visual(packed) for block in model.gated_blocks)
    return VisualContext(packed, torch.arange(5) * 17, torch.tensor([[0, 2], [2, 4]]), key_values)


def test_gradients(model):
    data, expected = golden.tensors("case_a_forward"), golden.tensors("case_a_grads")
    with torch.no_grad():
        features = model.vision_tower(golden.images_a())
    features.requires_grad_()
    model.zero_grad()
    loss = model(
        input_ids=data["mixed.input_ids"],
        attention_mask=data["mixed.attention_mask"],
        labels=data["mixed.labels"],
        visual_context=context_from(model, features),
    ).loss
    loss.backward()
    assert abs(loss.detach() - expected["loss"]) <= golden.LOSS * expected["loss"]
    golden.assert_close(features.grad, expected["grad.vision_features"], golden.GRADIENT_A, "vision features")
    parameters = {name: value for name, value in expected.items() if name not in ("loss", "grad.vision_features")}
    golden.check_parameter_gradients(dict(model.named_parameters()), parameters, "", 8, golden.GRADIENT_A)


@torch.no_grad()
@pytest.mark.parametrize(
    "run", ("gen_plain", "gen_eos", "gen_left_pad", "gen_textonly_row", "gen_no_image_token", "gen_one_image")
)
def test_greedy_tokens(model, run):
    data = golden.tensors("case_a_generate")
    images = data.get(f"{run}.images", golden.tensors("case_a_forward")["images"])
    result = model.generate(
        input_ids=data[f"{run}.input_ids"],
        attention_mask=data[f"{run}.attention_mask"],
        pixel_values=images.flatten(0, 2),
        image_counts=torch.tensor([images.shape[1]] * 2),
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=0,
        eos_token_id=int(data.get(f"{run}.eos_token_id", torch.tensor(300))),
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = data[f"{run}.sequences"]
    assert torch.equal(result.sequences, expected[:, : result.sequences.shape[1]])
    assert (expected[:, result.sequences.shape[1] :] == 0).all()
    golden.assert_close(result.logits[0], data[f"{run}.step_logits"][:, 0], golden.FORWARD, "first step")
    if run == "gen_plain":  # no row stops early
        golden.assert_close(torch.stack(result.logits, 1), data[f"{run}.step_logits"], golden.FORWARD, "all steps")


@torch.no_grad()
@pytest.mark.parametrize("run", ("gen_plain", "gen_left_pad", "gen_textonly_row"))
def test_greedy_tokens_with_folded_blocks(folded_model, run):
    test_greedy_tokens(folded_model, run)


@torch.no_grad()
def test_continuing_text_attends_the_last_image(model):
    """The authors' `cache_media`: text without image tokens after a prompt that is not in the cache."""
    data = golden.tensors("case_a_forward")
    prompt_counts = (data["cache_media.prompt_input_ids"] == model.config.image_token_id).sum(1)
    context = model.encode_images(golden.images_a(), image_counts=torch.tensor([2, 2])).limit_images(prompt_counts)
    logits = model(
        input_ids=data["cache_media.input_ids"], visual_context=context, images_seen=context.images_per_row
    ).logits
    golden.assert_close(logits, data["cache_media.logits"], golden.FORWARD, "logits")


@torch.no_grad()
def test_surplus_images_are_ignored_and_surplus_tokens_refused(model):
    data = golden.tensors("case_a_forward")
    ids, images = data["count_mismatch.input_ids"], golden.images_a()
    logits = model(input_ids=ids[:1], pixel_values=images[:2], image_counts=torch.tensor([2])).logits
    golden.assert_close(logits, data["count_mismatch.logits"][:1], golden.FORWARD, "row with a surplus image")
    with pytest.raises(ValueError, match=r"3\] <image> tokens, but \[2\] images"):
        model(input_ids=ids[1:], pixel_values=images[2:], image_counts=torch.tensor([2]))
    with pytest.raises(ValueError, match=r"<image> tokens, but"):
        model.generate(input_ids=ids[1:], pixel_values=images[2:], image_counts=torch.tensor([2]), max_new_tokens=2)


@torch.no_grad()
def test_official_checkpoint_converts_to_the_same_logits(tmp_path):
    torch.save(golden.official_state_dict_a(), tmp_path / "official.ckpt")
    convert_checkpoint(tmp_path / "official.ckpt", tmp_path / "model", golden.config_a())
    model = InfiMMHDForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    data = golden.tensors("case_a_forward")
    golden.assert_close(forward(model, "mixed").logits, data["mixed.logits"], golden.FORWARD, "logits")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"
