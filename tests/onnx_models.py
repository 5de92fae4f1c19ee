"""The models that the tests of exporters share."""

import torch

from infimm_fast import InfiMMHDForConditionalGeneration, preset


def make_config(**changes):
    """The tiny preset with one vision layer and one gated decoder layer."""
    config = preset("tiny")
    config.vision_config.num_hidden_layers = 1
    config.text_config.num_hidden_layers = 1
    config.cross_attention_every_n_layers = 1
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def make_model(config):
    torch.manual_seed(0)
    model = InfiMMHDForConditionalGeneration(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model
