"""Everything that is checked of an ONNX artifact before it gets its manifest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infimm_fast.export.common.artifact import Progress
from infimm_fast.export.common.spec import GraphSpec
from infimm_fast.export.common.verify import Case, verify_graph
from infimm_fast.export.to_onnx.checks import check_cuda_kernels, check_file
from infimm_fast.export.to_onnx.overflow import large_activations
from infimm_fast.export.to_onnxruntime import DTYPES_OF_PROVIDER, OnnxRuntimeBackend

logger = logging.getLogger("infimm_fast.export")


def verify_onnx(
    folder: Path,
    specs: Mapping[str, GraphSpec],
    files: Mapping[str, str],
    dtype: str,
    modules: Callable[[str], nn.Module],
    cases: Callable[[GraphSpec], list[Case]],
    limits: Mapping[str, tuple[int, int]],
    progress: Progress,
    report: dict[str, Any],
) -> None:
    """Check files, kernels and results of an artifact.

    Args:
        folder: the artifact.
        specs: name -> declaration of each graph.
        files: name -> path of its file in the folder.
        dtype: of the weights.
        modules: returns the module of a graph, on the CPU in that dtype.
        cases: returns what a graph is tried with.
        limits: free axis -> (smallest, largest) size.
        progress: told about each step.
        report: filled with what was checked, on what, with which errors; true also of a verification that fails.

    Raises:
        VerificationError: something is wrong; the subclass says what.
    """
    runs = dtype in DTYPES_OF_PROVIDER["cpu"]
    if not runs:
        report["not run"] = f"the CPU provider does not take {dtype}: checked are the file and the CUDA provider's kernels"
    for name, spec in specs.items():
        entry: dict[str, Any] = {}
        report.setdefault("graphs", {})[name] = entry
        progress(f"check {name}", 0, 1)
        check_file(folder / files[name], spec)
        entry["checker and shape inference"] = "passed"
        if dtype != "float32":
            entry["kernels"] = {check_cuda_kernels(folder / files[name]): "all there"}
        progress(f"check {name}", 1, 1)
        if runs:
            _verify_runs(folder, spec, files[name], dtype, modules(name), cases(spec), limits, progress, entry)


def _verify_runs(
    folder: Path,
    spec: GraphSpec,
    file: str,
    dtype: str,
    module: nn.Module,
    cases: list[Case],
    limits: Mapping[str, tuple[int, int]],
    progress: Progress,
    entry: dict[str, Any],
) -> None:
    """Run one graph on the CPU provider; its session ends before the next one's begins, so that one is in memory."""
    threads = torch.get_num_threads()
    backend = OnnxRuntimeBackend(folder, {spec.name: spec}, {spec.name: file}, dtype, "cpu", threads=threads)
    entry.setdefault("kernels", {})["CPUExecutionProvider"] = "all there"

    def run(name: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {output: backend.to_tensor(value) for output, value in backend.run(name, inputs).items()}

    entry["cases"] = verify_graph(module, spec, cases, run, limits, progress)
    if dtype == "float16":
        found = large_activations(folder / file, spec, [case.inputs for case in cases], threads)
        entry["activations beyond half the range"] = found
        for node in found:
            logger.warning(
                "%s: %s (%s) reaches %g; float16 ends at 65504, consider bfloat16",
                spec.name,
                node["node"] or node["value"],
                node["operator"],
                node["largest"],
            )
