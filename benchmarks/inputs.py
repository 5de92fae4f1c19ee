"""Random inputs, drawn on the device: what a large case needs would take longer to draw and copy than to time."""

from __future__ import annotations

import torch

OUTLIERS = 4


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Return unit-scale normal numbers of which a few are eight times as large, as activations of real towers are."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    index = torch.randint(values.numel(), (OUTLIERS,), generator=generator, device=device)
    values.view(-1)[index] *= 8
    return values


def spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` indices below `count`, evenly spread, first and last among them."""
    if count <= limit:
        return list(range(count))
    return [index * (count - 1) // (limit - 1) for index in range(limit)]
