"""What the TensorRT export writes and says: reports, the index of engines, timing caches, errors, the documents' table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from infimm_fast.export import load
from infimm_fast.export.common.artifact import Manifest, write_manifest
from infimm_fast.export.common.errors import ArtifactError, ExportError, ProviderError
from infimm_fast.export.models.infimm_hd import InfiMMHD
from infimm_fast.export.to_tensorrt import build, engines, matrix, profiles, report
from infimm_fast.export.to_tensorrt import flavors as flavors_module
from infimm_fast.models.infimm_hd.presets import preset

LOG = [
    "Name: __myl_Tran_myl1_3, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,65] }], Constants: [], Outputs: [], "
    "TacticName: k_0x1, StreamId: 0, Metadata: [ONNX Layer: attention_1][ONNX Layer: transpose]",
    "Name: _gemm_mha_v2_myl1_4, LayerType: kgen, Inputs: [], TacticName: _gemm_mha_v2_0x2, StreamId: 0, Metadata: "
    "[ONNX Layer: attention_1]",
    "Name: fc_myl2_5, LayerType: gemm, Inputs: [], TacticName: , StreamId: 0, Metadata: [ONNX Layer: attention_1]",
    "Name: fc_myl1_6, LayerType: gemm, Inputs: [], TacticName: , StreamId: 0, Metadata: [ONNX Layer: attention_2]",
    "Name: infimm_attention_3, LayerType: PluginV3, Inputs: [], TacticName: , Metadata: [ONNX Layer: attention_3]",
    "something else",
]


def test_report_of_a_log() -> None:
    nodes = {"attention_1": False, "attention_2": False, "attention_3": True}
    made = report.report_from_log(LOG[:2] + LOG[3:], nodes)
    assert [entry.kernel for entry in made.attention] == ["fused", "decomposed", "plugin"]
    assert (
        made.decomposed == ("attention_2",)
        and len(made.layers) == 4
        and made.layers[0].nodes == ("attention_1", "transpose")
    )
    # Fused for one profile and not for the next is not fused.
    assert report.report_from_log(LOG, nodes).decomposed == ("attention_1", "attention_2")
    table = made.table()
    assert "4 layers" in table and "attention_2" in table and "1 decomposed" in table
    assert report.EngineReport.from_json(json.loads(json.dumps(made.to_json()))) == made
    with pytest.raises(ExportError, match="no table of layers"):
        report.report_from_log(["nothing"], nodes)


def test_a_report_that_cannot_be_read_loses_no_engine() -> None:
    trt = SimpleNamespace(Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda content: None))
    logger = SimpleNamespace(problems=["out of memory"], layers=[])
    for name, reason in (("tensorrt", "cannot load the engine that it built: out of memory"), ("rtx", "no table of layers")):
        made = build._report(flavors_module.Flavor(name, trt, "1.0"), logger, memoryview(b""), {"attention_1": False})
        assert reason in made.source and made.attention[0].kernel == "unknown" and made.decomposed == ()
        assert "1 unknown" in made.table()


def test_report_of_the_inspector() -> None:
    layers = [
        {"Name": "_gemm_mha_v2_myl0_1", "LayerType": "kgen", "TacticName": "t", "Metadata": "[ONNX Layer: attention_1]"},
        {"Name": "other", "LayerType": "gemm"},
    ]
    made = report.report_from_inspector(json.dumps({"Layers": layers}), {"attention_1": False, "attention_2": False})
    assert made.source == "inspector" and made.decomposed == ("attention_2",)
    with pytest.raises(ExportError, match="cannot be read"):
        report.report_from_inspector("{", {})
    with pytest.raises(ExportError, match="cannot be read"):
        report.report_from_inspector('{"Layers": ["name only"]}', {})


def entry_of(**changes: object) -> engines.EngineEntry:
    values = {
        "graph": "vision", "flavor": "tensorrt", "version": "10.16.1.11", "sms": (90,), "precision": "float16",
        "plugins": False,
        "profiles": (profiles.Profile("prompt", {"num_tiles": (1, 10, 40)}),), "options": {}, "bytes": 4, "sha256": "s",
        "graph_sha256": "g",
    }  # fmt: skip
    return engines.EngineEntry(**(values | changes))


def test_index_of_engines(tmp_path: Path) -> None:
    folder = tmp_path / engines.FOLDER
    folder.mkdir()
    assert engines.read_index(tmp_path) == []
    first, second = entry_of(), entry_of(sms=(86, 89), plugins=True)
    engines.write_index(tmp_path, [first])
    engines.write_index(tmp_path, [second])
    engines.write_index(tmp_path, [entry_of(sha256="new")])
    assert {entry.file: entry.sha256 for entry in engines.read_index(tmp_path)} == {first.file: "new", second.file: "s"}
    assert second.file == "vision.tensorrt-10.16.1.11.sm86-89.float16.plugins.engine"
    assert engines.read_index(tmp_path)[0].profiles == first.profiles

    def choose(version: str = "10.16.1.11", sm: int = 90, precision: str | None = None, sha: str | None = "g") -> object:
        return engines.choose_engine(tmp_path, "vision", "tensorrt", version, sm, precision, sha)

    with pytest.raises(ArtifactError, match="is missing; build it again"):
        choose()
    (folder / first.file).write_bytes(b"abc")
    with pytest.raises(ArtifactError, match="has 3 of 4 bytes"):
        choose()
    (folder / first.file).write_bytes(b"abcd")
    assert choose().sms == (90,)
    with pytest.raises(ArtifactError, match="another vision graph"):
        choose(sha="other")
    for arguments in ({"version": "11.4.0.106"}, {"sm": 120}, {"precision": "fp8"}):
        with pytest.raises(ProviderError, match=r"has no vision engine of .*infimm-fast export tensorrt"):
            choose(**arguments)
    with pytest.raises(ArtifactError, match=r"report\.json cannot be read"):
        engines.read_report(tmp_path, first)
    (folder / engines.INDEX).write_text('{"format_version": 1, "engines": [{}]}')
    with pytest.raises(ArtifactError, match="damaged"):
        engines.read_index(tmp_path)
    (folder / engines.INDEX).write_text('{"format_version": 99, "engines": []}')
    with pytest.raises(ArtifactError, match="format 99"):
        engines.read_index(tmp_path)


def test_missing_and_wrong_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(**modules: object) -> None:
        def find(name: str) -> object:
            if name not in modules:
                raise ModuleNotFoundError(name, name=name)
            if isinstance(modules[name], Exception):
                raise modules[name]
            return modules[name]

        monkeypatch.setattr(flavors_module.importlib, "import_module", find)

    install()
    for name, extra in (("tensorrt", "infimm-fast.tensorrt."), ("rtx", "infimm-fast.tensorrt-rtx.")):
        with pytest.raises(ProviderError, match=f"not installed.*{extra}"):
            flavors_module.load_flavor(name)
    with pytest.raises(ProviderError, match="choose one of tensorrt, rtx"):
        flavors_module.load_flavor("cuda")
    install(tensorrt=ImportError("libnvinfer.so.10: cannot open"))
    with pytest.raises(ProviderError, match=r"cannot be loaded \(libnvinfer"):
        flavors_module.load_flavor("tensorrt")
    install(tensorrt=SimpleNamespace(__version__="9.1.0", Builder=None))
    with pytest.raises(ProviderError, match=r"TensorRT 9.1.0 is installed; supported are 10.x and 11.x"):
        flavors_module.load_flavor("tensorrt")
    install(tensorrt=SimpleNamespace(__version__="11.4.0", Builder=None))
    flavor = flavors_module.load_flavor("tensorrt")
    assert flavor.major == 11
    monkeypatch.setattr(flavors_module, "local_sm", lambda: None)
    with pytest.raises(ProviderError, match="needs a CUDA GPU"):
        flavor.target_sms(None)
    monkeypatch.setattr(flavors_module, "local_sm", lambda: 90)
    assert flavor.target_sms(None) == (90,)
    with pytest.raises(ProviderError, match="it is SM 90; SM 89 was asked for"):
        flavor.target_sms([89])


def test_providers_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner's messages on a machine that lacks something; nothing falls back."""
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    (artifact / "vision.onnx").write_text("never read")
    spec = InfiMMHD().specs(preset("tiny"), "float32")["vision"]
    manifest = Manifest("model", "onnx", "float32", {"vision": spec}, {"vision": "vision.onnx"}, {})
    write_manifest(artifact, manifest, ["vision.onnx"])
    import_module = importlib.import_module

    def find(name: str, *rest: object) -> object:
        if name == "tensorrt_rtx":
            return SimpleNamespace(__version__="1.7.1.116", Builder=None)
        if name == "tensorrt":
            raise ModuleNotFoundError(name, name=name)
        return import_module(name, *rest)

    monkeypatch.setattr(flavors_module.importlib, "import_module", find)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ProviderError, match=r"TensorRT cannot be used: it is not installed; pip install"):
        load(artifact, provider="tensorrt")
    with pytest.raises(ProviderError, match="needs a CUDA GPU"):
        load(artifact, provider="tensorrt-rtx")
    with pytest.raises(ProviderError, match="is an artifact for onnx"):
        load(artifact, provider="aoti")
    with pytest.raises(ProviderError, match="has no TensorrtExecutionProvider"):
        load(artifact, provider="ort-tensorrt")
    with pytest.raises(ProviderError, match="is not known; choose one of"):
        load(artifact, provider="rocm")


class FakeConfig:
    """A builder configuration that takes a cache if its content is right."""

    def create_timing_cache(self, content: bytes) -> object:
        return content if content in (b"", b"good") else None

    def set_timing_cache(self, cache: object, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return True

    def get_timing_cache(self) -> object:
        return SimpleNamespace(serialize=lambda: b"good")


def test_timing_cache(tmp_path: Path) -> None:
    flavor = flavors_module.Flavor("tensorrt", SimpleNamespace(), "10.16.1.11")
    file = tmp_path / "folder" / "timing.cache"
    for _ in range(2):  # fresh, then read back
        build.TimingCache(flavor, FakeConfig(), file).write()
        assert file.read_bytes() == b"good" and list(file.parent.iterdir()) == [file]
    file.write_bytes(b"from another GPU")
    with pytest.raises(ExportError, match=r"timing.cache is no timing cache of TensorRT 10.16.1.11 on this GPU; remove it"):
        build.TimingCache(flavor, FakeConfig(), file)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written|Not a directory|File exists"):
        build.TimingCache(flavor, FakeConfig(), tmp_path / "file" / "timing.cache")  # before the build, not after it
    nothing = flavors_module.Flavor("rtx", SimpleNamespace(), "1.7")
    build.TimingCache(nothing, None, tmp_path / "unused").write()
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("document", ("README.md", "docs/tensorrt.md"))
def test_documents_show_what_was_stored(document: str) -> None:
    root = Path(__file__).parents[2]
    stored = json.loads((root / "docs" / "export_results.json").read_text())
    text = (root / document).read_text()
    assert matrix.replace_table(text, matrix.render(stored)) == text
    failed = [(row, cell) for row, cells in stored["rows"].items() for cell in cells.values() if cell.startswith("failed")]
    assert failed == []
    with pytest.raises(ArtifactError, match="no lines"):
        matrix.replace_table("nothing", "table")
