"""Whole models in every form of export. Slow: PyTorch's tracing takes seconds for each graph."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs typer")
pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

import onnx
import torch
from typer.testing import CliRunner

import infimm_fast
from infimm_fast import InfiMMHDForConditionalGeneration, preset
from infimm_fast.cli import app
from infimm_fast.export import ExportError, export_module_onnx, export_onnx, load
from infimm_fast.export.common.verify import verify_graph
from infimm_fast.export.models.infimm_hd import InfiMMHD
from infimm_fast.integrations.optimization import optimize
from infimm_fast.models.infimm_hd.presets import PRESETS
from infimm_fast.models.infimm_hd.tokenization_bytes import byte_tokenizer
from onnx_models import make_config, make_model

ROOT = Path(__file__).parents[2]
FAMILY = InfiMMHD()
pytestmark = pytest.mark.slow


def initialisers(folder, graph):
    return onnx.load(folder / "onnx" / f"{graph}.onnx", load_external_data=False).graph.initializer


def test_float16_from_float32_weights(model, processor, tmp_path, check_tokens):
    folder = export_onnx(model, tmp_path / "out", dtype="float16", processor=processor)
    report = json.loads((folder / "verification.json").read_text())
    for entry in report["graphs"].values():
        assert entry["activations beyond half the range"] == []
        assert any("CUDAExecutionProvider" in provider for provider in entry["kernels"])
    check_tokens(model, load(folder, threads=2))


def test_bfloat16_is_checked_but_not_run(model, tmp_path):
    folder = export_onnx(model, tmp_path / "out", dtype="bfloat16")
    report = json.loads((folder / "verification.json").read_text())
    assert report["passed"] and "does not take bfloat16" in report["not run"]
    assert all("cases" not in entry and entry["kernels"] for entry in report["graphs"].values())
    weight = next(t for t in initialisers(folder, "decoder") if t.name.startswith("language_model.lm_head"))
    assert weight.data_type == onnx.TensorProto.BFLOAT16


def test_plain_standard_operators_of_another_opset(model, processor, tmp_path, check_tokens):
    folder = export_onnx(model, tmp_path / "out", plain=True, opset=24, processor=processor)
    for graph in ("vision", "cross_kv", "decoder"):
        content = onnx.load(folder / "onnx" / f"{graph}.onnx", load_external_data=False)
        assert not content.functions and {entry.domain for entry in content.opset_import} == {""}
    check_tokens(model, load(folder, threads=2))


def test_a_folded_model(processor, tmp_path, check_tokens):
    model = optimize(make_model(make_config(backend="reference")), fold=True)
    folder = export_onnx(model, tmp_path / "out", processor=processor)
    check_tokens(model, load(folder, threads=2))
    assert not any("ff_gate" in tensor.name for tensor in initialisers(folder, "decoder"))
    assert model.gated_blocks[0].folded is not None and model.gated_blocks[0].attn.backend == "auto"
    wide = FAMILY.cast(model, torch.float64)
    x = torch.randn(1, 2, 128).double()
    block, visual = wide.gated_blocks[0], torch.randn(3, 224).double()
    inputs = (torch.tensor([[[0, 3], [0, 0]]]), torch.tensor([True]), visual)
    assert block(x, *inputs).dtype == torch.float64 and model.gated_blocks[0].folded.q_weight.dtype == torch.float32
    with pytest.raises(ExportError, match="rounded twice"):
        export_onnx(model, tmp_path / "half", dtype="float16")


def test_weights_shared_with_the_checkpoint(model, processor, tmp_path, check_tokens):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with pytest.raises(ExportError, match="both the model and the output"):
        export_onnx(folder, tmp_path / "elsewhere", share_weights=True)
    before = (folder / "model.safetensors").read_bytes()
    export_onnx(folder, folder, share_weights=True, verify=False)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sum(file.stat().st_size for file in folder.glob("*.data")) < len(before) / 100
    check_tokens(model, load(folder, threads=2, verify=True))
    InfiMMHDForConditionalGeneration.from_pretrained(folder)


def test_the_resampler_and_grouped_keys_of_tiny_zephyr(tmp_path):
    config = preset("tiny-zephyr")
    config.text_config.num_hidden_layers, config.cross_attention_every_n_layers = 1, 1
    model = make_model(config)
    folder = export_onnx(model, tmp_path / "out", graphs=("vision", "decoder"))
    report = json.loads((folder / "verification.json").read_text())
    assert report["passed"] and len(report["graphs"]["decoder"]["cases"]) == 8


@pytest.mark.parametrize("family", ("clip", "siglip", "internvl"))
def test_vision_towers_of_transformers(family, tmp_path):
    import transformers

    infimm_fast.register_auto()
    sizes = {"hidden_size": 144, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 2}
    name, sides = {
        "clip": ("CLIPVision", {"image_size": 56, "patch_size": 14}),
        "siglip": ("SiglipVision", {"image_size": 56, "patch_size": 14}),
        "internvl": ("InternVLVision", {"image_size": [56, 56], "patch_size": [14, 14]}),
    }[family]
    config = getattr(transformers, f"{name}Config")(**sizes, **sides)
    torch.manual_seed(0)
    tower = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="infimm_fast").eval()
    folder = export_module_onnx(
        tower,
        {"pixel_values": torch.randn(3, 3, 56, 56)},
        tmp_path / "tower",
        dynamic_axes={"pixel_values": {0: "num_tiles"}},
        outputs=("last_hidden_state",),
    )
    nodes = onnx.load(folder / "onnx" / "module.onnx", load_external_data=False).graph.node
    assert [node.op_type for node in nodes if node.domain == "infimm"] == ["SubimageAttention"] * 2
    pixels = torch.randn(5, 3, 56, 56)
    with torch.no_grad():
        expected = tower(pixel_values=pixels).last_hidden_state
    actual = load(folder, threads=2)(pixel_values=pixels)["last_hidden_state"]
    assert torch.allclose(actual, expected, atol=2e-5)


def test_real_widths(tmp_path):
    """1025 tokens of 1792 in heads of 112, text of 5120, a gated block before each layer; few layers, narrow MLPs."""
    config = preset("infimm-hd-vicuna-13b")
    vision, text = config.vision_config, config.text_config
    vision.num_hidden_layers, vision.intermediate_size, vision.projection_dim = 2, 896, None
    text.num_hidden_layers, text.intermediate_size, text.vocab_size = 2, 1024, 264
    tokens = byte_tokenizer()
    config.image_token_id = tokens.convert_tokens_to_ids("<image>")
    config.end_of_chunk_token_id = tokens.convert_tokens_to_ids("<|endofchunk|>")
    config.cross_attention_every_n_layers, config.gate_initializer_range = 1, 0.5
    config.vision_feature_layer = -1
    assert vision.hidden_size == 1792 and vision.head_dim == 112 and vision.tokens_per_tile == 1025
    assert text.hidden_size == 5120 and len(config.gated_layers) == 2
    model = make_model(config)
    folder = export_onnx(model, tmp_path / "out", verify=False)
    exported = load(folder, threads=2)
    specs, modules = FAMILY.specs(config, "float32"), FAMILY.modules(model)

    def run(name, inputs):
        return {key: exported.backend.to_tensor(value) for key, value in exported.backend.run(name, inputs).items()}

    for name, chosen in (("vision", [0]), ("cross_kv", [2]), ("decoder", [2, 6])):
        cases = FAMILY.cases(specs[name], config)
        verify_graph(modules[name], specs[name], [cases[i] for i in chosen], run, FAMILY.default_limits(config))

    ids = torch.tensor([[1, 5, config.image_token_id, 7, 8], [0, 1, 20, 21, 22], [1, config.image_token_id, 9, 10, 11]])
    mask = torch.tensor([[1] * 5, [0, *[1] * 4], [1] * 5])
    pictures = {"pixel_values": torch.randn(2, 3, 448, 448), "image_grids": torch.tensor([[1, 1], [1, 1]])}
    counts = torch.tensor([1, 0, 1])
    expected = model.generate(
        ids, attention_mask=mask, **pictures, image_counts=counts, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    encoded = exported.encode_tiles(**pictures, image_counts=counts)
    assert torch.equal(exported.generate_tokens(ids, mask, encoded, max_new_tokens=4), expected[:, 5:])

    half = export_onnx(model, tmp_path / "half", dtype="float16", graphs=("vision",), verify=False)
    backend = load(half, threads=2).backend
    spec = FAMILY.specs(config, "float16")["vision"]
    verify_graph(
        FAMILY.modules(model.half())["vision"],
        spec,
        FAMILY.cases(spec, config)[:1],
        lambda name, inputs: {key: backend.to_tensor(value) for key, value in backend.run(name, inputs).items()},
        FAMILY.default_limits(config),
    )


BUILD = """
import sys, torch
from transformers import LlamaConfig
from infimm_fast import InfiMMHDForConditionalGeneration, preset
from infimm_fast.export import export_onnx
from infimm_fast.export.to_onnx.export import peak_memory

