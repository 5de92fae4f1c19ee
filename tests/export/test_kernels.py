"""Kernels as files: what they compute, what their description says, and a C++ program that loads one."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs typer")

import torch
from typer.testing import CliRunner

from infimm_fast.cli import app
from infimm_fast.export.common.errors import ArtifactError, ExportError
from interpreter import InterpreterProcess, load_file

pytest.importorskip("triton", reason="needs triton")

from infimm_fast.export.to_kernels import export, export_kernels, recipes
from infimm_fast.kernels.common import offline
from infimm_fast.kernels.common.checks import KernelArgumentError

CASES = Path(__file__).with_name("kernels_cases.py")
EXAMPLE = Path(export.__file__).with_name("load_kernel.cpp")
REQUEST = recipes.Request(heads=3, head_dim=72, dtype=torch.bfloat16, sm=90)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("head_dim", "tokens", "known"), [(112, 65, True), (72, 40, True), (64, 33, False)])
def test_subimage_entries(interpreter: InterpreterProcess, head_dim: int, tokens: int, known: bool, dtype: str) -> None:
    interpreter.call(
        CASES, "check_subimage", head_dim=head_dim, tokens=tokens, dtype=dtype, packed=head_dim != 64, known=known
    )


def test_a_wrong_scale_is_seen(interpreter: InterpreterProcess) -> None:
    with pytest.raises(AssertionError, match="out: Errors"):
        interpreter.call(CASES, "check_subimage", head_dim=64, tokens=33, dtype="float32", packed=False, scale=1.1)


@pytest.mark.parametrize(("tokens", "index"), [(1, "int64"), (5, "int32"), (40, "int64")])
@pytest.mark.parametrize("head_dim", [64, 88])
def test_cross_attention_entry(interpreter: InterpreterProcess, head_dim: int, tokens: int, index: str) -> None:
    interpreter.call(CASES, "check_cross", head_dim=head_dim, tokens=tokens, dtype="float16", index=index)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_entries_on_a_gpu() -> None:
    cases = load_file(CASES)
    for dtype in ("bfloat16", "float16"):
        cases.check_subimage(head_dim=112, tokens=1025, dtype=dtype, packed=True, device="cuda")
        cases.check_subimage(head_dim=72, tokens=729, dtype=dtype, packed=False, known=False, device="cuda")
        for tokens in (1, 20, 300):
            cases.check_cross(head_dim=64, tokens=tokens, dtype=dtype, device="cuda")


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: f"{recipe.op}.{recipe.variant}")
def test_descriptions_match_the_launchers(recipe: recipes.Recipe) -> None:
    """The grid formulas give what the launchers launch, and every parameter is described."""
    for source, launch, batch in recipes.sources_of(recipe, REQUEST):
        for name, kind in source.signature.items():
            assert kind == "constexpr" or recipes.describe_parameter(name)
        formula = recipe.grids[source.kernel.__name__]
        if launch is not None:
            assert recipes.evaluate_grid(formula, launch.values, batch) == launch.grid[0]
            assert len(launch.grid) == 1


def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = next(recipe for recipe in recipes.RECIPES if recipe.variant == "packed_masked")
    monkeypatch.setattr(export, "RECIPES", (chosen,))
    seen: list[tuple[int, int]] = []
    out = export_kernels(
        tmp_path / "kernels", [90], head_dims=[64], dtypes=["bfloat16"], heads=2, processes=1,
        progress=lambda *counts: seen.append(counts),
    )  # fmt: skip
    (row,) = json.loads((out / "kernels.json").read_text())["kernels"]
    assert [parameter["name"] for parameter in row["parameters"]] == ["qkv_ptr", "num_tokens", "out_ptr"]
    assert row["constants"]["H"] == 2 and row["threads"] % 32 == 0 and row["shared_memory"] > 0 and seen == [(1, 1)]
    for suffix in ("ptx", "cubin"):
        content = (out / row[suffix]["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row[suffix]["sha256"]
    ptx = (out / row["ptx"]["file"]).read_text()
    assert offline.entry_parameters(ptx) == ["u64", "u32", "u64"]
    assert ".target sm_90a" in ptx and ".file" not in ptx and str(Path.cwd()) not in ptx
    assert {file.name for file in tmp_path.iterdir()} == {"kernels"}


def test_failure_keeps_the_older_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "kernels.json").write_text("old")

    def fail(job: object) -> None:
        raise KernelArgumentError("no")

    monkeypatch.setattr(export, "compile_recipe", fail)
    with pytest.raises(KernelArgumentError):
        export_kernels(folder, [90], processes=1)
    assert (folder / "kernels.json").read_text() == "old" and list(tmp_path.iterdir()) == [folder]
    monkeypatch.setattr(export, "compile_recipe", lambda job: [])
    export_kernels(folder, [90], processes=1)
    assert json.loads((folder / "kernels.json").read_text())["kernels"] == []
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sms": [75]}, "sms="),
        ({"sms": []}, "sms="),
        ({"sms": [90], "head_dims": [60]}, "head_dims="),
        ({"sms": [90], "dtypes": ["int8"]}, "dtypes="),
        ({"sms": [90], "heads": 0}, "heads="),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_kernels(tmp_path / "kernels", **arguments)
    assert not list(tmp_path.iterdir())


def test_another_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(ArtifactError, match=r"holds no kernels\.json"):
        export_kernels(tmp_path, [90])
    assert (tmp_path / "photo.jpg").read_text() == "precious"


def _entry(parameters: str, body: str = "") -> str:
    return f".version 8.7\n.target sm_90\n.visible .entry kernel(\n{parameters}\n)\n.reqntid 128\n{{\n{body}\n}}\n"


def test_scratch_pointers_are_stripped_only_if_unused() -> None:
    parameters = ",\n".join(f"\t.param .{kind} kernel_param_{i}" for i, kind in enumerate(["u64", "u32", "u64", "u64"]))
    plain = offline._plain_ptx(_entry(parameters, "ld.param.b64 %rd1, [kernel_param_0];"), ["*bf16", "i32"], 90)
    assert offline.entry_parameters(plain) == ["u64", "u32"] and ".target sm_90a" in plain
    with pytest.raises(KernelArgumentError, match="scratch memory"):
        offline._plain_ptx(_entry(parameters, "ld.param.b64 %rd1, [kernel_param_3];"), ["*bf16", "i32"], 90)
    with pytest.raises(KernelArgumentError, match="the PTX takes"):
        offline._plain_ptx(_entry(parameters), ["*bf16", "fp32"], 90)
    with pytest.raises(KernelArgumentError, match="ptxas refuses"):
        offline.assemble("nonsense", 90)


FAKE_DRIVER = r"""
#include <cstdio>
#include <cstring>
#define API extern "C" int
API cuInit(unsigned) { return 0; }
API cuDeviceGet(int* device, int) { *device = 0; return 0; }
API cuDevicePrimaryCtxRetain(void**, int) { return 0; }
API cuCtxSetCurrent(void*) { return 0; }
API cuModuleLoadData(void**, const void* image) { std::printf("image %s\n", static_cast<const char*>(image)); return 0; }
API cuModuleGetFunction(void**, void*, const char* name) { std::printf("entry %s\n", name); return 0; }
API cuFuncSetAttribute(void*, int attribute, int value) { std::printf("attribute %d %d\n", attribute, value); return 0; }
API cuMemAlloc_v2(unsigned long long* pointer, size_t) { static int count; *pointer = 4096 * ++count; return 0; }
API cuMemcpyHtoD_v2(unsigned long long, const void*, size_t) { return 0; }
API cuMemcpyDtoH_v2(void* target, unsigned long long, size_t size) { std::memset(target, 0, size); return 0; }
API cuCtxSynchronize() { return 0; }
API cuLaunchKernel(void*, unsigned x, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned shared, void*,
                   void** parameters, void**) {
    std::printf("launch %u %u %u parameters %llu %d %llu\n", x, threads, shared,
                *static_cast<unsigned long long*>(parameters[0]), *static_cast<int*>(parameters[1]),
                *static_cast<unsigned long long*>(parameters[2]));
    return 0;
}
"""


@needs_compiler
def test_cpp_example(tmp_path: Path) -> None:
    """It compiles without a CUDA toolkit; against a driver that only prints, it launches what the description says."""
    program, driver = tmp_path / "load_kernel", tmp_path / "libcuda.so.1"
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", EXAMPLE, "-o", program, "-ldl"], check=True)
    (tmp_path / "driver.cpp").write_text(FAKE_DRIVER)
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "driver.cpp", "-o", driver], check=True)
    (tmp_path / "kernel.ptx").write_text("text")
    command = [program, "kernel.ptx", "entry_name", 256, 1000, 128, 1, 2, 257, 3, 64]
    environment = {"LD_LIBRARY_PATH": str(tmp_path)}
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "image text" in result.stdout and "entry entry_name" in result.stdout and "attribute 8 1000" in result.stdout
    assert "launch 18 256 1000 parameters 4096 257 8192" in result.stdout  # (cdiv(256, 128) + 1) * 3 * 2 programs
    assert result.returncode == 1 and "18 programs, largest error" in result.stdout  # the fake driver computes nothing
    missing = subprocess.run([str(program), "none", *map(str, command[2:])], capture_output=True, env=environment, text=True)
    assert missing.returncode == 1 and "none cannot be read" in missing.stderr


def test_command_line(tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["export", "kernels", str(tmp_path / "out"), "--sm", "75"])
    assert result.exit_code == 1 and "error: sms=[75] is not accepted; choose from 80, 89" in result.output
    assert not (tmp_path / "out").exists()
    for command, arguments in (("tensorrt", [str(tmp_path)]), ("aoti", [str(tmp_path), str(tmp_path / "out")])):
        result = runner.invoke(app, ["export", command, *arguments])
        assert result.exit_code == 1 and result.output.strip().startswith("error: ") and "Traceback" not in result.output
