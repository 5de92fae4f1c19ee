"""The exporters. Each lives in its own folder, `infimm_fast.export.<target>`; this facade re-exports them.

Names load on first use: importing this loads no ``onnx``, no ``onnxruntime`` and no model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module that defines it.
_PUBLIC = {
    "Backend": "common.runner",
    "Case": "common.cases",
    "ExportError": "common.errors",
    "ExportedModel": "common.runner",
    "ExportedModule": "common.runner",
    "Family": "common.family",
    "GenerativeModel": "common.generation",
    "GraphSpec": "common.spec",
    "Opening": "runtime.providers",
    "TensorSpec": "common.spec",
    "VerificationError": "common.errors",
    "export_aoti": "to_aoti.export",
    "export_kernels": "to_kernels.export",
    "export_module_onnx": "to_onnx.module",
    "export_onnx": "to_onnx.export",
    "export_tensorrt": "to_tensorrt.export",
    "load": "runtime.loading",
    "measure_vision_activations": "to_tensorrt.export",
    "register_family": "common.family",
    "register_provider": "runtime.providers",
    "verify_files": "common.artifact",
}

# What the extra [onnx] installs.
_EXTRA = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from infimm_fast.export.common.artifact import verify_files as verify_files
    from infimm_fast.export.common.cases import Case as Case
    from infimm_fast.export.common.errors import ExportError as ExportError
    from infimm_fast.export.common.errors import VerificationError as VerificationError
    from infimm_fast.export.common.family import Family as Family
    from infimm_fast.export.common.family import register_family as register_family
    from infimm_fast.export.common.generation import GenerativeModel as GenerativeModel
    from infimm_fast.export.common.runner import Backend as Backend
    from infimm_fast.export.common.runner import ExportedModel as ExportedModel
    from infimm_fast.export.common.runner import ExportedModule as ExportedModule
    from infimm_fast.export.common.spec import GraphSpec as GraphSpec
    from infimm_fast.export.common.spec import TensorSpec as TensorSpec
    from infimm_fast.export.runtime.loading import load as load
    from infimm_fast.export.runtime.providers import Opening as Opening
    from infimm_fast.export.runtime.providers import register_provider as register_provider
    from infimm_fast.export.to_aoti.export import export_aoti as export_aoti
    from infimm_fast.export.to_kernels.export import export_kernels as export_kernels
    from infimm_fast.export.to_onnx.export import export_onnx as export_onnx
    from infimm_fast.export.to_onnx.module import export_module_onnx as export_module_onnx
    from infimm_fast.export.to_tensorrt.export import export_tensorrt as export_tensorrt
    from infimm_fast.export.to_tensorrt.export import measure_vision_activations as measure_vision_activations


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'infimm_fast.export' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"infimm_fast.export.{_PUBLIC[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        from infimm_fast.export.common.errors import ExportError

        raise ExportError(f"{name} needs the package {error.name}; pip install 'infimm-fast[onnx]'") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
