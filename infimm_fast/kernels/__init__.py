"""The ops. Each lives in its own folder, `infimm_fast.kernels.<op>`; this facade re-exports the public functions.

The imports are eager on purpose: an op and its folder share a name, and only a binding made here, after the folder was
imported, keeps ``infimm_fast.kernels.subimage_attention`` the function whatever else is imported first. Nothing here
imports triton or touches CUDA.
"""

from infimm_fast.kernels.common.checks import BackendUnavailableError, KernelArgumentError
from infimm_fast.kernels.gated_cross_attention.api import gated_cross_attention
from infimm_fast.kernels.gated_residual.api import gated_residual
from infimm_fast.kernels.subimage_attention.api import subimage_attention, subimage_attention_packed

__all__ = [
    "BackendUnavailableError",
    "KernelArgumentError",
    "gated_cross_attention",
    "gated_residual",
    "subimage_attention",
    "subimage_attention_packed",
]
