"""A SigLIP vision tower from Transformers on infimm_fast's attention: forward, backward, and back again.

Run it with ``python examples/siglip_tower.py``. Random weights, so that nothing is downloaded; with real ones pass a
checkpoint's name to ``SiglipVisionModel.from_pretrained(name, attn_implementation="infimm_fast")``.
"""

from __future__ import annotations

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

import infimm_fast


def features_and_gradient(tower: SiglipVisionModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tower's features and the gradient of their mean cube at the pixels."""
    pixels = pixels.clone().requires_grad_()
    features = tower(pixel_values=pixels).last_hidden_state
    features.pow(3).mean().backward()
    return features.detach(), pixels.grad


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    """Compare our attention with Transformers' eager one, then leave the model as it was."""
    infimm_fast.register_auto()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # The head dim of SigLIP-so400m, 72, and an odd number of patches; narrower and shallower than the real tower.
    config = SiglipVisionConfig(
        hidden_size=288,
        intermediate_size=576,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=98,
        patch_size=14,
        initializer_range=0.1,
    )
    tower = SiglipVisionModel._from_config(config, attn_implementation="eager").to(device)
    pixels = torch.randn(5, 3, 98, 98, device=device)

    expected = features_and_gradient(tower, pixels)
    tower.set_attn_implementation("infimm_fast")
    ours = features_and_gradient(tower, pixels)
    tower.set_attn_implementation("eager")
    again = features_and_gradient(tower, pixels)

    print(f"head dim {config.hidden_size // config.num_attention_heads}, {expected[0].shape[1]} tokens, on {device}")
    for name, actual, wanted in zip(("features", "gradient"), ours, expected, strict=True):
        difference = largest_difference(actual, wanted)
        print(f"{name}: largest difference from eager {difference:.1e}")
        if difference > 1e-4:
            raise SystemExit(f"the {name} differ by {difference:.1e}, more than 1e-4")
    if not all(largest_difference(actual, wanted) < 1e-6 for actual, wanted in zip(again, expected, strict=True)):
        raise SystemExit("the tower is not what it was")
    print("back on eager: as before")


if __name__ == "__main__":
    main()
