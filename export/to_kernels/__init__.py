"""Our kernels compiled ahead of time, for programs with a runtime of their own."""

from infimm_fast.export.to_kernels.export import export_kernels

__all__ = ["export_kernels"]
