"""An artifact of ONNX graphs to TensorRT engines, in the same folder."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from infimm_fast.dtypes import DTYPES
from infimm_fast.export.common.artifact import MANIFEST, Manifest, Progress, load_manifest, no_progress, write_json, writing
from infimm_fast.export.common.errors import ArtifactError, ExportError
from infimm_fast.export.common.family import Family, family_of_manifest
from infimm_fast.export.to_tensorrt.build import BuildOptions, BuiltEngine, EngineGraph, build_engine
from infimm_fast.export.to_tensorrt.engines import FOLDER, EngineEntry, write_index
from infimm_fast.export.to_tensorrt.flavors import Flavor, load_flavor
from infimm_fast.export.to_tensorrt.fp8 import linear_layers, quantize_graph
from infimm_fast.export.to_tensorrt.lint import check_graph
from infimm_fast.export.to_tensorrt.prepare import PLUGIN_OPS, prepare_graph
from infimm_fast.export.to_tensorrt.profiles import Limits, Profile, profiles_of, resolve_profiles


@dataclass(frozen=True)
class EngineJob:
    """Engines that are to be built: of what, for what, and how.

    Attributes:
        folder: the artifact.
        manifest: its manifest.
        flavor: the TensorRT.
        sms: compute capabilities of the targets.
        precision: that was asked for; None for the artifact's own.
        plugins: our kernels in place of TensorRT's attention.
        activations: for FP8, value of a graph -> largest magnitude.
        options: of the builder.
    """

    folder: Path
    manifest: Manifest
    flavor: Flavor
    sms: tuple[int, ...]
    precision: str | None
    plugins: bool
    activations: Mapping[str, float] | None
    options: BuildOptions

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of_manifest(self.manifest)


def export_tensorrt(
    source: nn.Module | str | Path,
    out: str | Path | None = None,
    *,
    flavor: str = "tensorrt",
    precision: str | None = None,
    profiles: str | Iterable[Limits | Profile] = "chat",
    sms: Sequence[int] | None = None,
    graphs: Sequence[str] | None = None,
    plugins: bool = False,
    activations: Mapping[str, float] | None = None,
    weight_streaming: bool = False,
    refit: bool = False,
    optimization_level: int | None = None,
    workspace_bytes: int | None = None,
    timing_cache: str | Path | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Progress = no_progress,
) -> list[EngineEntry]:
    """Build TensorRT engines of a model's graphs.

    Engines lie in ``tensorrt/`` of the artifact, with a report of their layers beside each. All graphs are checked before
    the first is built. Cancelled or failed builds leave what was there.

    Args:
        source: the folder of an ONNX artifact, or a model (or its folder), which is exported to one in `out` first.
        out: the artifact to make of a model; None for an artifact.
        flavor: "tensorrt" or "rtx".
        precision: "float32", "float16", "bfloat16", which must be the artifact's own since networks are strongly typed; or
            "fp8" for the linear layers of the tower in FP8 and everything else in the artifact's 16 bits. None is the
            artifact's own.
        profiles: the name of a preset, `Limits` of conversations, or a `Profile` with ranges of the graphs' axes by name.
        sms: compute capabilities to build for, 89 for 8.9. TensorRT builds for this machine's GPU only, and None means that;
            TensorRT-RTX builds one engine for all that are named, without a GPU.
        graphs: which graphs; None for all.
        plugins: our Triton kernels in place of TensorRT's own attention. Neither has been timed against the other.
        activations: for FP8, value of the vision graph -> largest magnitude, from `measure_vision_activations`.
        weight_streaming: weights may stay in host memory.
        refit: weights can be replaced later.
        optimization_level: 0 to 5, TensorRT's; None for its default.
        workspace_bytes: scratch memory that layers may use; None for no limit.
        timing_cache: file of layer timings; None for ``tensorrt/timing...cache`` in the artifact. TensorRT-RTX has none.
        cancelled: asked between the steps of a build; True ends it with `BuildCancelledError`.
        progress: told about phases.

    Returns:
        The engines' entries, one for each graph.

    Raises:
        ProviderError: TensorRT is missing or of a wrong version, or does not build for a GPU.
        MissingKernelError: TensorRT does not take a graph; the nodes are named.
        LimitError: the profiles lie outside the artifact's limits.
        ExportError: an argument is not accepted, or a build failed.
        OSError: a file cannot be written.
    """
    installed = load_flavor(flavor)
    targets = installed.target_sms(sms)
    folder, manifest = _artifact(source, out, precision, progress)
    name = f"timing.{flavor}-{installed.version}.sm{targets[0]}.cache"
    cache = Path(timing_cache) if timing_cache else folder / FOLDER / name
    options = BuildOptions(weight_streaming, refit, optimization_level, workspace_bytes, cache, cancelled)
    job = EngineJob(folder, manifest, installed, targets, precision, plugins, activations, options)
    names, wanted = _check(job, graphs), resolve_profiles(profiles)
    return _build(job, [_prepare(job, name, wanted) for name in names], progress)


def _build(job: EngineJob, graphs: Iterable[EngineGraph], progress: Progress) -> list[EngineEntry]:
    """Build, store and index one engine after the other."""
    (job.folder / FOLDER).mkdir(exist_ok=True)
    if job.plugins:
        from infimm_fast.export.to_tensorrt.plugins import register_plugins

        register_plugins(job.flavor, job.sms[0])
    entries = []
    for graph in graphs:
        built = build_engine(job.flavor, graph, job.sms, job.options, progress)
        entries.append(_store(job, graph, built))
        write_index(job.folder, entries[-1:])
    return entries


def _artifact(source: Any, out: str | Path | None, precision: str | None, progress: Progress) -> tuple[Path, Manifest]:
    """Return the ONNX artifact and its manifest, made now if a model was given."""
    is_artifact = isinstance(source, (str, Path)) and (Path(source) / MANIFEST).is_file()
    if is_artifact and out is not None:
        raise ExportError(f"{source} is an artifact already and gets the engines itself; leave out the second folder")
    if not is_artifact:
        if out is None:
            raise ArtifactError(
                f"{source if isinstance(source, (str, Path)) else 'a model'} is no artifact; give out= for one"
            )
        from infimm_fast.export.to_onnx.export import export_onnx

        source = export_onnx(source, out, dtype=precision if precision in DTYPES else None, progress=progress)
    folder = Path(source)
    manifest = load_manifest(folder)
    if manifest.kind != "model":
        raise ExportError(f"{folder} holds a single module; engines are made of whole models")
    return folder, manifest


def _check(job: EngineJob, graphs: Sequence[str] | None) -> tuple[str, ...]:
    """Check the arguments against the artifact; return the graphs' names."""
    manifest, precision, fp8_graphs = job.manifest, job.precision, job.family.fp8_graphs
    names = tuple(graphs) if graphs is not None else tuple(manifest.graphs)
    missing = [name for name in names if name not in manifest.graphs]
    if missing or not names:
        raise ExportError(f"graphs={list(names)} is not accepted; the artifact has {', '.join(manifest.graphs)}")
    if precision == "fp8":
        if manifest.dtype == "float32":
            raise ExportError("precision='fp8' needs an artifact in float16 or bfloat16; this one is float32")
        if job.activations is None:
            raise ExportError("precision='fp8' needs activations; measure them with measure_vision_activations")
        if not set(fp8_graphs) & set(names):
            accepted = ", ".join(fp8_graphs) or "no graph of this family"
            raise ExportError(f"precision='fp8' applies to {accepted}, which is not among graphs={list(names)}")
    elif precision not in (None, manifest.dtype):
        raise ExportError(
            f"precision={precision!r} is not accepted: networks are strongly typed and the artifact is {manifest.dtype}; "
            "export it to ONNX in the dtype that you want"
        )
    if job.plugins and job.flavor.name == "rtx":
        raise ExportError("TensorRT-RTX builds no engines with Python ahead-of-time plugins; use flavor='tensorrt'")
    return names


