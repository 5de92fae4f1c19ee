"""Everything that is checked of an ONNX artifact before it gets its manifest."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from infimm_fast.export.common.artifact import VERIFICATION, write_json
from infimm_fast.export.common.errors import VerificationError
from infimm_fast.export.common.prepared import PreparedExport
from infimm_fast.export.common.spec import GraphSpec
from infimm_fast.export.common.verify import verify_graph
from infimm_fast.export.to_onnx.checks import check_cuda_kernels, check_file
from infimm_fast.export.to_onnx.overflow import large_activations
from infimm_fast.export.to_onnxruntime import DTYPES_OF_PROVIDER, OnnxRuntimeBackend

logger = logging.getLogger("infimm_fast.export")


def verify_folder(prepared: PreparedExport, files: Mapping[str, str]) -> None:
    """Run `verify_onnx` and store its report, passed or not."""
    report: dict[str, Any] = {"passed": False}
    try:
        verify_onnx(prepared, files, report)
        report["passed"] = True
    except VerificationError as error:
        report["error"] = {"type": type(error).__name__, "text": str(error)}
        raise
    finally:
        write_json(prepared.out / VERIFICATION, report)


def verify_onnx(prepared: PreparedExport, files: Mapping[str, str], report: dict[str, Any]) -> None:
    """Check files, kernels and results of an artifact.

    Args:
        prepared: the export.
        files: name -> path of each graph's file in the folder.
        report: filled with what was checked, on what, with which errors; true also of a verification that fails.

    Raises:
        VerificationError: something is wrong; the subclass says what.
    """
    runs = prepared.dtype in DTYPES_OF_PROVIDER["cpu"]
    modules = {}
    if runs:
        modules = prepared.family.modules(prepared.family.cast(prepared.model, prepared.torch_dtype))
    else:
        report["not run"] = (
            f"the CPU provider does not take {prepared.dtype}: checked are the file and the CUDA provider's kernels"
        )
    for name, spec in prepared.specs.items():
        entry: dict[str, Any] = {}
        report.setdefault("graphs", {})[name] = entry
        file = prepared.out / files[name]
        prepared.progress(f"check {name}", 0, 1)
        check_file(file, spec)
        entry["checker and shape inference"] = "passed"
        if prepared.dtype != "float32":
            entry["kernels"] = {check_cuda_kernels(file): "all there"}
        prepared.progress(f"check {name}", 1, 1)
        if runs:
            _verify_runs(prepared, spec, files[name], modules[name], entry)


def _verify_runs(prepared: PreparedExport, spec: GraphSpec, file: str, module: nn.Module, entry: dict[str, Any]) -> None:
    """Run one graph on the CPU provider; its session ends before the next one's begins, so that one is in memory."""
    threads = torch.get_num_threads()
    backend = OnnxRuntimeBackend(prepared.out, {spec.name: spec}, {spec.name: file}, prepared.dtype, threads=threads)
    entry.setdefault("kernels", {})["CPUExecutionProvider"] = "all there"

    def run(name: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {output: backend.to_tensor(value) for output, value in backend.run(name, inputs).items()}

    cases = prepared.family.cases(spec, prepared.config)
    entry["cases"] = verify_graph(module, spec, cases, run, prepared.limits, prepared.progress)
    if prepared.dtype == "float16":
        found = large_activations(prepared.out / file, spec, [case.inputs for case in cases], threads)
        entry["activations beyond half the range"] = found
        for node in found:
            logger.warning(
                "%s: %s (%s) reaches %g; float16 ends at 65504, consider bfloat16",
                spec.name,
                node["node"] or node["value"],
                node["operator"],
                node["largest"],
            )
