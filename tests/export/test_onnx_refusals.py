"""What an export refuses or notices, and what is left behind when it fails."""

import errno
import json
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("typer", reason="needs typer")
pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

import onnx
import torch
from onnx import TensorProto, helper
from torch import nn
from typer.testing import CliRunner

from infimm_fast.cli import app
from infimm_fast.export import ExportError, VerificationError, export_module_onnx, export_onnx, load
from infimm_fast.export.common import artifact as artifact_module
from infimm_fast.export.common.cases import Case
from infimm_fast.export.common.errors import (
    ArtifactError,
    AxisError,
    InvalidGraphError,
    LimitError,
    MissingKernelError,
    ShapeError,
    ToleranceError,
)
from infimm_fast.export.common.spec import GraphSpec, TensorSpec
from infimm_fast.export.common.verify import Float64, verify_graph
from infimm_fast.export.to_onnx import verification, weights
from infimm_fast.export.to_onnx.checks import check_cuda_kernels, check_file
from infimm_fast.export.to_onnx.overflow import large_activations
from infimm_fast.export.to_onnx.trace import trace
from infimm_fast.kernels.common.numerics import outlier_normal


@pytest.mark.parametrize(
    "options, message",
    (
        ({"opset": 26}, "opset=26 is not accepted; choose one of 23, 24"),
        ({"opset": 22}, "opset=22"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"graphs": ("vision", "audio")}, "choose from vision, cross_kv, decoder"),
        ({"graphs": ()}, "graphs"),
        ({"share_weights": True}, "share_weights"),
        ({"limits": {"total_sequence_length": (1, 10**6)}}, "right up to 4096"),
        ({"limits": {"width": (1, 2)}}, "'width'"),
    ),
)
def test_arguments_are_refused_before_anything_is_written(model, tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_importing_the_facade_loads_nothing_heavy():
    code = "import sys, infimm_fast.export; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnx", "onnxruntime", "transformers"} & set(loaded)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    import infimm_fast.export as facade

    def fail(name):
        raise ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")

    monkeypatch.setattr(facade.importlib, "import_module", fail)
    monkeypatch.delattr(facade, "export_onnx", raising=False)
    with pytest.raises(ExportError, match=r"needs the package onnx_ir; pip install 'infimm-fast\[onnx\]'"):
        facade.__getattr__("export_onnx")


def test_things_that_are_no_model(tmp_path):
    with pytest.raises(ExportError, match=r"no config\.json"):
        export_onnx(tmp_path, tmp_path / "out")
    with pytest.raises(ExportError, match="export_module_onnx"):
        export_onnx(nn.Linear(2, 2), tmp_path / "out")


def test_occupied_folders(model, tmp_path):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="holds an artifact already"):
        export_onnx(model, tmp_path / "artifact")
    (tmp_path / "photo.jpg").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="not empty"):
            export_onnx(model, tmp_path, overwrite=overwrite)
    with pytest.raises(ArtifactError, match="is a file"):
        export_onnx(model, tmp_path / "photo.jpg")
    assert (tmp_path / "photo.jpg").read_text() == "precious"


def test_errors_on_the_command_line_are_one_line(tmp_path):
    for arguments in (("nonsense", "out"), ("tiny", "out", "--opset", "26"), ("tiny", "out", "--dtype", "int8")):
        result = CliRunner().invoke(app, ["export", "onnx", arguments[0], str(tmp_path / arguments[1]), *arguments[2:]])
        assert result.exit_code == 1 and "Traceback" not in result.output
        assert len([line for line in result.output.splitlines() if "error:" in line]) == 1


class Scaled(nn.Module):
    """The smallest module with a weight."""

    def __init__(self, size=64):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x):
        return self.linear(x)


def export_scaled(out, **options):
    torch.manual_seed(0)
    return export_module_onnx(Scaled(), {"x": torch.randn(3, 64)}, out, dynamic_axes={"x": {0: "rows"}}, **options)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    return export_scaled(tmp_path_factory.mktemp("scaled") / "out")


