"""``infimm-fast doctor``."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import infimm_fast
from infimm_fast.kernels import BackendUnavailableError
from infimm_fast.kernels.common.launch import resolve_backend

# Distribution name, what it is for, how to get it. More than one name: any of them will do.
_PACKAGES = (
    (("torch",), "everything", "pip install torch"),
    (("transformers",), "the model and its processor", "pip install transformers"),
    (("triton",), "fused kernels on NVIDIA GPUs", "pip install infimm-fast[gpu]"),
    (("onnx",), "export to ONNX", "pip install infimm-fast[onnx]"),
    (("onnxscript",), "export to ONNX", "pip install infimm-fast[onnx]"),
    (("onnxruntime", "onnxruntime-gpu"), "running ONNX files", "pip install infimm-fast[onnx], or [onnx-gpu]"),
    (("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "TensorRT engines", "pip install infimm-fast[tensorrt]"),
    (("tensorrt-rtx-cu13-libs",), "TensorRT-RTX engines, built anywhere", "pip install infimm-fast[tensorrt-rtx]"),
    (("matplotlib",), "pictures of benchmarks", "pip install infimm-fast[plot]"),
)


# What `infimm_fast.optimize` makes of a model; the other names are values of its configuration.
FUSED = "fused"


def installed_version(names: tuple[str, ...]) -> str | None:
    """Return "name version" of the first of these distributions that is installed."""
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def backends(device: torch.device | None = None) -> list[tuple[str, bool, str]]:
    """Return (name, whether it runs, remark) for every backend of the model, the one to use last.

    Args:
        device: where the model is to run; None for a CUDA GPU if there is one, else the CPU.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = f"on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "on the CPU"
    chosen = resolve_backend("auto", torch.empty(0, device=device))
    triton_place = "in Triton's interpreter, whose times mean nothing" if device.type == "cpu" else place
    try:
        resolve_backend("triton", torch.empty(0, device=device))
        triton_remark, runs_triton = f"our kernels for both attentions, {triton_place}", True
    except BackendUnavailableError as error:
        triton_remark, runs_triton = str(error), False
    return [
        ("reference", True, f"the naive path, {place}"),
        ("sdpa", True, f"PyTorch's fused attention, {place}"),
        ("triton", runs_triton, triton_remark),
        (FUSED, True, f"infimm_fast.optimize: {chosen}, and gated blocks folded, {place}"),
    ]


def conflicts() -> list[str]:
    """Return a sentence for each pair of installed packages that cannot live together."""
    found = []
    if installed_version(("onnxruntime",)) and installed_version(("onnxruntime-gpu",)):
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: uninstall both, then install one"
        )
    return found


def run_doctor(console: Console) -> None:
    """Print what is installed and what can run."""
    console.print(
        f"infimm_fast {infimm_fast.__version__}, Python {platform.python_version()}, {platform.platform()}", highlight=False
    )
    packages = Table("package", "installed", "needed for", "how to get it", title="Packages")
    for names, purpose, command in _PACKAGES:
        found = installed_version(names)
        packages.add_row(" or ".join(names[:2]), found or "[yellow]no[/]", purpose, "" if found else escape(command))
    console.print(packages)
    table = Table("backend", "runs here", "remark", title="Backends of the model")
    for name, runs, remark in backends():
        table.add_row(name, "[green]yes[/]" if runs else "[yellow]no[/]", escape(remark))
    console.print(table)
    console.print("Export targets: `infimm-fast export --help` lists them; each says what it lacks.", markup=False)
    for sentence in conflicts():
        console.print(f"[bold red]conflict:[/] {sentence}", highlight=False)
