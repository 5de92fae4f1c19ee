"""TensorRT-RTX parses every graph and builds engines for other GPUs, on this machine without one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'infimm-fast[tensorrt-rtx]'")

import numpy as np
import onnx
import torch
from onnx import helper

from infimm_fast.export.common.artifact import load_manifest
from infimm_fast.export.common.errors import ExportError, InvalidGraphError, LimitError, ProviderError
from infimm_fast.export.common.spec import GraphSpec, TensorSpec
from infimm_fast.export.models.infimm_hd import VISUAL_MULTIPLE
from infimm_fast.export.to_onnx.export import export_onnx
from infimm_fast.export.to_tensorrt import build, prepare
from infimm_fast.export.to_tensorrt import export as exporter
from infimm_fast.export.to_tensorrt.engines import FOLDER, INDEX, read_index, read_report
from infimm_fast.export.to_tensorrt.export import export_tensorrt, measure_vision_activations
from infimm_fast.export.to_tensorrt.flavors import load_flavor
from infimm_fast.export.to_tensorrt.profiles import Limits, Profile
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from interpreter import load_file

GRAPHS = load_file(Path(__file__).with_name("tensorrt_graphs.py"))
SPEC = GraphSpec("toy", (TensorSpec("x", "float32", ("n", 8)),), (TensorSpec("y", "float32", ("n", 8)),))
PROFILE = Profile("all", {"n": (1, 2, 4)})
SMS = (80, 89, 120)


@pytest.fixture(scope="module")
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape, dtype = request.param
    folder = tmp_path_factory.mktemp("rtx") / f"{shape}-{dtype}"
    return export_onnx(GRAPHS.make_model(shape, getattr(torch, dtype)), folder, verify=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "artifact",
    [
        *((shape, dtype) for shape in ("tiny", "wide") for dtype in ("float16", "bfloat16")),
        ("resampled", "float16"),
    ],
    indirect=True,
    ids=str,
)
def test_builds_for_every_generation(artifact: Path) -> None:
    """Every graph, for all of the GPUs; no attention is left to scores in memory."""
    entries = export_tensorrt(artifact, flavor="rtx", sms=SMS, optimization_level=0)
    assert [(entry.graph, entry.sms) for entry in entries] == [(g, SMS) for g in ("vision", "cross_kv", "decoder")]
    assert read_index(artifact) == sorted(entries, key=lambda entry: entry.file)
    config = InfiMMHDConfig.from_dict(load_manifest(artifact).config)
    layers, tokens = config.text_config.num_hidden_layers, config.visual_tokens_per_tile
    for entry in entries:
        assert entry.decomposed == (), entry
        file = artifact / FOLDER / entry.file
        assert file.stat().st_size == entry.bytes > 10_000
        report = read_report(artifact, entry)
        assert report.layers and all(attention.kernel == "fused" for attention in report.attention)
        if entry.graph == "decoder":
            assert [profile.name for profile in entry.profiles] == ["prompt", "step"]
            assert len(report.attention) > layers  # its own and the gated blocks'
            assert entry.profiles[0].axes["visual_length"][-1] == -(-40 * tokens // VISUAL_MULTIPLE) * VISUAL_MULTIPLE
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("artifact", [("tiny", "float16")], indirect=True, ids=str)
def test_fp8_engines(artifact: Path) -> None:
    samples = [{"pixel_values": np.ones((2, 3, 112, 112), np.float32), "tile_positions": np.array([[0, 0], [-1, -1]])}]
    activations = measure_vision_activations(artifact, samples)
    arguments = {"flavor": "rtx", "sms": [89, 120], "graphs": ["vision"]}
    plain = export_tensorrt(artifact, **arguments)
    entries = export_tensorrt(artifact, **arguments, precision="fp8", activations=activations)
    for entry, reference in zip(entries, plain, strict=True):
        assert entry.precision == "fp8" and entry.decomposed == ()
        assert entry.bytes < 0.95 * reference.bytes  # matrices are half as large, the patch embedding is not
    with pytest.raises(ExportError, match="needs activations"):
        export_tensorrt(artifact, **arguments, precision="fp8")
    with pytest.raises(ExportError, match="applies to vision"):
        export_tensorrt(artifact, flavor="rtx", sms=[89], graphs=["decoder"], precision="fp8", activations=activations)
    with pytest.raises(ExportError, match="name no input"):
        export_tensorrt(artifact, **arguments, precision="fp8", activations={"nothing": 1.0})
    _progress_cancel_and_errors(artifact)


def _progress_cancel_and_errors(artifact: Path) -> None:
    index = (artifact / FOLDER / INDEX).read_bytes()
    files = sorted((artifact / FOLDER).iterdir())
    stages: list[str] = []
    stop = {"flavor": "rtx", "sms": [80], "graphs": ["cross_kv"]}
    with pytest.raises(build.BuildCancelledError, match="cross_kv engine was cancelled"):
        export_tensorrt(
            artifact, **stop, cancelled=lambda: len(stages) > 3, progress=lambda stage, done, total: stages.append(stage)
        )
    assert len(stages) > 3 and all(stage.startswith("cross_kv: ") for stage in stages)
    # Nothing was added, and what was there is whole.
    assert sorted((artifact / FOLDER).iterdir()) == files and (artifact / FOLDER / INDEX).read_bytes() == index
    for arguments, error, message in (
        ({"precision": "bfloat16"}, ExportError, "the artifact is float16"),
        ({"graphs": ["tower"]}, ExportError, "the artifact has vision, cross_kv, decoder"),
        ({"plugins": True}, ExportError, "TensorRT-RTX builds no engines with Python"),
        ({"sms": [90]}, ProviderError, "no engines for SM 90; it takes 75, 80, 86, 89, 120, 121"),
        ({"profiles": "huge"}, LimitError, "choose one of"),
        ({"profiles": [Limits("p", tiles=(2000, 2000, 2000))]}, LimitError, "lies outside"),
        ({"out": artifact}, ExportError, "leave out the second folder"),
    ):
        with pytest.raises(error, match=message):
            export_tensorrt(artifact, **({"flavor": "rtx", "sms": [89]} | arguments))
    if not torch.cuda.is_available():
        with pytest.raises(ProviderError, match="name the targets"):
            export_tensorrt(artifact, flavor="rtx")


def build_toy(nodes: list[onnx.NodeProto], folder: Path, **changes: object) -> build.BuiltEngine:
    kind = {"x": (GRAPHS.FLOAT, ["n", 8])}
    model = GRAPHS.make_graph(nodes, kind, {"y": kind["x"]})
    graph = build.EngineGraph(SPEC, model, GRAPHS.save(model, folder), (PROFILE,), "float32")
    return build.build_engine(load_flavor("rtx"), graph, (89,), build.BuildOptions(**changes))


def test_toy_engine_and_options(tmp_path: Path) -> None:
    built = build_toy(
        [helper.make_node("Tanh", ["x"], ["y"], name="tanh")],
        tmp_path,
        optimization_level=1,
        workspace_bytes=2**20,
        refit=True,
    )
    assert built.engine and [layer.nodes for layer in built.report.layers if layer.nodes] == [("tanh",)]


def test_parser_errors_name_the_node(tmp_path: Path) -> None:
    model = GRAPHS.make_graph(
        [helper.make_node("Bernoulli", ["x"], ["y"], name="dice")],
        {"x": (GRAPHS.FLOAT, ["n", 8])},
        {"y": (GRAPHS.FLOAT, ["n", 8])},
        22,
    )
    graph = build.EngineGraph(SPEC, model, GRAPHS.save(model, tmp_path), (PROFILE,), "float32")
    with pytest.raises(InvalidGraphError, match="refuses the toy graph: dice"):
        build.build_engine(load_flavor("rtx"), graph, (89,), build.BuildOptions())


def test_a_failed_build_says_why(tmp_path: Path) -> None:
    """Attention in float32 has no fused kernel: without leave to take it apart, the build fails."""
    shape = ["n", 2, 64, 64]
    spec = GraphSpec("toy", (TensorSpec("x", "float32", ("n", 2, 64, 64)),), ())
    nodes = [
        helper.make_node("Tanh", ["x"], ["k"], name="tanh"),
        helper.make_node("Attention", ["x", "k", "x"], ["y"], name="attention"),
    ]
    model = GRAPHS.make_graph(nodes, {"x": (GRAPHS.FLOAT, shape)}, {"y": (GRAPHS.FLOAT, shape)})
    flavor, options = load_flavor("rtx"), build.BuildOptions()
    graph = build.EngineGraph(spec, model, GRAPHS.save(model, tmp_path), (PROFILE,), "float32")
    with pytest.raises(ExportError, match="cannot build the toy engine: "):
        build.build_engine(flavor, graph, (89,), options)
    graph = dataclasses.replace(graph, model=prepare.prepare_graph(model))
    built = build.build_engine(flavor, graph, (89,), options)
    assert built.report.decomposed == ("attention",)


def test_an_unwritable_folder_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = type("M", (), {"graph_files": {"toy": "toy.onnx"}, "files": {"toy.onnx": {"sha256": "s"}}})
    graph = build.EngineGraph(SPEC, onnx.ModelProto(), tmp_path / "toy.onnx", (PROFILE,), "float32")
    job = exporter.EngineJob(
        tmp_path / "missing", manifest, load_flavor("rtx"), (89,), None, False, None, build.BuildOptions()
    )
    built = build_toy([helper.make_node("Tanh", ["x"], ["y"], name="tanh")], tmp_path)
    with pytest.raises(OSError, match=r"engine cannot be written: No such file or directory"):
        exporter._store(job, graph, built)


def test_the_parser_finds_our_plugins() -> None:
    """By op type and namespace, with the attributes in the form that the plugins read."""
    case = Path(__file__).with_name("tensorrt_rtx_plugin_case.py")
    result = subprocess.run([sys.executable, str(case)], capture_output=True, text=True)
    scale = {"scale": ["FLOAT32", [0.125]]}
    assert json.loads(result.stdout.splitlines()[-1]) == [
        ["SubimageAttention", "first", scale | {"is_causal": ["INT32", [1]]}],
        ["SubimageAttentionPacked", "second", scale | {"is_causal": ["INT32", [0]]}],
        ["IntervalAttention", "third", scale],
    ], result.stderr[-2000:]
