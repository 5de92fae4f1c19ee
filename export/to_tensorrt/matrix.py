"""What was really run on one machine: every target in every precision, measured, stored, and drawn as a table.

``python -m infimm_fast.export.to_tensorrt.matrix --measure docs/export_results.json`` takes some minutes;
``--render docs/export_results.json docs/tensorrt.md`` replaces the table between the markers of a document, and does so
for ``README.md``, which has them too.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infimm_fast.dtypes import DTYPES
from infimm_fast.export.common.artifact import load_manifest, package_versions, write_json
from infimm_fast.export.common.errors import ArtifactError, ExportError
from infimm_fast.export.models.infimm_hd_graphs import graph_modules
from infimm_fast.kernels.common.configs import ARCHITECTURES
from infimm_fast.kernels.common.launch import TRITON_INSTALLED
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.presets import preset

BEGIN, END = "<!-- begin: what was run -->", "<!-- end: what was run -->"
PRECISIONS = ("float32", "float16", "bfloat16", "fp8")
RTX_SMS = (80, 89, 120)


def small_model(dtype: torch.dtype) -> InfiMMHDForConditionalGeneration:
    """Return the tiny model cut to two layers, with one gated block."""
    settings = preset("tiny")
    settings.vision_config.num_hidden_layers = settings.text_config.num_hidden_layers = 2
    settings.cross_attention_every_n_layers = 2
    torch.manual_seed(0)
    return InfiMMHDForConditionalGeneration._from_config(settings, dtype=dtype).eval()


def measure(report: Callable[[str], None] = print) -> dict[str, Any]:
    """Try every target in every precision here; return what was reached, row by row."""
    rows: dict[str, dict[str, str]] = {}

    @contextlib.contextmanager
    def trying(row: str, precision: str, reached: str) -> Iterator[None]:
        try:
            yield
        except (ExportError, OSError, RuntimeError) as error:
            reached = f"failed: {str(error).splitlines()[0][:100]}"
        rows.setdefault(row, {})[precision] = reached
        report(f"{row}, {precision}: {reached}")

    with tempfile.TemporaryDirectory() as folder:
        for precision, dtype in DTYPES.items():
            artifact = Path(folder) / precision
            _measure_onnx(trying, artifact, precision, dtype)
            _measure_rtx(trying, artifact, precision)
            _measure_engines(trying, artifact, precision)
            _measure_aoti(trying, Path(folder) / f"aoti-{precision}", precision, dtype)
            _measure_kernels(trying, precision, dtype)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"versions": package_versions() | _more_versions(), "machine": platform.machine(), "gpu": gpu, "rows": rows}


def _measure_onnx(trying: Any, artifact: Path, precision: str, dtype: torch.dtype) -> None:
    from infimm_fast.export.to_onnx.export import export_onnx

    # The CPU provider has no bfloat16: such a file is checked, but not run.
    with trying("ONNX Runtime, CPU", precision, "executed" if precision != "bfloat16" else "exported"):
        export_onnx(small_model(dtype), artifact, verify=precision != "bfloat16")


def _measure_rtx(trying: Any, artifact: Path, precision: str) -> None:
    from infimm_fast.export.to_tensorrt.export import export_tensorrt, measure_vision_activations

    for sm in RTX_SMS:
        row = f"TensorRT-RTX, SM {sm}"
        with trying(row, precision, "built"):
            entries = export_tensorrt(artifact, flavor="rtx", sms=[sm])
            _check_fused(entries, precision)
        if precision != "float16" or sm < 89:
            continue
        with trying(row, "fp8", "built (tower)"):
            pixels = np.random.default_rng(0).standard_normal((4, 3, 112, 112)).astype(np.float32)
            sample = {"pixel_values": pixels, "tile_positions": np.zeros((4, 2), np.int64)}
            activations = measure_vision_activations(artifact, [sample])
            export_tensorrt(artifact, flavor="rtx", sms=[sm], precision="fp8", graphs=["vision"], activations=activations)


def _check_fused(entries: Sequence[Any], precision: str) -> None:
    left = [node for entry in entries for node in entry.decomposed]
    if left and precision != "float32":
        raise ExportError(f"attention without a kernel of its own: {', '.join(left)}")


def _measure_engines(trying: Any, artifact: Path, precision: str) -> None:
    """TensorRT itself, which builds and runs on a GPU only."""
    from infimm_fast.export.to_tensorrt.backend import TensorRTBackend
    from infimm_fast.export.to_tensorrt.export import export_tensorrt

    row = "TensorRT, this machine's GPU"
    if not torch.cuda.is_available():
        with trying(row, precision, "not run: no GPU"):
            return
    with trying(row, precision, "executed"):
        _check_fused(export_tensorrt(artifact), precision)
        manifest = load_manifest(artifact)
        _compare(TensorRTBackend(artifact, manifest), DTYPES[precision], 0.05)


def _measure_aoti(trying: Any, artifact: Path, precision: str, dtype: torch.dtype) -> None:
    from infimm_fast.export.to_aoti.backend import AotiBackend
    from infimm_fast.export.to_aoti.export import export_aoti

    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        with trying(f"AOTInductor, {device.upper()}", precision, "executed"):
            folder = export_aoti(small_model(dtype), artifact.with_name(f"{artifact.name}-{device}"), device=device)
            _compare(AotiBackend(folder, load_manifest(folder)), dtype, 1e-4 if dtype == torch.float32 else 0.05)


def _compare(backend: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Run tower and projections and compare with PyTorch, relative to the largest value."""
    modules = graph_modules(small_model(dtype))
    pixels = torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    inputs = {"pixel_values": pixels, "tile_positions": torch.tensor([[0, 0], [0, 1], [-1, -1]])}
    with torch.no_grad():
        expected = modules["vision"](*inputs.values())
        pairs = modules["cross_kv"](expected)
    actual = backend.run("vision", inputs, ["image_features"])
    projected = backend.run("cross_kv", actual, ["cross_key_values.0.key"])["cross_key_values.0.key"]
    for value, want in ((actual["image_features"], expected), (projected, pairs[0])):
        error = float((value.float() - want.float()).abs().max() / want.float().abs().max())
        if not error <= tolerance:
            raise ExportError(f"differs from PyTorch by {error:.2g}")


