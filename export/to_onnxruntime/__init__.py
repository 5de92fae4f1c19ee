"""ONNX artifacts in ONNX Runtime."""

from infimm_fast.export.to_onnxruntime.backend import DTYPES_OF_PROVIDER, PROVIDERS, OnnxRuntimeBackend

__all__ = ["DTYPES_OF_PROVIDER", "PROVIDERS", "OnnxRuntimeBackend"]
