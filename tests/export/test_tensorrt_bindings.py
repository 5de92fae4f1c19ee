"""TensorRT's real Python bindings, without its library: every name that we use, and our plugins under its own framework."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("onnx", reason="needs onnx")

from interpreter import load_file

STUB = load_file(Path(__file__).with_name("tensorrt_stub.py"))
CASES = Path(__file__).with_name("tensorrt_stub_cases.py")


def run_case(version: str, *arguments: str) -> str:
    try:
        folder = STUB.stub_folder(version)
    except STUB.StubUnavailableError as error:
        pytest.skip(str(error))
    environment = os.environ | {"PYTHONPATH": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, str(CASES), *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", STUB.VERSIONS)
def test_every_name_exists(version: str) -> None:
    # The bindings' own warnings come first.
    assert int(run_case(version, "names").splitlines()[-1].split()[0]) > 60


@pytest.mark.slow
@pytest.mark.parametrize("version", STUB.VERSIONS)
def test_plugins_answer_the_builder(version: str) -> None:
    """Shapes, formats, grid, scalars; PTX that ptxas takes. The older bindings see one generation, the newer ones all."""
    generations = ("80", "89", "90", "100", "120") if version == STUB.VERSIONS[-1] else ("90",)
    assert "plugins answer" in run_case(version, "plugins", *generations)


def test_a_missing_index_is_a_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(STUB.subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(STUB.StubUnavailableError, match=r"TensorRT 1\.2\.3 cannot be downloaded"):
        STUB.stub_folder("1.2.3")
    assert not list(tmp_path.rglob("*.whl")) and not list((tmp_path / "infimm_fast" / "tensorrt_stub").iterdir())
