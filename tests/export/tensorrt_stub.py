"""Makes TensorRT's Python bindings importable without its library, so that names and plugins can be checked on any machine.

The bindings are on the package index; the library that they are linked to needs a GPU to be of use. Nine C functions are all
that importing asks of it: stubs return nothing, so that builders and runtimes cannot be made, and everything else is real.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

VERSIONS = ("10.16.1.11", "11.4.0.106")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_ENTRY_POINT = re.compile(r"(?:create|get)\w*(?:_INTERNAL|Registry|Version)|initLibNvInferPlugins")
_SPECIAL = {
    "getNvOnnxParserVersion": "int getNvOnnxParserVersion(void) { return 0; }",
    "initLibNvInferPlugins": "_Bool initLibNvInferPlugins(void *a, const char *b) { (void)a; (void)b; return 0; }",
}


class StubUnavailableError(RuntimeError):
    """The stub cannot be made here."""


def stub_folder(version: str) -> Path:
    """Return a folder that makes ``import tensorrt`` work if it is on the path; made once, kept in the user's cache.

    Raises:
        StubUnavailableError: the bindings cannot be downloaded, or there is no C compiler.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infimm_fast" / "tensorrt_stub"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder = cache / f"{version}-{python}"
    if folder.is_dir():
        return folder
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        raise StubUnavailableError("needs gcc and nm")
    partial = cache / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _unpack(version, partial)
        _compile(version.split(".")[0], partial)
        package = partial / "tensorrt"
        package.mkdir()
        (package / "__init__.py").write_text(
            "import sys\n\nimport tensorrt_bindings\n\nsys.modules[__name__] = tensorrt_bindings\n"
        )
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _unpack(version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(folder), f"tensorrt-cu13-bindings=={version}"]
    if subprocess.run(command, capture_output=True).returncode:
        raise StubUnavailableError(f"the bindings of TensorRT {version} cannot be downloaded")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    wheel.unlink()


def _compile(major: str, folder: Path) -> None:
    """Make the libraries that the bindings look for beside themselves."""
    bindings = folder / "tensorrt_bindings"
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", bindings / "tensorrt.so"], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in listing.splitlines() if _ENTRY_POINT.fullmatch(line.split()[-1])]
    functions = [_SPECIAL.get(symbol, f"void *{symbol}(void) {{ return 0; }}") for symbol in symbols]
    source = folder / "stub.c"
    for library in LIBRARIES:
        source.write_text("\n".join(functions) if library == "nvinfer" else "")
        name = f"lib{library}.so.{major}"
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", bindings / name, source], check=True)
    source.unlink()