def test_a_full_disk_is_one_error_and_leaves_no_half_file(tmp_path, monkeypatch, scaled):
    copy = shutil.copytree(scaled, tmp_path / "copy")

    def fail(tensor, dtype):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "cast_tensor", fail)
    with pytest.raises(OSError, match=r"module\.data cannot be written: No space left on device; free some space"):
        export_scaled(copy, overwrite=True)
    assert not (copy / "manifest.json").exists()
    assert not [file for file in copy.rglob(".*")]
    with pytest.raises(ArtifactError, match="not an artifact"):
        load(copy)


def test_a_failed_verification_deletes_nothing_and_writes_no_manifest(tmp_path, monkeypatch):
    class Wrong(verification.OnnxRuntimeBackend):
        def to_tensor(self, value):
            return super().to_tensor(value) * 1.001

    monkeypatch.setattr(verification, "OnnxRuntimeBackend", Wrong)
    with pytest.raises(ToleranceError, match="module, the sample: output is outside the error budget"):
        export_scaled(tmp_path / "out")
    assert (tmp_path / "out" / "onnx" / "module.onnx").exists() and not (tmp_path / "out" / "manifest.json").exists()
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert not report["passed"] and report["error"]["type"] == "ToleranceError"


def test_the_manifest_is_written_last_and_at_once(tmp_path, monkeypatch):
    written = []
    original = artifact_module.writing

    def watched(file):
        written.append(file.name)
        return original(file)

    monkeypatch.setattr(artifact_module, "writing", watched)
    monkeypatch.setattr(weights, "writing", watched)
    export_scaled(tmp_path / "out")
    assert written[-1] == "manifest.json" and "module.data" in written


class Fixed(nn.Module):
    """A module whose code fixes an axis."""

    def forward(self, x):
        return x.view(3, 8) * 2


def test_an_axis_that_is_not_free(tmp_path):
    with pytest.raises(AxisError, match="fixed"):
        export_module_onnx(Fixed(), {"x": torch.randn(3, 8)}, tmp_path / "out", dynamic_axes={"x": {0: "rows"}})
    with pytest.raises(AxisError, match="give at least 2"):
        export_module_onnx(Scaled(), {"x": torch.randn(1, 64)}, tmp_path / "out", dynamic_axes={"x": {0: "rows"}})


def test_a_declaration_that_the_graph_does_not_keep():
    x = TensorSpec("x", "float32", ("rows", 64))
    for shape, message in ((("rows", 65), "axis 1 of y is 64 in the graph; declared is 65"), ((3, 64), "declared is 3")):
        declared = GraphSpec("scaled", (x,), (TensorSpec("y", "float32", shape),))
        with pytest.raises(AxisError, match=message):
            trace(Scaled(), (torch.zeros(3, 64),), ({0: "rows"},), declared, dtype=None, opset=23, plain=False)


def small_graph(tmp_path, node, dtype, output_shape=("rows", 4), opset=23, out_type=None):
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", dtype, ["rows", 4])],
        [helper.make_tensor_value_info("y", out_type or dtype, list(output_shape))],
    )
    file = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11), file)
    return file


def spec(dtype="float32", shape=("rows", 4)):
    return GraphSpec("small", (TensorSpec("x", dtype, ("rows", 4)),), (TensorSpec("y", dtype, shape),))


def test_kernels_of_the_cuda_provider(tmp_path):
    fine = small_graph(tmp_path, helper.make_node("Softmax", ["x"], ["y"]), TensorProto.BFLOAT16)
    assert "onnxruntime-gpu" in check_cuda_kernels(fine)
    for operator in ("Acosh", "Hardmax"):
        missing = small_graph(tmp_path, helper.make_node(operator, ["x"], ["y"]), TensorProto.BFLOAT16)
        with pytest.raises(MissingKernelError, match=rf"{operator}-\d+ of T=bfloat16"):
            check_cuda_kernels(missing)


