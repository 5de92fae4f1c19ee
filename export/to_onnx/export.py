"""A model to an artifact of ONNX graphs."""

from __future__ import annotations

import dataclasses
import logging
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from infimm_fast.export.common.artifact import VERIFICATION, Progress, writing
from infimm_fast.export.common.errors import ExportError
from infimm_fast.export.common.prepared import PreparedExport, prepare_export
from infimm_fast.export.common.source import checkpoint_names
from infimm_fast.export.common.spec import AxisLimits, GraphSpec
from infimm_fast.export.to_onnx.trace import TracedGraph, check_opset, trace
from infimm_fast.export.to_onnx.verification import verify_folder
from infimm_fast.export.to_onnx.weights import index_safetensors, place_weights, transpose_weights, weight_bytes

logger = logging.getLogger("infimm_fast.export")


@dataclass(frozen=True)
class OnnxOptions:
    """How files are written.

    Attributes:
        opset: of the files.
        plain: standard operators only.
        share_weights: point the graphs at the model's own files.

    Raises:
        ExportError: the opset is not one that this exporter writes.
    """

    opset: int = 23
    plain: bool = False
    share_weights: bool = False

    def __post_init__(self) -> None:
        check_opset(self.opset)


def export_onnx(
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    opset: int = 23,
    graphs: tuple[str, ...] | None = None,
    plain: bool = False,
    share_weights: bool = False,
    processor: Any = None,
    limits: AxisLimits | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export a model to a folder that `infimm_fast.export.load` and ``infimm-fast run`` take.

    The graphs are declared by the model's family, those of InfiMM-HD in `infimm_fast.export.models.infimm_hd`. The model is
    not changed. Its weights are in memory once: shapes are traced without data, and weights are then written one at a time.

    Args:
        model: a model of a registered family, folded or not, or the folder of one.
        out: folder to make.
        dtype: "float32", "float16" or "bfloat16"; None for the model's own.
        opset: of the files, 23 or 24.
        graphs: which of the family's to export, of InfiMM-HD's "vision", "cross_kv" and "decoder"; None for all.
        plain: write standard operators only. Otherwise our attention ops are nodes of the domain ``infimm``, with bodies
            for runtimes that do not know them.
        share_weights: point the graphs at the ``.safetensors`` files of the model's folder, which must be `out`, in place of
            writing the weights again. Weights that are not there in this dtype are written.
        processor: saved with the model; None takes the one in the model's folder, if there is one.
        limits: free axis -> (smallest, largest) size, in place of the family's default.
        verify: check the files, run them in ONNX Runtime and compare with PyTorch; see `verify_onnx`. The result is in
            ``verification.json``.
        overwrite: replace an artifact in `out`.
        progress: called with (what is being done, how much is done, how much there is).

    Returns:
        The folder.

    Raises:
        ExportError: an argument is not accepted, or the model cannot be exported.
        VerificationError: a graph is wrong. Everything stays in the folder, but it has no manifest.
        OSError: a file cannot be written; it is left out, and there is no manifest.
    """
    options = OnnxOptions(opset, plain, share_weights)
    _check_sharing(model, Path(out), share_weights)
    prepared = prepare_export(
        model,
        out,
        dtype=dtype,
        graphs=graphs,
        limits=limits,
        processor=processor,
        overwrite=overwrite,
        progress=progress,
        within_checkpoint=share_weights,
    )
    folder = write_onnx(prepared, options, verify, dataclasses.asdict(options))
    weights = sum(parameter.nbytes for parameter in prepared.model.parameters())
    logger.info("weights %.2f GB, peak memory of the process %.2f GB", weights / 1e9, peak_memory() / 1e9)
    return folder


def _check_sharing(model: Any, out: Path, share_weights: bool) -> None:
    if share_weights and (not isinstance(model, (str, Path)) or Path(model).resolve() != out.resolve()):
        raise ExportError(
            f"share_weights points the graphs at the model's own .safetensors files, and runtimes follow no path out of the "
            f"graphs' folder: give that folder as both the model and the output, not {out}"
        )


def write_onnx(prepared: PreparedExport, options: OnnxOptions, verify: bool, about: dict[str, Any]) -> Path:
    """Write the graphs of a prepared export, verify them, and write the manifest.

    Args:
        prepared: the export.
        options: how files are written.
        verify: see `export_onnx`.
        about: the manifest's options.

    Returns:
        The folder.

    Raises:
        ExportError: a graph cannot be exported.
        VerificationError: a graph is wrong.
        OSError: a file cannot be written.
    """
    place = "" if options.share_weights else "onnx/"
    files = {name: f"{place}{name}.onnx" for name in prepared.specs}
    with prepared.family.as_exported(prepared.model):
        traced, names = write_graphs(prepared, options, files)
        # Tracing has found what a single module's outputs are.
        prepared = dataclasses.replace(prepared, specs=traced)
        if verify:
            verify_folder(prepared, files)
            names.add(VERIFICATION)
    return prepared.finish("onnx", files, names, about, verified=verify)


def write_graphs(
    prepared: PreparedExport, options: OnnxOptions, files: Mapping[str, str]
) -> tuple[dict[str, GraphSpec], set[str]]:
    """Trace and write every graph; return their declarations and the paths of all files in the folder."""
    out, progress = prepared.out, prepared.progress
    modules = prepared.family.modules(prepared.model)
    names_in_checkpoint = checkpoint_names(prepared.model)
    stored = index_safetensors(prepared.folder) if options.share_weights and prepared.folder is not None else None
    specs, names = {}, set()
    for name, declared in prepared.specs.items():
        progress(f"export {name}", 0, 1)
        graph = _trace_graph(prepared, options, declared, modules[name])
        specs[name] = graph.spec
        if stored is None:
            transpose_weights(graph)
        file = out / files[name]
        file.parent.mkdir(exist_ok=True)
        rename_weights(graph, names_in_checkpoint)
        total, done = weight_bytes(graph), 0

        def count(size: int, name: str = name, total: int = total) -> None:
            nonlocal done
            done += size
            progress(f"write {name}", min(done, total), total)

        data = place_weights(graph, file.parent, f"{name}.data", stored, count)
        with writing(file) as partial:
            ir.save(graph.model, partial)
        names |= {files[name], *(str((file.parent / used).relative_to(out)) for used in data)}
        progress(f"export {name}", 1, 1)
    return specs, names


def _trace_graph(prepared: PreparedExport, options: OnnxOptions, spec: GraphSpec, module: nn.Module) -> TracedGraph:
    samples = spec.nest(prepared.samples(spec))
    axes = spec.nest([tensor.free_axes for tensor in spec.inputs])
    return trace(module, samples, axes, spec, dtype=prepared.torch_dtype, opset=options.opset, plain=options.plain)


def rename_weights(graph: TracedGraph, checkpoint_names: Mapping[int, str]) -> None:
    """Give the graph's weights the names that they have in the model's checkpoint."""
    for name, tensor in list(graph.weights.items()):
        wanted = checkpoint_names.get(id(tensor))
        if wanted is None or wanted == name or wanted in graph.model.graph.initializers:
            continue
        value = graph.model.graph.initializers.pop(name)
        value.name = wanted
        graph.model.graph.initializers[wanted] = value
        graph.weights[wanted] = graph.weights.pop(name)


def peak_memory() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would also count what the parent had when it started this process.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes
