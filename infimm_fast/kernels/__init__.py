"""The ops. Each lives in its own folder, ``infimm_fast.kernels.<folder>``; this facade re-exports the public functions.

Nothing here imports triton or touches CUDA.
"""

from infimm_fast.kernels.common.checks import BackendUnavailableError, KernelArgumentError
from infimm_fast.kernels.interval.api import interval_attention
from infimm_fast.kernels.residual.api import gated_residual
from infimm_fast.kernels.subimage.api import subimage_attention, subimage_attention_packed

# Every op's folder; `infimm_fast.kernels.common.cases.find_ops` reads what it knows of itself.
OP_FOLDERS = ("subimage", "interval", "residual")

__all__ = [
    "OP_FOLDERS",
    "BackendUnavailableError",
    "KernelArgumentError",
    "gated_residual",
    "interval_attention",
    "subimage_attention",
    "subimage_attention_packed",
]