def test_files_that_are_not_what_they_declare(tmp_path):
    good = small_graph(tmp_path, helper.make_node("Relu", ["x"], ["y"]), TensorProto.FLOAT)
    check_file(good, spec())
    with pytest.raises(ShapeError, match=r"y is float32 \['rows', 4\]; declared is float32 \['rows', 5\]"):
        check_file(good, spec(shape=("rows", 5)))
    wrong = small_graph(tmp_path, helper.make_node("Transpose", ["x"], ["y"], perm=[0, 0]), TensorProto.FLOAT)
    with pytest.raises(InvalidGraphError, match=r"small\.onnx is not valid ONNX"):
        check_file(wrong, spec())


def test_activations_near_the_end_of_float16_are_reported_by_node(tmp_path):
    node = helper.make_node("Mul", ["x", "x"], ["y"], name="square")
    file = small_graph(tmp_path, node, TensorProto.FLOAT16)
    x = torch.ones(2, 4, dtype=torch.float16)
    assert large_activations(file, spec("float16"), [{"x": x}], 1) == []
    x[0, 1] = 200.0
    (found,) = large_activations(file, spec("float16"), [{"x": x}], 1)
    assert (found["node"], found["operator"], found["largest"]) == ("square", "Mul", 40000.0)
    x[0, 1] = 300.0
    (found,) = large_activations(file, spec("float16"), [{"x": x}], 1)
    assert found["largest"] > 65504
    assert [item.name for item in tmp_path.iterdir()] == ["small.onnx"]


def test_results_are_compared_by_shape_dtype_and_budget():
    module = Scaled()
    graph = GraphSpec("g", (TensorSpec("x", "float32", ("rows", 64)),), (TensorSpec("y", "float32", ("rows", 64)),))
    case = Case("case", {"x": outlier_normal(3, 64, dtype=torch.float32)}, {})
    with torch.no_grad():
        right = module(case.inputs["x"])
    report = verify_graph(module, graph, [case], lambda name, inputs: {"y": right}, {})
    assert report["case"]["worst"] == "y" and report["case"]["axes"] == {"rows": 3}
    nan = right.clone()
    nan[0, 0] = torch.nan
    for wrong, error in (
        (right[:2], ShapeError),
        (right.double(), ShapeError),
        (right * 1.0001, ToleranceError),
        (right.roll(1, 0), ToleranceError),
        (nan, ToleranceError),
    ):
        with pytest.raises(error):
            verify_graph(module, graph, [case], lambda name, inputs, wrong=wrong: {"y": wrong}, {})
    with pytest.raises(LimitError, match="no case of the verification lies within"):
        verify_graph(module, graph, [case], lambda name, inputs: {"y": right}, {"rows": (1, 2)})
    assert issubclass(ToleranceError, VerificationError) and issubclass(VerificationError, ValueError)


def test_float64_is_float64(model):
    """The exact results come from casting one function's arguments at a time; a model in float64 gives the same."""
    import copy

    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)).double()
    wide = copy.deepcopy(model.vision_tower).double()
    with torch.no_grad():
        expected = wide(pixels)
        with Float64():
            actual = model.vision_tower(pixels)
    assert actual.dtype == torch.float64 and torch.allclose(actual, expected, rtol=0, atol=1e-13)
    with pytest.raises(AssertionError, match="add_ writes to its arguments"), Float64():
        pixels.add_(1)


def test_a_declaration_checks_shapes():
    graph = GraphSpec(
        "g", (TensorSpec("a", "float32", ("n", 3)), TensorSpec("b", "float32", ("n", "m"))), ()
    )  # fmt: skip
    assert graph.resolve_axes({"a": (2, 3), "b": (2, 5)}, {"n": (1, 4)}) == {"n": 2, "m": 5}
    for shapes, limits, message in (
        ({"a": (2, 3)}, {}, "needs the input b"),
        ({"a": (2, 4), "b": (2, 5)}, {}, "a has shape"),
        ({"a": (2, 3), "b": (3, 5)}, {}, r"b has shape \[3, 5\]"),
        ({"a": (2, 3, 1), "b": (2, 5)}, {}, "a has shape"),
        ({"a": (2, 3), "b": (2, 5)}, {"m": (6, 9)}, "m is 5; this artifact takes 6 to 9"),
    ):
        with pytest.raises(LimitError, match=message):
            graph.resolve_axes(shapes, limits)
