"""AOTInductor packages: compiled graphs for programs that link PyTorch's C++ library."""

from infimm_fast.export.to_aoti.export import export_aoti

__all__ = ["export_aoti"]
