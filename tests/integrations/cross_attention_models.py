"""Tiny Idefics and Mllama models with several pictures in a batch; loaded by tests and by the interpreter's process."""

import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text, MllamaConfig, MllamaForConditionalGeneration

import infimm_fast
from infimm_fast.integrations.transformers_attention import register_attention

infimm_fast.register_auto()
for backend in ("sdpa", "reference", "triton"):
    register_attention(f"infimm_fast_{backend}", backend=backend)

ROWS, LENGTH, IMAGES, TILES = 3, 9, 3, 2
TOKENS = 5  # of a picture or tile: a class token and 2 x 2 patches


def idefics(implementation, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    vision = {"embed_dim": 24, "image_size": 28, "patch_size": 14, "num_attention_heads": 3, "num_hidden_layers": 1}
    config = IdeficsConfig(
        **{**sizes, **changes},
        vocab_size=60,
        additional_vocab_size=0,
        cross_layer_interval=1,
        qk_layer_norms=True,
        alpha_type="vector",
        use_resampler=False,
        vision_config={**vision, "intermediate_size": 32},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return _random(IdeficsForVisionText2Text, config, implementation)


def mllama(implementation):
    vision = {
        "hidden_size": 16,
        "attention_heads": 2,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "image_size": 28,
        "patch_size": 14,
        "max_num_tiles": TILES,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    text = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 3],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=59)
    return _random(MllamaForConditionalGeneration, config, implementation)


def _random(model_class, config, implementation):
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 + ("norm" in name) if parameter.dim() < 2 else noise * 0.3)
    return model


def visible_images(kind):
    """Pictures that each token sees, bool ``[ROWS, LENGTH, IMAGES]``."""
    mask = torch.zeros(ROWS, LENGTH, IMAGES, dtype=torch.bool)
    for image in range(IMAGES):
        mask[0, 2 + 2 * image : 4 + 2 * image, image] = True  # the latest picture; the last tokens see none
        mask[1, 1 + 3 * image :, image] = True  # all so far
    if kind == "hole":
        mask[0, -1] = torch.tensor([True, False, True])
    return mask  # the last row has no picture


def idefics_inputs(kind="intervals"):
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(2, 58, (ROWS, LENGTH), generator=generator),
        "pixel_values": torch.randn(ROWS, IMAGES, 3, 28, 28, generator=generator),
        "image_attention_mask": visible_images(kind).long(),
    }


def mllama_inputs(kind="intervals"):
    """Pictures of two tiles; of the first row's second picture only the first tile is used."""
    generator = torch.Generator().manual_seed(1)
    used = torch.ones(ROWS, IMAGES, TILES, dtype=torch.long)
    used[0, 1, 1] = 0
    if kind == "unused tiles":
        used[1, 0, 1] = 0  # in the middle of what the last tokens see
        kind = "intervals"
    return {
        "input_ids": torch.randint(2, 58, (ROWS, LENGTH), generator=generator),
        "pixel_values": torch.randn(ROWS, IMAGES, TILES, 3, 28, 28, generator=generator),
        "aspect_ratio_ids": torch.where(used[..., 1] == 1, 2, 1),
        "aspect_ratio_mask": used,
        "cross_attention_mask": visible_images(kind).long()[..., None] * used[:, None],
    }


FAMILIES = {"idefics": (idefics, idefics_inputs), "mllama": (mllama, mllama_inputs)}


def logits(family, implementation, kind="intervals"):
    """Logits of a forward pass without gradients; in the interpreter's process called by name."""
    build, inputs = FAMILIES[family]
    with torch.no_grad():
        return build(implementation)(**inputs(kind)).logits


def generated(family, implementation, tokens=3):
    """Generated tokens, and the logits of each step."""
    build, inputs = FAMILIES[family]
    out = build(implementation).generate(
        **inputs(), max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences, torch.stack(out.logits)
