"""Families and providers from a user's own code, and what is said of those that nobody registered."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

import torch
from torch import nn

from infimm_fast.export import (
    ExportError,
    Family,
    GraphSpec,
    TensorSpec,
    export_onnx,
    load,
    register_family,
    register_provider,
)
from infimm_fast.export.common import family as family_module
from infimm_fast.export.common.cases import random_cases
from infimm_fast.export.common.errors import ArtifactError, LimitError, ProviderError
from infimm_fast.export.runtime import providers

SCALE = GraphSpec("scale", (TensorSpec("x", "float32", ("rows", 4)),), (TensorSpec("scaled", "float32", ("rows", 4)),))
SHIFT = GraphSpec("shift", (TensorSpec("scaled", "float32", ("rows", 4)),), (TensorSpec("y", "float32", ("rows", 4)),))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)


class ToyFamily(Family):
    name, model_class, graphs = "toy", "Toy", ("scale", "shift")

    def specs(self, config, dtype):
        return {"scale": SCALE, "shift": SHIFT}

    def modules(self, model):
        return {"scale": model.scale, "shift": model.shift}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    model = Toy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family_module, "_FAMILIES", dict(family_module._families()))
        register_family(ToyFamily())
        return model, export_onnx(model, tmp_path_factory.mktemp("toy") / "toy", limits={"rows": (1, 9)})


@pytest.fixture
def toy(artifact, monkeypatch):
    """A model of a registered family and its artifact; both tables are put back afterwards."""
    monkeypatch.setattr(family_module, "_FAMILIES", dict(family_module._families()))
    monkeypatch.setattr(providers, "_PROVIDERS", dict(providers._PROVIDERS))
    register_family(ToyFamily())
    return artifact


def test_a_family_is_verified_loaded_and_run(toy):
    model, folder = toy
    report = json.loads((folder / "verification.json").read_text())
    assert report["passed"] and list(report["graphs"]["shift"]["cases"]) == ["sample", "one longer", "of size 1"]
    assert model.training  # as it was given
    exported, x = load(folder, threads=1), torch.randn(7, 4)
    actual = exported.compute("shift", **exported.run("scale", {"x": x}))["y"]
    assert torch.allclose(actual, model.shift(model.scale(x)), atol=1e-6)
    with pytest.raises(LimitError, match="rows is 10; this artifact takes 1 to 9"):
        exported.run("scale", {"x": torch.randn(10, 4)})
    with pytest.raises(LimitError, match=r"x is torch\.float64; scale takes torch\.float32"):
        exported.run("scale", {"x": x.double()})
    with pytest.raises(ArtifactError, match="no rotate graph; it has scale, shift"):
        exported.run("rotate", {})
    with pytest.raises(ArtifactError, match="no processor"):
        exported.processor.decode([1])


def test_arguments_are_the_familys(toy, tmp_path):
    model, _ = toy
    for options, message in (
        ({"graphs": ("rotate",)}, "choose from scale, shift"),
        ({"limits": {"columns": (1, 2)}}, "'columns'"),
        ({"limits": {"rows": (0, 2)}}, "the axes start at"),
    ):
        with pytest.raises(ExportError, match=message):
            export_onnx(model, tmp_path / "out", **options)
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    with pytest.raises(ExportError, match="does not load"):
        export_onnx(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ExportError, match="model_type 'llama'; known are infimm_hd, toy"):
        export_onnx(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="names no model_type"):
        export_onnx(tmp_path, tmp_path / "out")


def test_an_artifact_of_a_family_that_is_not_registered(toy, monkeypatch):
    _, folder = toy
    monkeypatch.delitem(family_module._FAMILIES, "toy")
    with pytest.raises(ArtifactError, match="family 'toy' is not registered; known are infimm_hd"):
        load(folder)


def test_a_family_without_a_name_is_refused():
    with pytest.raises(ExportError, match="needs a name"):
        register_family(Family())


def test_tokens_are_not_made_of_random_numbers():
    spec = GraphSpec("decoder", (TensorSpec("input_ids", "int64", ("rows", 4)),), ())
    with pytest.raises(ExportError, match="must declare cases, since input_ids"):
        random_cases(spec, {"rows": 3})


def test_inputs_with_one_name_before_the_dot_are_one_list():
    names = ("ids", "past.0.key", "past.0.value", "past.1.key", "cross.0.key", "mask")
    spec = GraphSpec("decoder", tuple(TensorSpec(name, "float32", (1,)) for name in names), ())
    assert spec.nest(range(6)) == (0, [1, 2, 3], [4], 5)


def test_a_provider_is_given_the_artifact_and_its_options(toy):
    _, folder = toy
    seen = []

    def open_counting(opening):
        seen.append(opening)
        return providers.open_backend(providers.Opening(opening.folder, opening.manifest, "cpu"))

    register_provider("counting", open_counting)
    exported = load(folder, "counting", device_id=3, threads=2, provider_options={"depth": 5})
    assert exported.compute("scale", x=torch.ones(1, 4))["scaled"].shape == (1, 4)
    (opening,) = seen
    assert (opening.folder, opening.provider, opening.device_id, opening.threads) == (folder, "counting", 3, 2)
    assert opening.manifest.family == "toy" and opening.options == {"depth": 5}
    with pytest.raises(ExportError, match="provider 'counting' already"):
        register_provider("counting", open_counting)


def test_providers_say_what_is_accepted(toy):
    _, folder = toy
    with pytest.raises(ProviderError, match=r"'rocm' is not known; choose one of cpu, cuda, .*tensorrt-rtx, aoti$"):
        load(folder, "rocm")
    register_provider("packages", lambda opening: None, target="aoti")
    with pytest.raises(ProviderError, match="an artifact for onnx, which provider='packages' does not run; use 'cpu', "):
        load(folder, "packages")


def test_a_users_family_replaces_one_of_the_package():
    """In a fresh process, where those of the package are not registered yet."""
    code = """
from infimm_fast.export import Family, register_family
from infimm_fast.export.common.family import family_of

class Mine(Family):
    name, model_class, graphs = "infimm_hd", "InfiMMHDForConditionalGeneration", ("one",)

class InfiMMHDForConditionalGeneration: pass

register_family(Mine())
print(type(family_of(InfiMMHDForConditionalGeneration())).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "Mine\n"


def test_the_common_part_and_the_declarations_import_no_model():
    modules = "common.family, common.generation, common.prepared, common.verify, models, runtime.loading"
    code = "import sys\n" + "".join(f"import infimm_fast.export.{name}\n" for name in modules.split(", "))
    code += "print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers", "onnx", "onnxruntime", "infimm_fast.models.infimm_hd"} & set(loaded)
