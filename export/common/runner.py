"""Runs the graphs of an artifact, whatever runtime is behind it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch

from infimm_fast.export.common.artifact import Manifest
from infimm_fast.export.common.errors import ArtifactError, LimitError
from infimm_fast.export.common.spec import ALL_DTYPES


class Backend(Protocol):
    """A runtime that runs graphs. Its values are its own; only what is asked for becomes a tensor on the host."""

    def run(self, graph: str, inputs: Mapping[str, Any], on_host: Collection[str] = ()) -> dict[str, Any]:
        """Run a graph.

        Args:
            graph: its name.
            inputs: tensors on the host, or values of earlier runs.
            on_host: outputs that are copied to the host; the others stay where the runtime has them.
        """

    def zeros(self, dtype: str, shape: tuple[int, ...]) -> Any:
        """Return zeros."""

    def to_tensor(self, value: Any) -> torch.Tensor:
        """Return a value as a tensor on the host."""


class TorchValues:
    """The part of a `Backend` that is the same for all whose values are PyTorch's tensors."""

    device: torch.device

    def zeros(self, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return zeros on the device."""
        return torch.zeros(shape, dtype=ALL_DTYPES[dtype], device=self.device)

    def to_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Return a value as a tensor on the host."""
        return value.to("cpu")


class ExportedModel:
    """An exported model on a runtime.

    Made by `infimm_fast.export.load`. Families whose models generate text have a subclass.

    Args:
        manifest: of the artifact.
        backend: the runtime.
        processor: of the model; None for a folder without.
    """

    def __init__(self, manifest: Manifest, backend: Backend, processor: Any = None):
        self.manifest, self.backend = manifest, backend
        self._processor = processor

    @property
    def processor(self) -> Any:
        """What makes inputs out of pictures and text, and text out of tokens."""
        if self._processor is None:
            raise ArtifactError("the artifact has no processor; export it with one, or use generate_tokens")
        return self._processor

    def need(self, *graphs: str) -> None:
        """Raise `ArtifactError` unless the artifact has these graphs."""
        missing = [graph for graph in graphs if graph not in self.manifest.graphs]
        if missing:
            raise ArtifactError(
                f"the artifact has no {' and no '.join(missing)} graph; it has {', '.join(self.manifest.graphs)}"
            )

    def run(self, graph: str, inputs: Mapping[str, Any], on_host: Collection[str] = ()) -> dict[str, Any]:
        """Run a graph once its inputs were checked: runtimes check none, and some would read past a buffer's end.

        Args:
            graph: its name.
            inputs: tensors on the host, or values of earlier runs.
            on_host: outputs to copy to the host; the others stay where the runtime has them.

        Raises:
            ArtifactError: the artifact has no such graph.
            LimitError: an input does not fit the declaration, or lies outside the limits.
        """
        self.need(graph)
        spec = self.manifest.graphs[graph]
        spec.resolve_axes({name: _shape(value) for name, value in inputs.items()}, self.manifest.limits)
        for tensor in spec.inputs:
            value = inputs[tensor.name]
            if isinstance(value, torch.Tensor) and value.dtype != tensor.torch_dtype:
                raise LimitError(f"{tensor.name} is {value.dtype}; {graph} takes {tensor.torch_dtype}")
        return self.backend.run(graph, inputs, on_host)

    def compute(self, graph: str, **inputs: Any) -> dict[str, torch.Tensor]:
        """Run a graph on tensors, or values of earlier runs, and return all of its outputs as tensors on the host.

        Raises:
            ArtifactError: the artifact has no such graph.
            LimitError: an input does not fit the declaration, or lies outside the limits.
        """
        self.need(graph)
        outputs = self.run(graph, inputs, [tensor.name for tensor in self.manifest.graphs[graph].outputs])
        return {name: self.backend.to_tensor(value) for name, value in outputs.items()}


class ExportedModule:
    """A single exported module on a runtime.

    Args:
        manifest: of the artifact.
        backend: the runtime.
    """

    def __init__(self, manifest: Manifest, backend: Backend):
        self.manifest, self.backend = manifest, backend
        (self._name,) = manifest.graphs
        self._model = ExportedModel(manifest, backend)

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the module on tensors of the host, by its arguments' names; return its outputs by name.

        Raises:
            LimitError: an input is missing or does not fit the declaration.
        """
        return self._model.compute(self._name, **inputs)


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of a tensor, an array, or a value of ONNX Runtime, of which it is a method."""
    return tuple(value.shape() if callable(value.shape) else value.shape)
