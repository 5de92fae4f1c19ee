"""The weights that an export starts from."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def cast_model(model: nn.Module, dtype: torch.dtype) -> Any:
    """Return a model with its parameters in another dtype on the CPU; itself if they are."""
    if all(p.dtype == dtype and p.device.type == "cpu" for p in model.parameters()):
        return model
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        is_weight = isinstance(tensor, nn.Parameter)
        value = tensor.detach().to("cpu", dtype if is_weight and tensor.is_floating_point() else tensor.dtype)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_weight else value
    return copy.deepcopy(model, memo)


def checkpoint_names(model: nn.Module) -> dict[int, str]:
    """Return id of each tensor -> its name in the model, which is its name in a checkpoint."""
    named = [*model.named_buffers(), *model.named_parameters()]
    return {id(tensor): name for name, tensor in named}
