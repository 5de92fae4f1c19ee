"""Models and modules to ONNX."""

from infimm_fast.export.to_onnx.export import export_onnx
from infimm_fast.export.to_onnx.module import export_module_onnx

__all__ = ["export_module_onnx", "export_onnx"]
