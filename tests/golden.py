"""The golden tensors of tests/data/golden, the models they belong to, and their tolerances."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from infimm_fast import InfiMMHDConfig, InfiMMHDForConditionalGeneration, InfiMMHDVisionConfig
from infimm_fast.models.infimm_hd.checkpoint import rename_key

FOLDER = Path(__file__).parent / "data" / "golden"

# manifest.json, "tolerance": largest deviation over the largest reference value.
FORWARD = 1e-5
LOSS = 2e-6
GRADIENT_A = 3e-5
GRADIENT_C = 5e-6


def tensors(name: str) -> dict[str, torch.Tensor]:
    """The tensors of one file, on torch's default device."""
    return _load(name, str(torch.get_default_device()))


@functools.cache
def _load(name: str, device: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.safetensors", device=device)


@functools.cache
def manifest() -> dict:
    return json.loads((FOLDER / "manifest.json").read_text())


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} != {list(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    deviation = ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    assert deviation <= tolerance, f"{what}: deviation {deviation:.3g} > {tolerance:.3g}"


def official_state_dict_a() -> dict[str, torch.Tensor]:
    """All 251 official keys of case A, in bfloat16."""
    keys = json.loads((FOLDER / "case_a_keys.json").read_text())
    state = dict(tensors("case_a_state_dict"))
    state.update({alias: state[name] for alias, name in keys["alias_of"].items()})
    assert sorted(state) == sorted(keys["keys"])
    return state


def renamed(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """A state dict in the model's names and float32; parts of one tensor are joined."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in state.items():
        target, part = rename_key(prefix + name)
        parts.setdefault(target, {})[part] = value.float()
    return {target: torch.cat([found[i] for i in sorted(found)]) for target, found in parts.items()}


def config_a() -> InfiMMHDConfig:
    case = manifest()["case_a"]
    return InfiMMHDConfig(
        vision_config=InfiMMHDVisionConfig(
            hidden_size=224,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=case["mlp_hidden"],
            image_size=56,
            projection_dim=32,
        ),
        text_config=LlamaConfig(**case["llama_config"]),
        image_token_id=case["config"]["image_token_id"],
        end_of_chunk_token_id=case["config"]["eoc_token_id"],
        use_subimage_position_embedding=False,
        max_grid=1,
    )


def model_a(backend: str) -> InfiMMHDForConditionalGeneration:
    model = InfiMMHDForConditionalGeneration(config_a()).eval()
    state = {name: value for name, value in renamed(tensors("case_a_state_dict")).items()}
    model.load_state_dict(state)
    model.set_backend(backend)
    return model


def images_a() -> torch.Tensor:
    """The four pictures of case A, two for each row: ``[4, 3, 56, 56]``."""
    return tensors("case_a_forward")["images"].flatten(0, 2)


def check_parameter_gradients(parameters, expected, prefix, projections, tolerance):
    """Compare full gradients and random projections of gradients (manifest.json, "projections") by official names."""
    for name, value in expected.items():
        kind, official = re.fullmatch(r"(grad|gradproj\.left|gradproj\.right)\.(.+)", name).groups()
        target = rename_key(prefix + official)[0].removeprefix(rename_key(prefix)[0] if prefix else "")
        gradient = parameters[target].grad.double()
        if kind != "grad":
            generator = torch.Generator("cpu").manual_seed(4242)
            right = torch.randn(gradient.shape[1], projections, generator=generator, device="cpu").to(gradient)
            left = torch.randn(projections, gradient.shape[0], generator=generator, device="cpu").to(gradient)
            gradient = left @ gradient if kind.endswith("left") else gradient @ right
        assert_close(gradient, value, tolerance, name)
