"""Runs an artifact of AOTInductor packages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from infimm_fast.export.common.artifact import Manifest
from infimm_fast.export.common.errors import ArtifactError, ProviderError
from infimm_fast.export.common.runner import TorchValues


class AotiBackend(TorchValues):
    """The packages of an artifact, with the weights that they share.

    Args:
        folder: the artifact.
        manifest: its manifest.
        device_id: index of the GPU, for packages that were compiled for CUDA.

    Raises:
        ProviderError: the artifact was compiled for a device that is not here.
        ArtifactError: a package or the weights cannot be read.
    """

    def __init__(self, folder: Path, manifest: Manifest, device_id: int = 0):
        self._manifest = manifest
        self.device = _device_of(folder, manifest, device_id)
        weights = self._read_weights(folder / manifest.options["weights"])
        self._constants = {
            graph: {constant: weights[key] for constant, key in keys.items()}
            for graph, keys in manifest.options["constants"].items()
        }
        self._packages = {name: self._load(folder / manifest.graph_files[name], name) for name in manifest.graphs}

    def run(self, graph: str, inputs: Mapping[str, torch.Tensor], on_host: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """Run one graph; see `Backend`.

        Inputs must have been checked, as `ExportedModel.run` does: a package would read past its buffers' bounds or answer
        nonsense.
        """
        spec = self._manifest.graphs[graph]
        flat = [inputs[tensor.name].to(self.device).contiguous() for tensor in spec.inputs]
        with torch.no_grad():
            outputs = self._packages[graph](*spec.nest(flat))
        outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        return {
            tensor.name: value.to("cpu") if tensor.name in on_host else value
            for tensor, value in zip(spec.outputs, outputs, strict=True)
        }

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