def _measure_kernels(trying: Any, precision: str, dtype: torch.dtype) -> None:
    """The kernels of TensorRT plugins: PTX for every generation, taken by ptxas."""
    if not TRITON_INSTALLED:
        return
    from infimm_fast.export.to_kernels.sources import cross_attention_source, subimage_source
    from infimm_fast.kernels.common.offline import assemble, compile_source

    row = "plugin kernels, SM " + "/".join(map(str, ARCHITECTURES))
    with trying(row, precision, "assembled"):
        for sm in ARCHITECTURES:
            for source in (
                subimage_source(16, 112, dtype, 1025, sm, 112**-0.5, packed=True),
                cross_attention_source(12, 12, 64, dtype, torch.int64, sm, 0.125),
            ):
                assemble(compile_source(source, sm).ptx, sm)


def _more_versions() -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in ("triton", "tensorrt-rtx-cu13-bindings", "tensorrt-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def render(results: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = ["| target | " + " | ".join(PRECISIONS) + " |", "|---" * (len(PRECISIONS) + 1) + "|"]
    for row, cells in results["rows"].items():
        lines.append(f"| {row} | " + " | ".join(cells.get(precision, "-") for precision in PRECISIONS) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    lines += ["", f"On {results['machine']}, GPU: {results['gpu'] or 'none'}; {versions}."]
    return "\n".join(lines)


def replace_table(document: str, table: str) -> str:
    """Return a document with the table between its markers.

    Raises:
        ArtifactError: it has no markers.
    """
    if BEGIN not in document or END not in document:
        raise ArtifactError(f"the document has no lines {BEGIN} and {END}")
    head, rest = document.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or render."""
    import json

    command_line = argparse.ArgumentParser(description="What was really run, target by target.")
    command_line.add_argument("--measure", type=Path, help="file to write the results to")
    command_line.add_argument("--render", type=Path, nargs=2, metavar=("RESULTS", "DOCUMENT"))
    options = command_line.parse_args(arguments)
    if options.measure:
        write_json(options.measure, measure())
    if options.render:
        results, document = options.render
        table = render(json.loads(results.read_text()))
        document.write_text(replace_table(document.read_text(), table))


if __name__ == "__main__":
    main()
