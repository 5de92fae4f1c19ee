"""TensorRT 10.x, TensorRT 11.x and TensorRT-RTX behind one small surface: which module, which version, which GPUs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infimm_fast.export.common.errors import ProviderError

FLAVORS = ("tensorrt", "rtx")
MAJORS = {"tensorrt": (10, 11), "rtx": (1,)}
_MODULES = {"tensorrt": ("tensorrt",), "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_INSTALL = {
    "tensorrt": "pip install 'infimm-fast[tensorrt]', on a machine with an NVIDIA GPU",
    "rtx": "pip install 'infimm-fast[tensorrt-rtx]'",
}


@dataclass(frozen=True)
class Flavor:
    """One installed TensorRT.

    Attributes:
        name: "tensorrt" or "rtx".
        trt: its module.
        version: as the module has it, for example "10.16.1.11".
    """

    name: str
    trt: Any
    version: str

    @property
    def major(self) -> int:
        """First number of the version."""
        return int(self.version.split(".")[0])

    def network_flags(self, plugins: bool) -> int:
        """Return the creation flags of a strongly typed network; with plugins, of the ahead-of-time kind."""
        flags = self.trt.NetworkDefinitionCreationFlag
        value = 1 << int(flags.STRONGLY_TYPED)
        return value | (1 << int(flags.PREFER_AOT_PYTHON_PLUGINS) if plugins else 0)

    def target_sms(self, wanted: Sequence[int] | None) -> tuple[int, ...]:
        """Return the compute capabilities to build an engine for.

        TensorRT builds for the GPU that it runs on. TensorRT-RTX builds for any of those that it knows, without a GPU, and
        one engine can serve several.

        Args:
            wanted: 89 for compute capability 8.9; None for this machine's GPU.

        Raises:
            ProviderError: there is no such target here.
        """
        local = local_sm()
        if wanted is None and local is None:
            hint = "; name the targets instead (sms=, --sm)" if self.name == "rtx" else ""
            raise ProviderError(f"building engines for this machine's GPU needs a CUDA GPU, and PyTorch sees none{hint}")
        sms = tuple(sorted(set(wanted))) if wanted is not None else (int(local or 0),)
        if not sms:
            raise ProviderError("sms is empty; name at least one compute capability, 89 for 8.9")
        known = self.known_sms()
        for sm in sms:
            if known is not None and sm not in known:
                accepted = ", ".join(map(str, known))
                raise ProviderError(f"TensorRT-RTX {self.version} builds no engines for SM {sm}; it takes {accepted}")
            if self.name == "tensorrt" and sm != local:
                here = "there is none" if local is None else f"it is SM {local}"
                raise ProviderError(f"TensorRT builds for this machine's GPU only, and {here}; SM {sm} was asked for")
        return sms

    def known_sms(self) -> tuple[int, ...] | None:
        """Return the compute capabilities that TensorRT-RTX can be told to build for; None for TensorRT."""
        if self.name == "tensorrt":
            return None
        names = (re.fullmatch(r"SM(\d+)", name) for name in dir(self.trt.ComputeCapability))
        return tuple(sorted(int(match[1]) for match in names if match))

    def set_targets(self, config: Any, sms: Sequence[int]) -> None:
        """Tell a builder configuration of TensorRT-RTX what to build for; TensorRT needs no telling."""
        if self.name == "rtx":
            config.num_compute_capabilities = len(sms)
            for index, sm in enumerate(sms):
                config.set_compute_capability(getattr(self.trt.ComputeCapability, f"SM{sm}"), index)


def local_sm() -> int | None:
    """Return the compute capability of this machine's current GPU, 90 for a Hopper, or None."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def load_flavor(name: str) -> Flavor:
    """Import a TensorRT.

    Raises:
        ProviderError: the name is not known, or it is not installed, broken, or of a version that is not supported.
    """
    if name not in FLAVORS:
        raise ProviderError(f"flavor={name!r} is not known; choose one of {', '.join(FLAVORS)}")
    label = "TensorRT" if name == "tensorrt" else "TensorRT-RTX"
    module, reason = None, "it is not installed"
    for candidate in _MODULES[name]:
        try:
            module = importlib.import_module(candidate)
            break
        except ModuleNotFoundError as error:
            if error.name != candidate:
                reason = f"it is incomplete ({error})"
        except (ImportError, OSError) as error:
            reason = f"it cannot be loaded ({error})"
    if module is None or not hasattr(module, "Builder"):
        raise ProviderError(f"{label} cannot be used: {reason}; {_INSTALL[name]}")
    version = str(module.__version__)
    if int(version.split(".")[0]) not in MAJORS[name]:
        supported = " and ".join(f"{major}.x" for major in MAJORS[name])
        raise ProviderError(f"{label} {version} is installed; supported are {supported}: {_INSTALL[name]}")
    return Flavor(name, module, version)
