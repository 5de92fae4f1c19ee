"""Opens an artifact on a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from infimm_fast.export.common.artifact import PROCESSOR, Manifest, Progress, load_manifest, no_progress, verify_files
from infimm_fast.export.common.errors import ProviderError
from infimm_fast.export.common.runner import Backend, ExportedModel
from infimm_fast.export.common.source import load_processor


class ExportedModule:
    """A single exported module on a runtime.

    Args:
        manifest: of the artifact.
        backend: the runtime.
    """

    def __init__(self, manifest: Manifest, backend: Backend):
        self.manifest, self.backend = manifest, backend
        (self._name,) = manifest.graphs

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the module on tensors of the host, by its arguments' names; return its outputs by name.

        Raises:
            LimitError: an input is missing or does not fit the declaration.
        """
        graph = self.manifest.graphs[self._name]
        graph.resolve_axes({name: tuple(tensor.shape) for name, tensor in inputs.items()}, self.manifest.limits)
        outputs = self.backend.run(self._name, inputs, [tensor.name for tensor in graph.outputs])
        return {name: self.backend.to_tensor(value) for name, value in outputs.items()}


def load(
    folder: str | Path,
    provider: str = "cpu",
    *,
    verify: bool = False,
    device_id: int = 0,
    threads: int | None = None,
    provider_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ExportedModel | ExportedModule:
    """Open an artifact on a runtime.

    Args:
        folder: what `export_onnx`, `export_module_onnx` or `export_aoti` made.
        provider: "cpu", "cuda", "ort-tensorrt" or "ort-tensorrt-rtx" for ONNX Runtime; "tensorrt" or "tensorrt-rtx" for the
            engines that `export_tensorrt` put into the folder; "aoti" for AOTInductor packages.
        verify: hash every file first, and refuse the folder if one was changed.
        device_id: index of the GPU.
        threads: threads of the CPU provider; None for ONNX Runtime's choice.
        provider_options: passed on to the provider; for engines and packages, further arguments of `TensorRTBackend`.
        progress: told about hashing.

    Returns:
        An `ExportedModel` with ``generate``, ``stream`` and ``encode``, or an `ExportedModule` to be called.

    Raises:
        ArtifactError: the folder is no artifact of this version, or was changed.
        ProviderError: the provider is missing, does not take the artifact's dtype, or could not be started.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    if verify:
        verify_files(folder, progress or no_progress)
    backend = _make_backend(folder, manifest, provider, device_id, threads, dict(provider_options or {}))
    if manifest.kind == "module":
        return ExportedModule(manifest, backend)
    return ExportedModel(manifest, backend, load_processor(folder / PROCESSOR))


def _make_backend(
    folder: Path, manifest: Manifest, provider: str, device_id: int, threads: int | None, options: dict[str, Any]
) -> Backend:
    if provider == "aoti":
        from infimm_fast.export.to_aoti.backend import AotiBackend

        return AotiBackend(folder, manifest, device_id, **options)
    if manifest.target == "aoti":
        raise ProviderError(f"{folder} holds AOTInductor packages, which provider={provider!r} does not run; use 'aoti'")
    if provider in ("tensorrt", "tensorrt-rtx"):
        from infimm_fast.export.to_tensorrt.backend import TensorRTBackend

        flavor = provider.removeprefix("tensorrt-")
        return TensorRTBackend(folder, manifest, flavor, device_id, **options)
    from infimm_fast.export.to_onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(
        folder, manifest.graphs, manifest.graph_files, manifest.dtype, provider, device_id, threads, options
    )