def _prepare(job: EngineJob, name: str, profiles: Iterable[Limits | Profile]) -> EngineGraph:
    manifest, family = job.manifest, job.family
    file = job.folder / manifest.graph_files[name]
    ops = PLUGIN_OPS if job.plugins else ()
    model = prepare_graph(onnx.load(file, load_external_data=False), ops)
    used = manifest.dtype
    if job.precision == "fp8" and name in family.fp8_graphs:
        assert job.activations is not None  # checked with the arguments
        if not quantize_graph(model, file.parent, job.activations):
            raise ExportError(f"activations name no input of a linear layer of the {name} graph")
        used = "fp8"
    check_graph(name, model, ops)
    spec = manifest.graphs[name]
    ranges = functools.partial(family.axis_ranges, family.config_from_json(manifest.config))
    return EngineGraph(spec, model, file, profiles_of(spec, profiles, ranges, manifest.limits), used)


def _store(job: EngineJob, graph: EngineGraph, built: BuiltEngine) -> EngineEntry:
    """Write an engine and its report."""
    name, folder = graph.spec.name, job.folder
    entry = EngineEntry(
        graph=name,
        flavor=job.flavor.name,
        version=job.flavor.version,
        sms=job.sms,
        precision=graph.precision,
        plugins=job.plugins,
        profiles=graph.profiles,
        options=job.options.recorded(),
        bytes=built.engine.nbytes,
        sha256=hashlib.sha256(built.engine).hexdigest(),
        graph_sha256=job.manifest.files[job.manifest.graph_files[name]]["sha256"],
        decomposed=built.report.decomposed,
    )
    with writing(folder / FOLDER / entry.file) as partial:
        partial.write_bytes(built.engine)
    write_json(folder / FOLDER / entry.report_file, built.report.to_json())
    return entry


def measure_vision_activations(folder: str | Path, samples: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the largest magnitude of every linear layer's input in an artifact's vision graph, for FP8.

    Runs on the CPU in ONNX Runtime, which takes float32 and float16; the values have the same names in an artifact of the
    same model in bfloat16.

    Args:
        folder: an ONNX artifact in float32 or float16.
        samples: inputs of the vision graph as NumPy arrays, ``pixel_values`` and ``tile_positions``; some ten pictures.

    Raises:
        ExportError: the graph cannot be run, or its activations overflow.
    """
    from infimm_fast.export.to_tensorrt.fp8 import measure_activations

    folder = Path(folder)
    file = folder / load_manifest(folder).graph_files["vision"]
    graph = prepare_graph(onnx.load(file, load_external_data=False)).graph
    return measure_activations(file, [layer.activation for layer in linear_layers(graph, any_dtype=True)], samples)
