"""Runs an artifact's TensorRT engines; tensors of PyTorch are inputs and outputs, without copies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from infimm_fast.export.common.artifact import Manifest
from infimm_fast.export.common.errors import ArtifactError, ExportError, ProviderError
from infimm_fast.export.common.family import family_of_manifest
from infimm_fast.export.common.runner import TorchValues
from infimm_fast.export.common.spec import GraphSpec
from infimm_fast.export.to_tensorrt.build import logger_of
from infimm_fast.export.to_tensorrt.engines import FOLDER, EngineEntry, choose_engine
from infimm_fast.export.to_tensorrt.flavors import load_flavor, local_sm
from infimm_fast.export.to_tensorrt.profiles import choose_profile

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass
class _Capture:
    """A captured run: the graph, its own execution context, and the buffers that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    context: Any
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


@dataclass
class _Engine:
    """One loaded engine."""

    spec: GraphSpec
    entry: EngineEntry
    engine: Any
    contexts: dict[int, Any] = field(default_factory=dict)
    seen: set[Shapes] = field(default_factory=set)
    captures: OrderedDict[Shapes, _Capture] = field(default_factory=OrderedDict)


class TensorRTBackend(TorchValues):
    """The engines of an artifact on this machine's GPU.

    Args:
        folder: the artifact.
        manifest: its manifest.
        flavor: "tensorrt" or "rtx".
        device_id: index of the GPU.
        precision: of the engines; None takes those that were built last.
        cuda_graphs: how many shapes of each graph are captured as CUDA graphs, from the second run with the same shapes on.
            A capture keeps buffers of its own for every input and output and copies inputs into them: right for a tower
            or a step whose shapes come back, wasteful for a cache that grows. 0 captures nothing.
        weight_budget: bytes of weights on the GPU, for engines that were built with weight streaming; None for all.

    Raises:
        ProviderError: there is no GPU, TensorRT is missing, or there is no engine for it and this GPU.
        ArtifactError: an engine is truncated or belongs to another graph.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        flavor: str = "tensorrt",
        device_id: int = 0,
        precision: str | None = None,
        cuda_graphs: int = 0,
        weight_budget: int | None = None,
    ):
        installed = load_flavor(flavor)
        if not torch.cuda.is_available():
            raise ProviderError("running TensorRT engines needs a CUDA GPU, and PyTorch sees none")
        self.device = torch.device("cuda", device_id)
        self._trt = installed.trt
        self._cuda_graphs = cuda_graphs
        self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device):
            sm = local_sm()
            assert sm is not None  # there is a GPU
            runtime = self._trt.Runtime(logger_of(self._trt))
            self._engines = {}
            fp8_graphs = family_of_manifest(manifest).fp8_graphs
            for name, spec in manifest.graphs.items():
                sha256 = manifest.files.get(manifest.graph_files[name], {}).get("sha256")
                wanted = precision if precision != "fp8" or name in fp8_graphs else None
                entry = choose_engine(folder, name, flavor, installed.version, sm, wanted, sha256)
                self._engines[name] = _Engine(spec, entry, _load(runtime, self._trt, folder, entry, weight_budget))
            self._runtime = runtime  # engines are gone with it

    def run(self, graph: str, inputs: Mapping[str, torch.Tensor], on_host: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """Run one graph; see `Backend`.

        Raises:
            LimitError: an input does not fit the declaration, or lies outside every profile.
        """
        loaded = self._engines[graph]
        shapes: Shapes = tuple((tensor.name, tuple(inputs[tensor.name].shape)) for tensor in loaded.spec.inputs)
        sizes = loaded.spec.resolve_axes(dict(shapes), {})
        profile = choose_profile(loaded.entry.profiles, loaded.spec, sizes)
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                ready = {
                    tensor.name: inputs[tensor.name].to(self.device, tensor.torch_dtype, non_blocking=True).contiguous()
                    for tensor in loaded.spec.inputs
                }
                outputs = self._replay_or_run(loaded, profile, shapes, ready)
            torch.cuda.current_stream().wait_stream(self._stream)
        return {name: value.to("cpu") if name in on_host else value for name, value in outputs.items()}

    def _replay_or_run(
        self, loaded: _Engine, profile: int, shapes: Shapes, inputs: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if not self._cuda_graphs or shapes not in loaded.seen:
            if self._cuda_graphs:
                loaded.seen.add(shapes)
            if profile not in loaded.contexts:
                loaded.contexts[profile] = self._make_context(loaded, profile)
            return self._enqueue(loaded, loaded.contexts[profile], inputs)
        if shapes not in loaded.captures:
            loaded.captures[shapes] = self._capture(loaded, profile, inputs)
            if len(loaded.captures) > self._cuda_graphs:
                loaded.captures.popitem(last=False)
        capture = loaded.captures[shapes]
        loaded.captures.move_to_end(shapes)
        for name, value in inputs.items():
            capture.inputs[name].copy_(value, non_blocking=True)
        capture.graph.replay()
        # The next replay writes to the same buffers.
        return {name: value.clone() for name, value in capture.outputs.items()}

    def _capture(self, loaded: _Engine, profile: int, inputs: Mapping[str, torch.Tensor]) -> _Capture:
        """Capture a run with inputs of these shapes; a context serves one captured graph only."""
        static = {name: value.clone() for name, value in inputs.items()}
        context = self._make_context(loaded, profile)
        # Sets up what capturing may not: kernels that load lazily, the context's memory.
        self._enqueue(loaded, context, static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            outputs = self._enqueue(loaded, context, static)
        return _Capture(graph, context, static, outputs)

    def _enqueue(self, loaded: _Engine, context: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run an engine on the current stream."""
        empty = torch.empty(1, dtype=torch.uint8, device=self.device)  # TensorRT wants an address for empty tensors too
        for name, value in inputs.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                raise ExportError(f"TensorRT refuses the shape {list(value.shape)} of {name}: {self._problem()}")
            context.set_tensor_address(name, (value if value.numel() else empty).data_ptr())
        outputs = {}
        for tensor in loaded.spec.outputs:
            shape = tuple(context.get_tensor_shape(tensor.name))
            outputs[tensor.name] = torch.empty(shape, dtype=tensor.torch_dtype, device=self.device)
            context.set_tensor_address(tensor.name, outputs[tensor.name].data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ExportError(f"TensorRT failed to run the {loaded.spec.name} engine: {self._problem()}")
        return outputs

    def _make_context(self, loaded: _Engine, profile: int) -> Any:
        """Return a new execution context for a profile."""
        engine = loaded.engine
        context = engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
            raise ExportError(f"TensorRT cannot make a context for the {loaded.spec.name} engine: {self._problem()}")
        self._stream.synchronize()
        return context

    def _problem(self) -> str:
        problems = logger_of(self._trt).problems
        return problems[-1] if problems else "it gave no reason"


def _load(runtime: Any, trt: Any, folder: Path, entry: EngineEntry, weight_budget: int | None) -> Any:
    file = folder / FOLDER / entry.file
    logger = logger_of(trt)
    logger.forget()
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        reason = logger.problems[0] if logger.problems else "it gave no reason"
        raise ArtifactError(f"TensorRT {entry.version} cannot load {file}: {reason}; build it again")
    if weight_budget is not None:
        if not entry.options.get("weight_streaming"):
            raise ProviderError(f"{file} was built without weight streaming; weight_budget needs it")
        engine.weight_streaming_budget_v2 = min(weight_budget, engine.streamable_weights_size)
    return engine