config = preset("tiny")
config.text_config = LlamaConfig(
    vocab_size=32002, hidden_size=4096, intermediate_size=20000, num_hidden_layers=1, num_attention_heads=32,
    max_position_embeddings=64,
)
config.cross_attention_every_n_layers = 1
torch.set_default_dtype(torch.float32)
with torch.device("meta"):
    model = InfiMMHDForConditionalGeneration(config)
model = model.to_empty(device="cpu")
for tensor in (*model.parameters(), *model.buffers()):
    tensor.data.fill_(0.01)
weights = sum(parameter.nbytes for parameter in model.parameters())
export_onnx(model, sys.argv[1], graphs=("decoder",), verify=False)
print(weights, peak_memory())
"""

RUN = """
import sys, torch
from infimm_fast.export import load
from infimm_fast.export.to_onnx.export import peak_memory

ids = torch.tensor([[1, 2, 3]])
tokens = load(sys.argv[1], threads=2).generate_tokens(ids, torch.ones_like(ids), max_new_tokens=2)
print(tokens.shape[1], peak_memory())
"""


def test_a_graph_over_two_gigabytes(tmp_path):
    """Exported and run in processes of their own, whose memory stays under 1.5 times the weights."""

    def measure(code):
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "big")], capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr
        return [int(word) for word in result.stdout.split()[-2:]]

    try:
        weights, peak = measure(BUILD)
        assert weights > 2**31 and (tmp_path / "big" / "onnx" / "decoder.data").stat().st_size > 2**31
        assert peak < 1.5 * weights
        tokens, peak = measure(RUN)
        assert tokens == 2 and peak < 1.5 * weights
    finally:
        shutil.rmtree(tmp_path / "big", ignore_errors=True)


def test_the_command_line_exports_and_the_demo_has_a_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shallow = make_config()
    monkeypatch.setitem(PRESETS, "tiny", lambda: copy.deepcopy(shallow))
    result = CliRunner().invoke(app, ["export", "onnx", "tiny", "out", "--graph", "cross_kv", "--fold"])
    assert result.exit_code == 0 and "verify cross_kv" in result.output and "hash" in result.output, result.output
    assert "peak memory" in result.output and json.loads((tmp_path / "out" / "manifest.json").read_text())["verified"]
    picture = ROOT / "examples" / "images" / "raccoon.jpg"
    result = CliRunner().invoke(app, ["demo", str(picture), "--export", "--max-new-tokens", "3", "--repeats", "1"])
    assert result.exit_code == 0 and "onnxruntime" in result.output, result.output
