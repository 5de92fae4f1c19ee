"""Transformers' own vision towers on our attention: the same features as with their eager attention."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import infimm_fast
from infimm_fast.integrations import transformers_attention
from infimm_fast.integrations.transformers_attention import register_attention

infimm_fast.register_auto()

SMALL = {
    "hidden_size": 144,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "initializer_range": 0.1,
}


def tower(kind, implementation, **changes):
    if kind == "clip":
        config, model_class = CLIPVisionConfig(**{**SMALL, "image_size": 56, **changes}), CLIPVisionModel
    elif kind == "siglip":
        config, model_class = SiglipVisionConfig(**{**SMALL, "image_size": 56, **changes}), SiglipVisionModel
    else:
        sizes = {"image_size": [56, 56], "patch_size": [14, 14]}
        config, model_class = InternVLVisionConfig(**{**SMALL, **sizes, **changes}), InternVLVisionModel
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation=implementation).eval()


def features(model, pixels):
    return model(pixel_values=pixels).last_hidden_state


@pytest.fixture(autouse=True)
def forget_warnings():
    transformers_attention._warn_once.cache_clear()


@pytest.mark.parametrize("kind", ("clip", "siglip", "internvl"))
def test_towers_give_the_same_features_and_gradients(kind):
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for implementation in ("eager", "infimm_fast"):
            model = tower(kind, implementation)
            assert model.config._attn_implementation == implementation
            out = features(model, pixels)
            out.pow(3).mean().backward()
            results.append((out.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    for expected, actual in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


IN_THE_INTERPRETER = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_transformers_attention import features, tower
from infimm_fast.integrations.transformers_attention import register_attention
register_attention("infimm_fast_triton", backend="triton")
pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    for kind in ("clip", "siglip", "internvl"):
        expected, actual = (features(tower(kind, name), pixels) for name in ("eager", "infimm_fast_triton"))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
print("same")
"""


def test_towers_on_the_triton_kernel_in_the_interpreter():
    code = IN_THE_INTERPRETER.format(folder=os.path.dirname(__file__))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0 and "same" in result.stdout, result.stderr


def test_the_tower_of_a_whole_model_alone():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**SMALL, "image_size": 56}).to_dict(),
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 100,
        },
        image_token_index=99,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation={"vision_config": "infimm_fast"})
    assert model.config.vision_config._attn_implementation == "infimm_fast"
    assert model.config.text_config._attn_implementation != "infimm_fast"


def test_causal_models_stay_causal():
    """CLIP's text tower has a causal mask: SDPA takes it, with one warning, and nothing sees the future."""
    config = CLIPTextConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    results = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for implementation in ("eager", "infimm_fast"):
            torch.manual_seed(0)
            model = CLIPTextModel._from_config(config, attn_implementation=implementation).eval()
            with torch.no_grad():
                results.append(model(torch.arange(1, 12)[None]).last_hidden_state)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    ours = [str(warning.message) for warning in caught if "infimm_fast" in str(warning.message)]
    assert len(ours) == 1 and "mask" in ours[0]


class Module(torch.nn.Module):
    is_causal = True  # as in Idefics' cross-attention, where it is wrong


@pytest.mark.parametrize("case", ("mask", "dropout", "cross", "foreign"))
def test_what_the_kernel_cannot_express_goes_to_sdpa_with_a_warning(case):
    q, k, v = torch.randn(3, 1, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    arguments, mask = {}, None
    if case == "mask":
        mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    elif case == "cross":
        k, v = k[:, :, :4], v[:, :, :4]
    elif case == "dropout":
        arguments["dropout"] = 1e-12
    else:
        arguments["position_bias"] = torch.zeros(1, 2, 6, 6)
    with pytest.warns(UserWarning, match="runs on SDPA"):
        out, weights = transformers_attention.attention_forward(Module(), q, k, v, mask, **arguments)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert weights is None


def test_is_causal_is_only_believed_as_an_argument():
    q, k, v = torch.randn(3, 1, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    full, _ = transformers_attention.attention_forward(Module(), q, k, v, None)
    causal, _ = transformers_attention.attention_forward(Module(), q, k, v, None, is_causal=True)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(full, sdpa(q, k, v).transpose(1, 2))
    torch.testing.assert_close(causal, sdpa(q, k, v, is_causal=True).transpose(1, 2))


def test_another_backend_under_another_name():
    register_attention("infimm_fast_reference", backend="reference")
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected, actual = (features(tower("siglip", name), pixels) for name in ("eager", "infimm_fast_reference"))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
