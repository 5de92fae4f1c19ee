"""Opens an artifact on a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infimm_fast.export.common.artifact import PROCESSOR, Progress, load_manifest, no_progress, verify_files
from infimm_fast.export.common.family import family_of_manifest
from infimm_fast.export.common.runner import ExportedModel, ExportedModule
from infimm_fast.export.runtime.providers import Opening, open_backend


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
            engines that `export_tensorrt` put into the folder; "aoti" for AOTInductor packages; or a name that was given
            to `register_provider`.
        verify: hash every file first, and refuse the folder if one was changed.
        device_id: index of the GPU.
        threads: threads of the CPU provider; None for ONNX Runtime's choice.
        provider_options: passed on to the provider; for engines and packages, further arguments of `TensorRTBackend`.
        progress: told about hashing.

    Returns:
        What the model's family makes of it: an `ExportedModel`, with ``generate``, ``stream`` and ``encode`` if it answers
        questions; or an `ExportedModule` to be called.

    Raises:
        ArtifactError: the folder is no artifact of this version, was changed, or is of a family that is not registered.
        ProviderError: the provider is missing, does not take the artifact's dtype, or could not be started.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    if verify:
        verify_files(folder, progress or no_progress)
    backend = open_backend(Opening(folder, manifest, provider, device_id, threads, dict(provider_options or {})))
    if manifest.kind == "module":
        return ExportedModule(manifest, backend)
    family = family_of_manifest(manifest)
    return family.runner(manifest, backend, family.load_processor(folder / PROCESSOR))
