"""Golden case C: one gated cross-attention block in every mask mode."""

import pytest
import torch

import golden
from infimm_fast import FusedGatedCrossAttentionBlock, GatedCrossAttentionBlock, VisualContext
from infimm_fast.models.infimm_hd.visual_context import count_images

PREFIX = "lang_encoder.model.layers.0.gated_cross_attn_layer."
BACKENDS = ("sdpa", "reference", "fused")


def load_block(backend):
    """Make the block; "fused" and "folded" name the fused one, on the backend after a colon or the default one."""
    kind, _, backend = backend.partition(":")
    block = (FusedGatedCrossAttentionBlock if kind in ("fused", "folded") else GatedCrossAttentionBlock)(256, 224)
    weights = golden.renamed(golden.tensors("case_c_weights"), PREFIX)
    block.load_state_dict({name.partition("gated_cross_attention.")[2]: value for name, value in weights.items()})
    if kind == "folded":
        block.requires_grad_(False).fold()
    block.attn.backend = backend or {"fused": "auto", "folded": "auto"}.get(kind, kind)
    return block


def run_block(block, mode, x, media, locations):
    """Run a mode of manifest.json; ``locations`` may be None for 'no image tokens known: everything is visible'."""
    settings = {**golden.manifest()["case_c"]["modes"], **golden.manifest()["case_c"]["steps"]}[mode]
    rows, images, tokens, width = media.shape
    context = VisualContext(
        features=media.reshape(-1, width),
        image_offsets=torch.arange(rows * images + 1) * tokens,
        row_images=torch.stack((torch.arange(rows), torch.arange(rows) + 1), 1) * images,
    )
    only_immediate = settings["only_attend_immediate_media"]
    if locations is None:
        so_far, only_immediate = torch.full((rows, x.shape[1]), images), False
    else:
        context = context.limit_images(locations.sum(1))
        so_far = count_images(locations)
        if settings["use_cached_media"]:  # every token stands after the row's last image token
            so_far = so_far[:, -1:].expand(rows, x.shape[1])
    kv_range = context.kv_range(so_far, only_immediate)
    return block(x, kv_range, context.images_per_row > 0, context.features)


def load_mode(mode):
    name = golden.manifest()["case_c"]["modes"].get(mode, golden.manifest()["case_c"]["steps"].get(mode))
    return (
        golden.tensors("case_c_forward")[f"media_locations_{name['media_locations']}"] if name["media_locations"] else None
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ("imm_L1", "imm_cached_L1", "all_cached_L1", "none_cached"))
def test_outputs_and_gradients(mode, backend):
    data, block = golden.tensors("case_c_forward"), load_block(backend)
    x, media = data["x"].clone().requires_grad_(), data["media"].clone().requires_grad_()
    out = run_block(block, mode, x, media, load_mode(mode))
    golden.assert_close(out.detach(), data[f"{mode}.out"], golden.FORWARD, mode)
    (out * data["w"]).sum().backward()
    expected = {
        name.removeprefix(f"{mode}."): value
        for name, value in golden.tensors("case_c_grads").items()
        if name.startswith(f"{mode}.grad")
    }
    golden.assert_close(x.grad, expected.pop("grad.x"), golden.GRADIENT_C, "x")
    golden.assert_close(media.grad, expected.pop("grad.media"), golden.GRADIENT_C, "media")
    golden.check_parameter_gradients(dict(block.named_parameters()), expected, PREFIX, 4, golden.GRADIENT_C)


@torch.no_grad()
@pytest.mark.parametrize("backend", (*BACKENDS, "folded"))
@pytest.mark.parametrize("mode", ("all_L1", "all_L2", "imm_L2"))
def test_outputs_of_tokens_that_no_quirk_touches(mode, backend):
    """The authors let text before the first image (all previous) or after a surplus token (immediate) see everything."""
    data, locations = golden.tensors("case_c_forward"), load_mode(mode)
    out = run_block(load_block(backend), mode, data["x"], data["media"], locations)
    count = locations.cumsum(1)
    comparable = (count > 0) | (locations.sum(1) == 0)[:, None] if mode.startswith("all") else count <= 3
    assert comparable.float().mean() > 0.5
    golden.assert_close(out[comparable], data[f"{mode}.out"][comparable], golden.FORWARD, mode)


@torch.no_grad()
@pytest.mark.parametrize("backend", (*BACKENDS, "folded"))
@pytest.mark.parametrize("mode", ("step_imm_cached_L1", "step_all_cached_L1", "step_imm_cached_L2", "step_all_cached_L2"))
def test_single_token_steps(mode, backend):
    data, locations = golden.tensors("case_c_forward"), load_mode(mode)
    out = run_block(load_block(backend), mode, data["x_step"], data["media"], locations)
    rows = slice(1, None) if mode == "step_imm_cached_L2" else slice(None)  # row 0 has a surplus token there
    golden.assert_close(out[rows], data[f"{mode}.out"][rows], golden.FORWARD, mode)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_output_before_the_gate(backend):
    data, block = golden.tensors("case_c_forward"), load_block(backend)
    captured = []
    block.attn.register_forward_hook(lambda module, args, out: captured.append(out))
    run_block(block, "imm_L1", data["x"], data["media"], load_mode("imm_L1"))
    with_image = load_mode("imm_L1").any(1)
    golden.assert_close(captured[0][with_image], data["imm_L1.attn_out"][with_image], golden.FORWARD, "attention")
    assert (captured[0][0, :5] == 0).all(), "text before the first image attends to nothing"


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_epsilon(backend):
    data, block = golden.tensors("case_c_forward"), load_block(backend)
    block.attn.o_proj.weight.mul_(2**-9)
    out = run_block(block, "imm_L1", data["x"] * 2**-9, data["media"], load_mode("imm_L1"))
    golden.assert_close(out, data["eps_probe.out"], golden.FORWARD, "out")


@torch.no_grad()
@pytest.mark.parametrize("mutation", ("attn_gate", "ff_gate", "scale", "interval", "swapped_heads", "flag"))
def test_the_comparison_sees_mutations(mutation, monkeypatch):
    """A comparison that passes on a broken block would prove nothing."""
    data, block, locations = golden.tensors("case_c_forward"), load_block("sdpa"), load_mode("imm_L1")
    if mutation.endswith("gate"):
        getattr(block, mutation).zero_()
    elif mutation == "scale":
        block.attn.q_proj.weight.mul_(1.01)
    elif mutation == "interval":
        locations = locations.roll(1, dims=1)
    elif mutation == "swapped_heads":
        weight = block.attn.q_proj.weight.view(12, 64, 256)
        weight[[0, 1]] = weight[[1, 0]].clone()
    else:
        monkeypatch.setattr(VisualContext, "images_per_row", property(lambda self: torch.full((3,), 3)))
    out = run_block(block, "imm_L1", data["x"], data["media"], locations)
    with pytest.raises(AssertionError):
        golden.assert_close(out, data["imm_L1.out"], golden.FORWARD, mutation)
