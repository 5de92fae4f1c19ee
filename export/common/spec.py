"""What an exporter knows of a model: its graphs, with the names, dtypes and axes of their inputs and outputs.

Shapes are written with numbers for fixed sizes and names for free axes. Inputs whose names share the part before a dot
(``past.0.key``, ``past.0.value``) reach the graph's module as one list.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infimm_fast.dtypes import DTYPES
from infimm_fast.export.common.errors import ExportError, LimitError

ALL_DTYPES = DTYPES | {"int64": torch.int64, "bool": torch.bool}

# ONNX's numbers of them.
ONNX_TYPES = {"float32": 1, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}

# Free axis -> (smallest, largest) size.
AxisLimits = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: in the graph.
        dtype: "float32", "float16", "bfloat16", "int64" or "bool".
        shape: sizes of fixed axes, names of free ones.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch's."""
        return ALL_DTYPES[self.dtype]

    @property
    def free_axes(self) -> dict[int, str]:
        """Axis -> name of every free axis."""
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}

    def sizes(self, free: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with numbers in place of the free axes' names."""
        return tuple(free[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class GraphSpec:
    """One graph: a module's inputs in the order of its arguments, and its outputs.

    Attributes:
        name: of the graph and of its file.
        inputs: flat, in order.
        outputs: flat, in order.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __iter__(self) -> Iterator[TensorSpec]:
        """Iterate over inputs and outputs."""
        yield from self.inputs
        yield from self.outputs

    @property
    def free_axes(self) -> list[str]:
        """Names of the inputs' free axes, sorted."""
        return sorted({axis for tensor in self.inputs for axis in tensor.free_axes.values()})

    def nest(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """Return the flat inputs (tensors, or anything that stands for one) as the arguments of the graph's module."""
        named = zip((tensor.name.partition(".") for tensor in self.inputs), flat, strict=True)
        arguments: list[Any] = []
        for (_, dot), group in itertools.groupby(named, key=lambda pair: pair[0][:2]):
            values = [value for _, value in group]
            arguments.append(values if dot else values[0])
        return tuple(arguments)

    def resolve_axes(self, shapes: Mapping[str, tuple[int, ...]], limits: AxisLimits) -> dict[str, int]:
        """Return the size of every free axis in the shapes of actual inputs.

        Args:
            shapes: input name -> shape.
            limits: free axis -> (smallest, largest) size; axes that are not named have no limit.

        Raises:
            LimitError: an input is missing, has another shape, disagrees with another input, or lies outside the limits.
        """
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name not in shapes:
                raise LimitError(f"{self.name} needs the input {spec.name}; given are {', '.join(shapes) or 'none'}")
            shape = tuple(shapes[spec.name])
            fits = len(shape) == len(spec.shape) and all(
                have == (sizes.setdefault(want, have) if isinstance(want, str) else want)
                for have, want in zip(shape, spec.shape, strict=True)
            )
            if not fits:
                known = {axis: sizes[axis] for axis in spec.free_axes.values() if axis in sizes}
                raise LimitError(f"{spec.name} has shape {list(shape)}; {self.name} takes {list(spec.shape)} with {known}")
        for axis, size in sizes.items():
            smallest, largest = limits.get(axis, (0, size))
            if not smallest <= size <= largest:
                raise LimitError(f"{axis} is {size}; this artifact takes {smallest} to {largest}")
        return sizes


def check_dtype(dtype: str) -> None:
    """Raise `ExportError` unless a dtype's name is known."""
    if dtype not in DTYPES:
        raise ExportError(f"dtype={dtype!r} is not accepted; choose one of {', '.join(DTYPES)}")
