"""A model to an artifact of ONNX graphs."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from infimm_fast.export.common.artifact import (
    VERIFICATION,
    Manifest,
    Progress,
    no_progress,
    prepare_folder,
    write_json,
    write_manifest,
    writing,
)
from infimm_fast.export.common.errors import ExportError, VerificationError
from infimm_fast.export.common.graphs import graph_modules, nest_inputs
from infimm_fast.export.common.source import (
    as_exported,
    cast_model,
    checkpoint_names,
    generation_ids,
    load_model,
    save_processor,
    settle_dtype,
    settle_limits,
)
from infimm_fast.export.common.spec import (
    DTYPES,
    GRAPHS,
    SAMPLE_SIZES,
    GraphSpec,
    check_dtype,
    check_graphs,
    model_graphs,
)
from infimm_fast.export.common.verify import model_cases
from infimm_fast.export.to_onnx.trace import TracedGraph, check_opset, trace
from infimm_fast.export.to_onnx.verification import verify_onnx
from infimm_fast.export.to_onnx.weights import (
    StoredTensor,
    index_safetensors,
    place_weights,
    transpose_weights,
    weight_bytes,
)
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor

logger = logging.getLogger("infimm_fast.export")


def export_onnx(
    model: InfiMMHDForConditionalGeneration | str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    opset: int = 23,
    graphs: tuple[str, ...] = GRAPHS,
    plain: bool = False,
    share_weights: bool = False,
    processor: InfiMMHDProcessor | None = None,
    limits: Mapping[str, tuple[int, int]] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export a model to a folder that `infimm_fast.export.load` and ``infimm-fast run`` take.

    The graphs' inputs and outputs are declared in `infimm_fast.export.common.spec`. The model is not changed. Its weights
    are in memory once: shapes are traced without data, and weights are then written one at a time.

    Args:
        model: a model, folded or not, or the folder of one.
        out: folder to make.
        dtype: "float32", "float16" or "bfloat16"; None for the model's own.
        opset: of the files, 23 or 24.
        graphs: which of "vision", "cross_kv" and "decoder" to export.
        plain: write standard operators only. Otherwise our attention ops are nodes of the domain ``infimm``, with bodies
            for runtimes that do not know them.
        share_weights: point the graphs at the ``.safetensors`` files of the model's folder, which must be `out`, in place of
            writing the weights again. Weights that are not there in this dtype are written.
        processor: saved with the model; None takes the one in the model's folder, if there is one.
        limits: free axis -> (smallest, largest) size, in place of `default_limits`'s.
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
    out, progress = Path(out), progress or no_progress
    check_opset(opset)
    check_graphs(graphs)
    if dtype is not None:
        check_dtype(dtype)
    _check_sharing(model, out, share_weights)
    folder, model, processor = load_model(model, dtype, processor)
    dtype = settle_dtype(model, dtype)
    specs = {name: spec for name, spec in model_graphs(model.config, dtype).items() if name in graphs}
    limits = settle_limits(model.config, limits)
    prepare_folder(out, overwrite, within_checkpoint=share_weights)
    stored = index_safetensors(folder) if share_weights and folder is not None else None
    place = "" if share_weights else "onnx/"
    files = {name: f"{place}{name}.onnx" for name in specs}
    with as_exported(model):
        modules = graph_modules(model)
        layers = model.config.text_config.num_hidden_layers

        def trace_graph(spec: GraphSpec) -> TracedGraph:
            samples = [torch.zeros(t.sizes(SAMPLE_SIZES), dtype=t.torch_dtype) for t in spec.inputs]
            free = [t.free_axes for t in spec.inputs]
            nested, axes = (nest_inputs(spec.name, flat, layers) for flat in (samples, free))
            return trace(modules[spec.name], nested, axes, spec, dtype=DTYPES[dtype], opset=opset, plain=plain)

        names = write_graphs(out, specs, files, trace_graph, checkpoint_names(model), stored, progress)
        if processor is not None:
            names |= save_processor(processor, out)
        if verify:
            cast = cast_model(model, DTYPES[dtype])
            checked = graph_modules(cast)
            verify_folder(
                out,
                lambda report: verify_onnx(
                    out, specs, files, dtype, checked.__getitem__, lambda spec: model_cases(spec, model.config), limits,
                    progress, report,
                ),
            )  # fmt: skip
            names.add(VERIFICATION)
    manifest = Manifest(
        kind="model",
        target="onnx",
        dtype=dtype,
        graphs=specs,
        graph_files=files,
        limits=limits,
        options={"opset": opset, "plain": plain, "share_weights": share_weights},
        config=model.config.to_dict(),
        generation=generation_ids(model),
        verified=verify,
    )
    write_manifest(out, manifest, names, progress)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    logger.info("weights %.2f GB, peak memory of the process %.2f GB", weights / 1e9, peak_memory() / 1e9)
    return out


def _check_sharing(model: Any, out: Path, share_weights: bool) -> None:
    if share_weights and (not isinstance(model, (str, Path)) or Path(model).resolve() != out.resolve()):
        raise ExportError(
            f"share_weights points the graphs at the model's own .safetensors files, and runtimes follow no path out of the "
            f"graphs' folder: give that folder as both the model and the output, not {out}"
        )


def write_graphs(
    out: Path,
    specs: Mapping[str, GraphSpec],
    files: Mapping[str, str],
    trace_graph: Callable[[GraphSpec], TracedGraph],
    checkpoint_names: Mapping[int, str],
    stored: dict[str, StoredTensor] | None,
    progress: Progress,
) -> set[str]:
    """Trace and write every graph; return the paths of all files in the folder."""
    names: set[str] = set()
    for name, spec in specs.items():
        progress(f"export {name}", 0, 1)
        graph = trace_graph(spec)
        if stored is None:
            transpose_weights(graph)
        file = out / files[name]
        file.parent.mkdir(exist_ok=True)
        rename_weights(graph, checkpoint_names)
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
    return names


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


def verify_folder(out: Path, check: Callable[[dict[str, Any]], None]) -> None:
    """Run a verification and store its report, passed or not.

    Args:
        out: the artifact.
        check: fills the report that it is given, and raises `VerificationError` for what is wrong.
    """
    report: dict[str, Any] = {"passed": False}
    try:
        check(report)
        report["passed"] = True
    except VerificationError as error:
        report["error"] = {"type": type(error).__name__, "text": str(error)}
        raise
    finally:
        write_json(out / VERIFICATION, report)


def peak_memory() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would also count what the parent had when it started this process.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes
