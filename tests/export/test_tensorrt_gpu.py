"""With TensorRT and a GPU: engines are built, run and compared with PyTorch, with and without our kernels inside.

``INFIMM_FAST_TENSORRT_FLAVOR=rtx`` does the same with TensorRT-RTX.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx", reason="needs onnx")

from infimm_fast.export.common.artifact import load_manifest
from infimm_fast.export.common.errors import ArtifactError, LimitError, ProviderError
from infimm_fast.export.models.infimm_hd import InfiMMHD
from infimm_fast.export.models.infimm_hd_graphs import graph_modules
from infimm_fast.export.to_onnx.export import export_onnx
from infimm_fast.export.to_tensorrt.backend import TensorRTBackend
from infimm_fast.export.to_tensorrt.engines import FOLDER
from infimm_fast.export.to_tensorrt.export import export_tensorrt, measure_vision_activations
from infimm_fast.kernels.common.numerics import assert_error_budget
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.presets import preset
from interpreter import load_file

FLAVOR = os.environ.get("INFIMM_FAST_TENSORRT_FLAVOR", "tensorrt")
pytestmark = [
    pytest.mark.gpu,
    *([pytest.mark.tensorrt] if FLAVOR == "tensorrt" else []),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
AOTI = load_file(Path(__file__).with_name("test_aoti.py"))
SIZES = {
    "vision": [{"num_tiles": 1}, {"num_tiles": 10}, {"num_tiles": 40}],
    "cross_kv": [{"num_tiles": 1}, {"num_tiles": 10}],
    "decoder": [
        {"batch_size": 1, "sequence_length": 9, "past_sequence_length": 0, "visual_length": 656},
        {"batch_size": 2, "sequence_length": 1, "past_sequence_length": 30, "visual_length": 72},
    ],
}


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = InfiMMHDForConditionalGeneration._from_config(preset("tiny"), dtype=getattr(torch, request.param))
    return export_onnx(model.eval(), tmp_path_factory.mktemp("tensorrt") / request.param, verify=False)


def check_engines(folder: Path, **options: object) -> None:
    """Compare every graph with PyTorch in the same dtype, both against float64."""
    manifest = load_manifest(folder)
    backend = TensorRTBackend(folder, manifest, FLAVOR, **options)
    torch.manual_seed(0)
    model = InfiMMHDForConditionalGeneration._from_config(preset("tiny"), dtype=getattr(torch, manifest.dtype)).eval()
    exact, plain = graph_modules(model.double()), None
    torch.manual_seed(0)
    low = InfiMMHDForConditionalGeneration._from_config(preset("tiny"), dtype=getattr(torch, manifest.dtype)).eval()
    plain = graph_modules(low.cuda())
    for graph, cases in SIZES.items():
        spec = manifest.graphs[graph]
        for sizes in cases:
            wide = AOTI.inputs_of(InfiMMHD().specs(model.config, "float32")[graph], model.config, sizes)
            inputs = {tensor.name: wide[tensor.name].to(tensor.torch_dtype) for tensor in spec.inputs}
            flat = [inputs[tensor.name] for tensor in spec.inputs]
            names = [tensor.name for tensor in spec.outputs]
            with torch.no_grad():
                want = exact[graph](*spec.nest([x.double() if x.is_floating_point() else x for x in flat]))
                rough = plain[graph](*spec.nest([x.cuda() for x in flat]))
            want, rough = (result if isinstance(result, list) else [result] for result in (want, rough))
            for _ in range(3):  # the second run captures, the third replays
                actual = backend.run(graph, inputs, names)
            for name, good, other in zip(names, want, rough, strict=True):
                assert_error_budget(f"{graph} {name} {sizes}", actual[name], other.cpu(), good)


def test_engines(artifact: Path) -> None:
    entries = export_tensorrt(artifact, flavor=FLAVOR)
    assert all(entry.decomposed == () for entry in entries)
    check_engines(artifact)
    check_engines(artifact, cuda_graphs=4)
    manifest = load_manifest(artifact)
    backend = TensorRTBackend(artifact, manifest, FLAVOR)
    inputs = AOTI.inputs_of(manifest.graphs["vision"], preset("tiny"), {"num_tiles": 41})
    with pytest.raises(LimitError, match="num_tiles=41 lie outside every profile"):
        backend.run("vision", inputs)
    file = artifact / FOLDER / entries[0].file
    file.write_bytes(b"\0" * entries[0].bytes)
    with pytest.raises(ArtifactError, match="cannot load"):
        TensorRTBackend(artifact, manifest, FLAVOR)


@pytest.mark.skipif(FLAVOR != "tensorrt", reason="TensorRT-RTX has no Python ahead-of-time plugins")
def test_engines_with_our_kernels(artifact: Path) -> None:
    entries = export_tensorrt(artifact, plugins=True)
    assert all(entry.plugins for entry in entries)
    check_engines(artifact)


def test_fp8_engine(artifact: Path) -> None:
    """FP8 is rougher than the budget of 16 bits; its features must still point where they should."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9 for FP8")
    manifest = load_manifest(artifact)
    spec = manifest.graphs["vision"]
    inputs = AOTI.inputs_of(spec, preset("tiny"), {"num_tiles": 4})
    reference = TensorRTBackend(artifact, manifest, FLAVOR, precision=manifest.dtype).run(
        "vision", inputs, ["image_features"]
    )
    if manifest.dtype == "bfloat16":
        pytest.skip("activations are measured on float16")
    activations = measure_vision_activations(artifact, [{name: value.numpy() for name, value in inputs.items()}])
    export_tensorrt(artifact, flavor=FLAVOR, precision="fp8", graphs=["vision"], activations=activations)
    actual = TensorRTBackend(artifact, manifest, FLAVOR, precision="fp8").run("vision", inputs, ["image_features"])
    pair = (reference["image_features"].float().flatten(), actual["image_features"].float().flatten())
    assert torch.nn.functional.cosine_similarity(*pair, dim=0) > 0.99


def test_weight_streaming(artifact: Path) -> None:
    manifest = load_manifest(artifact)
    with pytest.raises(ProviderError, match="built without weight streaming"):
        TensorRTBackend(artifact, manifest, FLAVOR, weight_budget=0)
    export_tensorrt(artifact, flavor=FLAVOR, weight_streaming=True)
    check_engines(artifact, weight_budget=0)
