"""Builds one engine: parses a prepared graph, applies profiles and options, reports progress, and reads the layers back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from infimm_fast.export.common.artifact import Progress, no_progress, writing
from infimm_fast.export.common.errors import ExportError, InvalidGraphError
from infimm_fast.export.common.spec import GraphSpec
from infimm_fast.export.to_tensorrt.flavors import Flavor
from infimm_fast.export.to_tensorrt.prepare import attention_nodes
from infimm_fast.export.to_tensorrt.profiles import Profile
from infimm_fast.export.to_tensorrt.report import EngineReport, report_from_inspector, report_from_log, unknown_report


class BuildCancelledError(ExportError):
    """A build was cancelled; nothing of it was written."""


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built.

    Attributes:
        weight_streaming: weights may stay in host memory; the runner says how much the GPU holds.
        refit: weights can be replaced in the built engine.
        optimization_level: 0 to 5, TensorRT's; None for its default.
        workspace_bytes: scratch memory that layers may use; None for no limit.
        timing_cache: file that timings are read from and written to; None for none. TensorRT-RTX times nothing.
        cancelled: asked between the steps of a build; True ends it.
    """

    weight_streaming: bool = False
    refit: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    cancelled: Callable[[], bool] = field(default=lambda: False)

    def recorded(self) -> dict[str, Any]:
        """Return what an engine's entry says of them."""
        names = ("weight_streaming", "refit", "optimization_level", "workspace_bytes")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class EngineGraph:
    """One graph, ready to be built.

    Attributes:
        spec: its declaration.
        model: the prepared graph, without its weights' values.
        file: the graph's file; external weights lie beside it.
        profiles: shapes that the engine takes.
        precision: "float32", "float16", "bfloat16" or "fp8".
    """

    spec: GraphSpec
    model: onnx.ModelProto
    file: Path
    profiles: tuple[Profile, ...]
    precision: str


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in memory, with what is known about it."""

    engine: memoryview
    report: EngineReport


@functools.cache
def logger_of(trt: Any) -> Any:
    """Return the logger of a TensorRT module; it keeps errors and the table of layers until `forget`.

    One for the whole process: TensorRT goes on using the first logger that it was given, whatever it is given later.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.forget()

        def forget(self) -> None:
            self.problems: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.problems.append(message)
            elif severity == trt.ILogger.VERBOSE and "LayerType: " in message:
                self.layers.extend(line for line in message.splitlines() if "LayerType: " in line)

    return Logger()


def make_monitor(trt: Any, graph: str, progress: Progress, cancelled: Callable[[], bool]) -> Any:
    """Return a progress monitor of a TensorRT module; phases are told by name, and a cancelled build stops at a step."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if parent_phase is None:
                progress(f"{graph}: {phase_name}", 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.stopped = self.stopped or cancelled()
            progress(f"{graph}: {phase_name}", step + 1, self.steps.get(phase_name, step + 1))
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            steps = self.steps.pop(phase_name, 0)
            progress(f"{graph}: {phase_name}", steps, steps)

    return Monitor()


def build_engine(
    flavor: Flavor, graph: EngineGraph, sms: Sequence[int], options: BuildOptions, progress: Progress = no_progress
) -> BuiltEngine:
    """Build one engine.

    Args:
        flavor: the TensorRT.
        graph: what it is built of.
        sms: compute capabilities of the targets.
        options: see `BuildOptions`.
        progress: told about phases of the build.

    Raises:
        InvalidGraphError: the parser refuses the graph; the node is named.
        BuildCancelledError: `options.cancelled` said so.
        ExportError: the build failed; TensorRT's own words are in the message.
    """
    spec, attention = graph.spec, attention_nodes(graph.model)
    trt = flavor.trt
    logger = logger_of(trt)
    logger.forget()
    builder = trt.Builder(logger)
    network = builder.create_network(flavor.network_flags(plugins=any(attention.values())))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.model.SerializeToString(), str(graph.file)):
        raise InvalidGraphError(f"TensorRT's parser refuses the {spec.name} graph: {_parser_errors(parser, logger)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    flavor.set_targets(config, sms)
    _add_profiles(builder, config, spec, graph.profiles)
    _set_options(trt, config, options)
    cache = TimingCache(flavor, config, options.timing_cache)
    monitor = make_monitor(trt, spec.name, progress, options.cancelled)
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if monitor.stopped:
        raise BuildCancelledError(f"building the {spec.name} engine was cancelled")
    if serialized is None:
        raise ExportError(f"TensorRT cannot build the {spec.name} engine: {_first(logger.problems)}")
    cache.write()
    # A view: an engine holds all weights, and a copy would double them.
    engine = memoryview(serialized)
    return BuiltEngine(engine, _report(flavor, logger, engine, attention))


def _parser_errors(parser: Any, logger: Any) -> str:
    told = []
    for index in range(min(parser.num_errors, 3)):
        parser_error = parser.get_error(index)
        node = parser_error.node_name() or parser_error.node()
        told.append(f"{node} ({parser_error.node_operator()}): {parser_error.desc()}")
    return "; ".join(told) or _first(logger.problems)


def _first(problems: list[str]) -> str:
    return problems[0] if problems else "it gave no reason"


def _add_profiles(builder: Any, config: Any, spec: GraphSpec, profiles: Iterable[Profile]) -> None:
    dynamic = {tensor.name for tensor in spec.inputs if tensor.free_axes}
    for profile in profiles:
        added = builder.create_optimization_profile()
        for name, shapes in profile.shapes(spec).items():
            if name in dynamic:
                added.set_shape(name, *shapes)
        if config.add_optimization_profile(added) < 0:
            raise ExportError(f"TensorRT refuses the profile {profile.name} of the {spec.name} graph")


def _set_options(trt: Any, config: Any, options: BuildOptions) -> None:
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)


class TimingCache:
    """Timings of layers, kept in a file so that the next build is quick; TensorRT-RTX has none."""

    def __init__(self, flavor: Flavor, config: Any, file: Path | None):
        self._config = config
        self._file = file if flavor.name == "tensorrt" else None
        if self._file is not None:
            content = self._file.read_bytes() if self._file.exists() else b""
            cache = config.create_timing_cache(content)
            if cache is None or not config.set_timing_cache(cache, False):
                raise ExportError(f"{self._file} is no timing cache of TensorRT {flavor.version} on this GPU; remove it")
            # Written back at once: a file that cannot be written must not be found out after an hour's build.
            self._store(content)

    def write(self) -> None:
        """Write the timings back."""
        if self._file is not None:
            self._store(bytes(self._config.get_timing_cache().serialize()))

    def _store(self, content: bytes) -> None:
        assert self._file is not None  # asked before
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with writing(self._file) as partial:
            partial.write_bytes(content)


def _report(flavor: Flavor, logger: Any, serialized: memoryview, attention_nodes: Mapping[str, bool]) -> EngineReport:
    """Return what the engine is made of; a build that took an hour is not lost because that cannot be found out."""
    trt = flavor.trt
    try:
        if flavor.name == "rtx":  # built for other GPUs than this machine's, so that it cannot be loaded
            return report_from_log(logger.layers, attention_nodes)
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise ExportError(f"TensorRT cannot load the engine that it built: {_first(logger.problems)}")
        inspector = engine.create_engine_inspector()
        information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return report_from_inspector(information, attention_nodes)
    except ExportError as error:
        return unknown_report(str(error), attention_nodes)
