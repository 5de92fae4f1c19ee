"""`optimize` and `restore` on whole models."""

import copy

import pytest
import torch
from torch import nn

from infimm_fast import FusedGatedCrossAttentionBlock, GatedCrossAttentionBlock, optimize, restore
from infimm_fast.errors import ConfigurationError, FoldError


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model).requires_grad_(False)


@pytest.fixture(scope="module")
def inputs(processor, pictures):
    return processor(text=["<image>What?", "No picture.", "<image> and <image>"], images=[pictures[:1], [], pictures[1:3]])


@pytest.mark.parametrize("fold", (True, False))
def test_same_logits_and_tokens_and_back_again(model, inputs, fold):
    expected = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    names = list(model.state_dict())
    assert optimize(model, fold=fold) is model
    assert all(type(block) is FusedGatedCrossAttentionBlock for block in model.gated_blocks)
    assert all((block.folded is not None) == fold for block in model.gated_blocks)
    assert model.config.backend == "auto" and list(model.state_dict()) == names
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)
    assert restore(model) is model
    assert all(type(block) is GatedCrossAttentionBlock for block in model.gated_blocks)
    assert model.config.backend == "sdpa" and model.gated_blocks[0].attn.backend == "sdpa"
    assert torch.equal(model(**inputs).logits, expected)


def test_twice_is_once(model, inputs):
    expected = model(**inputs).logits
    optimize(optimize(model), fold=False)
    assert all(block.folded is None for block in model.gated_blocks)
    assert torch.equal(restore(restore(model))(**inputs).logits, expected)


def test_saving_an_optimized_model(model, inputs, tmp_path):
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    optimize(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_training(model, inputs):
    labels = inputs["input_ids"].clone()
    model.requires_grad_(True)
    model(**inputs, labels=labels).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    optimize(model, fold=False)
    model.gradient_checkpointing_enable()
    model.train()(**inputs, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.pop(name), atol=1e-5, rtol=1e-3)
    assert not expected


def test_a_model_that_cannot_be_folded_stays_as_it_was(model):
    model.gated_blocks[1].ff_gate.requires_grad_(True)
    with pytest.raises(FoldError, match=r"in language_model\.model\.layers\.7\.gated.*: ff_gate requires grad"):
        optimize(model)
    assert all(type(block) is GatedCrossAttentionBlock for block in model.gated_blocks)


def test_a_tie_across_the_model_is_found(model):
    first, second = model.gated_blocks
    second.attn.o_proj.weight = first.attn.o_proj.weight
    with pytest.raises(FoldError, match=r"tied: it is language.*layers\.3\.gated_.* and language.*layers\.7"):
        optimize(model)


def test_bad_arguments(model):
    with pytest.raises(FoldError, match="Linear has no GatedCrossAttentionBlock"):
        optimize(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="backend='fast' is not accepted"):
        optimize(model, backend="fast")
