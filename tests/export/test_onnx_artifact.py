"""An exported folder: what is in it, that it gives PyTorch's answers, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs typer")
pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

import onnx
import torch
from typer.testing import CliRunner

from infimm_fast.cli import app
from infimm_fast.errors import ImageCountError
from infimm_fast.export import load
from infimm_fast.export.common.artifact import load_manifest, verify_files
from infimm_fast.export.common.errors import ArtifactError, LimitError, ProviderError, ToleranceError
from infimm_fast.export.common.prepared import PreparedExport
from infimm_fast.export.models.infimm_hd import InfiMMHD
from infimm_fast.export.to_onnx.verification import verify_onnx

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")


def change_manifest(folder, **changes):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_names_and_axes(artifact):
    wanted = {
        "vision": (
            {"pixel_values": ["num_tiles", 3, 112, 112], "tile_positions": ["num_tiles", 2]},
            {"image_features": ["num_tiles", 65, 224]},
        ),
        "cross_kv": (
            {"image_features": ["num_tiles", 65, 224]},
            {f"cross_key_values.0.{part}": ["visual_length", 12, 64] for part in ("key", "value")},
        ),
        "decoder": (
            {
                "input_ids": ["batch_size", "sequence_length"],
                "attention_mask": ["batch_size", "total_sequence_length"],
                "position_ids": ["batch_size", "sequence_length"],
                "kv_range": ["batch_size", "sequence_length", 2],
                "has_image": ["batch_size"],
                **{f"past_key_values.0.{p}": ["batch_size", 4, "past_sequence_length", 32] for p in ("key", "value")},
                **{f"cross_key_values.0.{part}": ["visual_length", 12, 64] for part in ("key", "value")},
            },
            {
                "logits": ["batch_size", "sequence_length", 264],
                **{f"present.0.{part}": ["batch_size", 4, "total_sequence_length", 32] for part in ("key", "value")},
            },
        ),
    }
    for name, (inputs, outputs) in wanted.items():
        graph = onnx.load(artifact / "onnx" / f"{name}.onnx", load_external_data=False).graph
        for values, expected in ((graph.input, inputs), (graph.output, outputs)):
            shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
            assert shapes == expected


def test_our_ops_are_nodes_with_bodies(artifact):
    for name, op in (("vision", "SubimageAttention"), ("decoder", "IntervalAttention")):
        model = onnx.load(artifact / "onnx" / f"{name}.onnx", load_external_data=False)
        nodes = [node.op_type for node in model.graph.node if node.domain == "infimm"]
        assert nodes == [op] and [function.name for function in model.functions] == [op]
    names = {node.op_type for node in model.graph.node}
    assert {"Attention", "RMSNormalization", "RotaryEmbedding"} <= names


def test_weights_carry_the_names_of_the_checkpoint_and_are_stored_once(artifact, model):
    parameters = {name for name, _ in model.named_parameters()}
    stored = 0
    for file in (artifact / "onnx").glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        names = {tensor.name.removesuffix(".transposed") for tensor in graph.initializer if tensor.external_data}
        assert any(name in parameters for name in names)
        assert not any(node.op_type == "Transpose" and node.input[0] in names for node in graph.node)
        stored += file.with_suffix(".data").stat().st_size
    assert stored < 1.02 * sum(parameter.nbytes for parameter in model.parameters())


def test_the_manifest_and_the_report(artifact):
    manifest = load_manifest(artifact)
    assert manifest.verified and manifest.options["opset"] == 23 and {"torch", "onnx"} <= set(manifest.versions)
    report = json.loads((artifact / "verification.json").read_text())
    assert report["passed"] and set(report["graphs"]) == {"vision", "cross_kv", "decoder"}
    cases = report["graphs"]["decoder"]["cases"]
    assert len(cases) >= 5 and cases["one token, nothing before"]["axes"]["past_sequence_length"] == 0
    assert report["graphs"]["vision"]["cases"]["10 tiles"]["axes"] == {"num_tiles": 10}
    assert set(verify_files(artifact)) == set(manifest.files)


def test_greedy_tokens_are_pytorchs(model, exported, check_tokens):
    check_tokens(model, exported)


def test_text_alone(model, exported, processor):
    inputs = processor(text=["No picture", "None here either"])
    length = inputs["input_ids"].shape[1]
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, length:]
    assert torch.equal(exported.generate_tokens(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=4), expected)


def test_generate_streams_and_encodes_once(exported, pictures, processor, model):
    answer = exported.generate(pictures[1], "What is this?", max_new_tokens=5)
    assert "".join(exported.stream(pictures[1], "What is this?", max_new_tokens=5)) == answer
    encoded = exported.encode(pictures[1])
    assert exported.generate(None, "What is this?", encoded=encoded, max_new_tokens=5) == answer
    both = exported.generate([[pictures[1]], []], ["<image>Hm?", "And you?"], chat=False, max_new_tokens=3)
    assert len(both) == 2
    sampled = [exported.generate(None, "Hm?", max_new_tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    narrow = exported.generate(None, "Hm?", max_new_tokens=8, temperature=2.0, top_p=1e-6, seed=3)
    assert narrow == exported.generate(None, "Hm?", max_new_tokens=8)


def test_generation_ends_at_the_end_token(copy, exported, batch):
    encoded = exported.encode_tiles(batch["pixel_values"], batch["image_grids"], batch["image_counts"])
    free = exported.generate_tokens(batch["input_ids"], batch["attention_mask"], encoded, max_new_tokens=4)
    end = int(free[0, 1])
    change_manifest(copy, generation={"eos_token_id": [end], "pad_token_id": 7})
    model = load(copy, threads=2)
    encoded = model.encode_tiles(batch["pixel_values"], batch["image_grids"], batch["image_counts"])
    tokens = model.generate_tokens(batch["input_ids"], batch["attention_mask"], encoded, max_new_tokens=4)
    first = (free == end).int().argmax(1)
    for row in range(len(free)):
        last = int(first[row]) if (free[row] == end).any() else 3
        assert torch.equal(tokens[row, : last + 1], free[row, : last + 1])
        assert (tokens[row, last + 1 :] == 7).all()


def test_pictures_and_prompts_must_fit(exported, pictures, batch):
    with pytest.raises(ImageCountError, match="2 prompts, but images for 1"):
        exported.generate(pictures[:2], ["one", "two"])
    with pytest.raises(ImageCountError, match=r"\[1\] <image> tokens, but there are \[0\] images"):
        exported.generate(None, "<image>?", chat=False)
    with pytest.raises(ImageCountError, match="rows have"):
        exported.generate_tokens(batch["input_ids"], batch["attention_mask"])


def test_shapes_outside_the_limits(copy, exported, batch):
    with pytest.raises(LimitError, match="4096"):
        exported.generate(None, "Hm?", max_new_tokens=5000)
    with pytest.raises(LimitError, match="pixel_values has shape"):
        exported.encode_tiles(torch.zeros(1, 3, 56, 56), torch.tensor([[1, 1]]), torch.tensor([1]))
    limits = json.loads((copy / "manifest.json").read_text())["limits"]
    change_manifest(copy, limits=limits | {"num_tiles": [1, 3]})
    with pytest.raises(LimitError, match="num_tiles is 12; this artifact takes 1 to 3"):
        load(copy, threads=2).encode_tiles(batch["pixel_values"], batch["image_grids"], batch["image_counts"])


@pytest.mark.parametrize("name", ("onnx/decoder.data", "onnx/vision.onnx", "processor/tokenizer.json"))
def test_a_changed_byte_is_found(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=name):
        load(copy, verify=True)
    result = CliRunner().invoke(app, ["export", "verify", str(copy)])
    assert result.exit_code == 1


def test_folders_that_are_no_artifact(copy, tmp_path):
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        load(tmp_path)
    (copy / "onnx" / "vision.data").write_bytes(b"short")
    with pytest.raises(ArtifactError, match=r"vision\.data has 5 bytes"):
        load(copy)
    (copy / "onnx" / "vision.data").unlink()
    with pytest.raises(ArtifactError, match=r"vision\.data is missing"):
        load(copy)
    change_manifest(copy, format_version=99, versions={"infimm-fast": "9.9"})
    with pytest.raises(ArtifactError, match=r"format 99, written by infimm_fast 9\.9"):
        load(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        load(copy)


def test_providers_are_checked(copy):
    with pytest.raises(ProviderError, match="not known"):
        load(copy, provider="abacus")
    change_manifest(copy, dtype="bfloat16")
    with pytest.raises(ProviderError, match="does not run bfloat16"):
        load(copy, provider="cpu")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(ProviderError, match="has no CUDAExecutionProvider"):
            load(copy, provider="cuda")


def test_a_folder_without_a_graph(copy, batch):
    content = json.loads((copy / "manifest.json").read_text())
    change_manifest(copy, graphs={name: content["graphs"][name] for name in ("vision", "cross_kv")})
    model = load(copy, threads=2)
    assert model.encode_tiles(batch["pixel_values"], batch["image_grids"], batch["image_counts"]).visual_length == 784
    with pytest.raises(ArtifactError, match="no decoder graph"):
        model.generate(None, "Hm?")


def test_verification_finds_a_wrong_weight(copy, model):
    """Signs of a hundred numbers of the head flipped in the stored file: everything runs, the answers are wrong."""
    graph = onnx.load(copy / "onnx" / "decoder.onnx", load_external_data=False).graph
    entry = next(t for t in graph.initializer if t.name.startswith("language_model.lm_head"))
    place = {item.key: item.value for item in entry.external_data}
    content = bytearray((copy / "onnx" / "decoder.data").read_bytes())
    for position in range(int(place["offset"]) + 3, int(place["offset"]) + 400, 4):
        content[position] ^= 0x80
    (copy / "onnx" / "decoder.data").write_bytes(content)
    manifest, report = load_manifest(copy), {}
    family, specs = InfiMMHD(), {"decoder": manifest.graphs["decoder"]}
    limits = family.default_limits(model.config)
    prepared = PreparedExport(family, model, model.config, copy, "float32", specs, limits)
    with pytest.raises(ToleranceError, match="decoder, one tile: logits"):
        verify_onnx(prepared, manifest.graph_files, report)


def test_the_command_line(artifact, tmp_path):
    arguments = [str(ROOT / "examples" / "images" / "raccoon.jpg"), "Hm?", "--max-new-tokens", "3", "--verify"]
    result = CliRunner().invoke(app, ["run", str(artifact), *arguments])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["run", str(tmp_path), *arguments])
    assert result.exit_code == 1 and "Traceback" not in result.output
    result = CliRunner().invoke(app, ["export", "verify", str(artifact)])
    assert result.exit_code == 0 and "as they were written" in result.output
