"""The table of providers: what runs an artifact's graphs, by name. A runtime's package is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infimm_fast.export.common.artifact import Manifest
from infimm_fast.export.common.errors import ExportError, ProviderError
from infimm_fast.export.common.runner import Backend


@dataclass(frozen=True)
class Opening:
    """An artifact that is to be opened on a provider.

    Attributes:
        folder: the artifact.
        manifest: its manifest.
        provider: the name that was asked for.
        device_id: index of the GPU.
        threads: threads on the CPU; None for the runtime's choice.
        options: the provider's own.
    """

    folder: Path
    manifest: Manifest
    provider: str
    device_id: int = 0
    threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


Factory = Callable[[Opening], Backend]


def _onnx_runtime(opening: Opening) -> Backend:
    from infimm_fast.export.to_onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(
        opening.folder,
        opening.manifest.graphs,
        opening.manifest.graph_files,
        opening.manifest.dtype,
        provider=opening.provider,
        device_id=opening.device_id,
        threads=opening.threads,
        provider_options=opening.options,
    )


def _tensorrt(opening: Opening) -> Backend:
    from infimm_fast.export.to_tensorrt.backend import TensorRTBackend

    flavor = opening.provider.removeprefix("tensorrt-")
    return TensorRTBackend(opening.folder, opening.manifest, flavor, opening.device_id, **opening.options)


def _aoti(opening: Opening) -> Backend:
    from infimm_fast.export.to_aoti.backend import AotiBackend

    return AotiBackend(opening.folder, opening.manifest, opening.device_id, **opening.options)


# Provider -> (what makes its backend, the target of the artifacts that it runs).
_PROVIDERS: dict[str, tuple[Factory, str]] = {
    "cpu": (_onnx_runtime, "onnx"),
    "cuda": (_onnx_runtime, "onnx"),
    "ort-tensorrt": (_onnx_runtime, "onnx"),
    "ort-tensorrt-rtx": (_onnx_runtime, "onnx"),
    "tensorrt": (_tensorrt, "onnx"),
    "tensorrt-rtx": (_tensorrt, "onnx"),
    "aoti": (_aoti, "aoti"),
}


def register_provider(name: str, factory: Factory, *, target: str = "onnx") -> None:
    """Make a provider known to `infimm_fast.export.load` under a new name.

    Args:
        name: what ``load(folder, provider=name)`` asks for.
        factory: makes a `Backend` of an `Opening`; raises `ProviderError` if it cannot.
        target: of the artifacts that it runs, "onnx" or "aoti".

    Raises:
        ExportError: the name is taken.
    """
    if name in _PROVIDERS:
        raise ExportError(f"there is a provider {name!r} already; choose another name")
    _PROVIDERS[name] = (factory, target)


def open_backend(opening: Opening) -> Backend:
    """Return an artifact's graphs on a provider.

    Raises:
        ProviderError: the provider is not known, does not take the artifact, or could not be started.
        ArtifactError: a file cannot be read.
    """
    if opening.provider not in _PROVIDERS:
        raise ProviderError(f"provider={opening.provider!r} is not known; choose one of {', '.join(_PROVIDERS)}")
    factory, target = _PROVIDERS[opening.provider]
    made = opening.manifest.target
    if made != target:
        accepted = ", ".join(repr(name) for name, (_, takes) in _PROVIDERS.items() if takes == made)
        raise ProviderError(
            f"{opening.folder} is an artifact for {made}, which provider={opening.provider!r} does not run; use {accepted}"
        )
    return factory(opening)
