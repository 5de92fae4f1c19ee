"""Runs an artifact's ONNX graphs in ONNX Runtime; whatever one graph gives to another stays on the device."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from infimm_fast.export.common.errors import (
    AxisError,
    InvalidGraphError,
    MissingKernelError,
    ProviderError,
    VerificationError,
)
from infimm_fast.export.common.spec import ALL_DTYPES, ONNX_TYPES, GraphSpec

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
# The CPU provider has no convolution and no matrix product in bfloat16.
DTYPES_OF_PROVIDER = {"cpu": ("float32", "float16")}


class OnnxRuntimeBackend:
    """Sessions of an artifact's graphs on one provider.

    Args:
        folder: the artifact.
        graphs: name -> declaration.
        files: name -> path of the graph's file in the folder.
        dtype: of the weights.
        provider: "cpu", "cuda", "ort-tensorrt" or "ort-tensorrt-rtx".
        device_id: index of the GPU.
        threads: threads of the CPU provider; None for ONNX Runtime's choice.
        provider_options: passed on to the provider, see ONNX Runtime's documentation.

    Raises:
        ProviderError: the provider is not installed, does not take the dtype, or could not be started; nothing ever falls
            back to the CPU.
        MissingKernelError: the provider has no kernel for a node.
    """

    def __init__(
        self,
        folder: Path,
        graphs: Mapping[str, GraphSpec],
        files: Mapping[str, str],
        dtype: str,
        provider: str = "cpu",
        device_id: int = 0,
        threads: int | None = None,
        provider_options: Mapping[str, Any] | None = None,
    ):
        check_provider(provider, dtype)
        self.provider, self._device_id = provider, device_id
        self._device = "cpu" if provider == "cpu" else "cuda"
        self._graphs = dict(graphs)
        options = dict(provider_options or {})
        if provider != "cpu":
            options.setdefault("device_id", device_id)
        self._sessions = {name: _start_session(folder / files[name], provider, options, threads) for name in graphs}

    def run(
        self, graph: str, inputs: Mapping[str, torch.Tensor | ort.OrtValue], on_host: Collection[str] = ()
    ) -> dict[str, ort.OrtValue]:
        """Run one graph; see `Backend`.

        Raises:
            AxisError: an input does not fit the graph.
        """
        session, spec = self._sessions[graph], self._graphs[graph]
        binding = session.io_binding()
        for tensor in spec.inputs:
            binding.bind_ortvalue_input(tensor.name, self._to_value(inputs[tensor.name], tensor.dtype))
        for tensor in spec.outputs:
            binding.bind_output(tensor.name, *(("cpu",) if tensor.name in on_host else (self._device, self._device_id)))
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's own types are not exported
            raise _explain(graph, error) from error
        return dict(zip((tensor.name for tensor in spec.outputs), binding.get_outputs(), strict=True))

    def zeros(self, dtype: str, shape: tuple[int, ...]) -> ort.OrtValue:
        """Return zeros of a dtype by name; bfloat16 as well, of which the host has no numbers."""
        return _value(torch.zeros(shape, dtype=ALL_DTYPES[dtype]), dtype)

    def to_tensor(self, value: ort.OrtValue) -> torch.Tensor:
        """Return an output as a tensor on the host; one in bfloat16 must be there already."""
        if value.element_type() != ONNX_TYPES["bfloat16"]:
            return torch.from_numpy(value.numpy())
        assert value.device_name() == "cpu", "numpy has no bfloat16 to copy a value of the device to"
        shape = value.shape()
        numbers = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
        return torch.frombuffer(numbers, dtype=torch.bfloat16).reshape(shape).clone()

    @staticmethod
    def _to_value(tensor: torch.Tensor | ort.OrtValue, dtype: str) -> ort.OrtValue:
        return _value(tensor, dtype) if isinstance(tensor, torch.Tensor) else tensor


def _value(tensor: torch.Tensor, dtype: str) -> ort.OrtValue:
    # An empty array, as the cache of a prompt is, has no address that could be shared.
    if tensor.numel() == 0:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(tensor.shape), ONNX_TYPES[dtype], "cpu", 0)
    # NumPy has no bfloat16: its bits go as integers.
    tensor = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.contiguous().numpy(), ONNX_TYPES[dtype])


def check_provider(provider: str, dtype: str) -> None:
    """Raise `ProviderError` unless a provider is known, installed, and takes weights of a dtype."""
    if provider not in PROVIDERS:
        raise ProviderError(f"provider={provider!r} is not known; choose one of {', '.join(PROVIDERS)}")
    accepted = DTYPES_OF_PROVIDER.get(provider)
    if accepted is not None and dtype not in accepted:
        raise ProviderError(f"the {provider} provider does not run {dtype} graphs; it takes {', '.join(accepted)}")
    if PROVIDERS[provider] not in ort.get_available_providers():
        have = [name for name, full in PROVIDERS.items() if full in ort.get_available_providers()]
        raise ProviderError(f"this onnxruntime has no {PROVIDERS[provider]}; it has {', '.join(have)}")


def _start_session(file: Path, provider: str, options: dict[str, Any], threads: int | None) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if threads is not None:
        settings.intra_op_num_threads = threads
    wanted = PROVIDERS[provider]
    try:
        session = ort.InferenceSession(
            str(file), settings, providers=[wanted], provider_options=[options], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's own types are not exported
        raise _explain(file.stem, error) from error
    if wanted not in session.get_providers():
        raise ProviderError(f"{wanted} could not be started for {file.name}; ONNX Runtime chose {session.get_providers()}")
    return session


def _explain(graph: str, error: Exception) -> VerificationError:
    """Turn an error of ONNX Runtime into ours, by what it says."""
    text = " ".join(str(error).split())
    if "NOT_IMPLEMENTED" in text:
        return MissingKernelError(f"{graph}: a node has no kernel: {text}")
    if "Got invalid dimensions" in text or "Invalid rank" in text:
        return AxisError(f"{graph}: an input does not fit the graph: {text}")
    return InvalidGraphError(f"{graph}: ONNX Runtime refuses it: {text}")
