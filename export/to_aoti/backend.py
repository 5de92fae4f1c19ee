"""Runs an artifact of AOTInductor packages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from infimm_fast.export.common.artifact import Manifest
from infimm_fast.export.common.errors import ArtifactError, LimitError, ProviderError
from infimm_fast.export.common.graphs import nest_inputs
from infimm_fast.export.common.spec import ALL_DTYPES


class AotiBackend:
    """The packages of an artifact, with the weights that they share.

    Args:
        folder: the artifact.
        manifest: its manifest.
        device_id: index of the GPU, for packages that were compiled for CUDA.

    Raises:
        ProviderError: the artifact is of another target, or was compiled for a device that is not here.
        ArtifactError: a package or the weights cannot be read.
    """

    def __init__(self, folder: Path, manifest: Manifest, device_id: int = 0):
        if manifest.target != "aoti":
            raise ProviderError(
                f"{folder} is an artifact for {manifest.target}; provider='aoti' takes what export_aoti made"
            )
        self._manifest = manifest
        self._layers = int(manifest.config["text_config"]["num_hidden_layers"])
        self.device = _device_of(folder, manifest, device_id)
        weights = self._read_weights(folder / manifest.options["weights"])
        self._constants = {
            graph: {constant: weights[key] for constant, key in keys.items()}
            for graph, keys in manifest.options["constants"].items()
        }
        self._packages = {name: self._load(folder / manifest.graph_files[name], name) for name in manifest.graphs}

    def run(self, graph: str, inputs: Mapping[str, torch.Tensor], on_host: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """Run one graph.

        Args:
            graph: its name.
            inputs: tensors on the host, or outputs of earlier runs.
            on_host: outputs that are copied to the host; the others stay on the device.

        Raises:
            LimitError: an input does not fit the declaration, or lies outside the limits. A package would read past its
                buffers' bounds or answer nonsense, so this is checked at every call.
        """
        spec = self._manifest.graphs[graph]
        spec.resolve_axes({name: tuple(tensor.shape) for name, tensor in inputs.items()}, self._manifest.limits)
        for tensor in spec.inputs:
            if inputs[tensor.name].dtype != tensor.torch_dtype:
                raise LimitError(f"{tensor.name} is {inputs[tensor.name].dtype}; {graph} takes {tensor.torch_dtype}")
        flat = [inputs[tensor.name].to(self.device).contiguous() for tensor in spec.inputs]
        with torch.no_grad():
            outputs = self._packages[graph](*nest_inputs(graph, flat, self._layers))
        outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        return {
            tensor.name: value.to("cpu") if tensor.name in on_host else value
            for tensor, value in zip(spec.outputs, outputs, strict=True)
        }

    def zeros(self, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return zeros on the device."""
        return torch.zeros(shape, dtype=ALL_DTYPES[dtype], device=self.device)

    def to_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Return a value as a tensor on the host."""
        return value.to("cpu")

    def _read_weights(self, file: Path) -> dict[str, torch.Tensor]:
        try:
            with safe_open(file, framework="pt", device=str(self.device)) as weights:
                return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file} cannot be read: {error}") from error

    def _load(self, file: Path, graph: str) -> Any:
        """Load a package and give it its weights, which it uses in place."""
        try:
            package = torch._inductor.aoti_load_package(str(file), device_index=self.device.index or -1)
            package.load_constants(self._constants[graph], check_full_update=True, user_managed=True)
        except (RuntimeError, OSError, KeyError) as error:
            raise ArtifactError(f"{file} cannot be loaded: {str(error).splitlines()[0]}") from error
        return package


def _device_of(folder: Path, manifest: Manifest, device_id: int) -> torch.device:
    wanted = manifest.options["device"]
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ProviderError(f"{folder} was compiled for CUDA, and PyTorch sees no GPU here")
    major, minor = torch.cuda.get_device_capability(device_id)
    if manifest.options["sm"] != 10 * major + minor:
        raise ProviderError(f"{folder} was compiled for SM {manifest.options['sm']}; this GPU is SM {10 * major + minor}")
    return torch.device("cuda", device_id)
