"""Inputs that graphs are tried with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from infimm_fast.export.common.errors import ExportError
from infimm_fast.export.common.spec import GraphSpec
from infimm_fast.kernels.common.numerics import outlier_normal


@dataclass(frozen=True)
class Case:
    """Inputs that a graph is tried with.

    Attributes:
        name: in the report.
        inputs: by name.
        compared: output name -> bool mask of the positions that matter; outputs that are not named matter everywhere.
    """

    name: str
    inputs: dict[str, torch.Tensor]
    compared: dict[str, torch.Tensor] = field(default_factory=dict)


def random_inputs(graph: GraphSpec, free: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Return unit-scale numbers with outliers for all floating-point inputs.

    Args:
        graph: the declaration.
        free: axis -> size.
        seed: the same one gives the same numbers.
    """
    floating = [tensor for tensor in graph.inputs if tensor.torch_dtype.is_floating_point]
    return {
        tensor.name: outlier_normal(*tensor.sizes(free), dtype=tensor.torch_dtype, seed=100 * seed + index)
        for index, tensor in enumerate(floating)
    }


def random_cases(graph: GraphSpec, sizes: Mapping[str, int]) -> list[Case]:
    """Return random inputs at the sizes given, with every free axis one longer, and with every free axis of size 1.

    Raises:
        ExportError: an input is no floating-point tensor, and what it may hold is not known here.
    """
    others = [tensor.name for tensor in graph.inputs if not tensor.torch_dtype.is_floating_point]
    if others:
        raise ExportError(f"{graph.name}: the family must declare cases, since {', '.join(others)} cannot be random numbers")
    tried = {
        "sample": dict(sizes),
        "one longer": {axis: size + 1 for axis, size in sizes.items()},
        "of size 1": dict.fromkeys(sizes, 1),
    }
    return [Case(name, random_inputs(graph, free, seed)) for seed, (name, free) in enumerate(tried.items())]
