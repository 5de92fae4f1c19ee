"""Conversion of official checkpoints: names, errors, streaming."""

import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import golden
import official as official_checkpoint
from infimm_fast import (
    InfiMMHDConfig,
    InfiMMHDForConditionalGeneration,
    InfiMMHDProcessor,
    InfiMMHDVisionConfig,
    convert_checkpoint,
    preset,
)
from infimm_fast.errors import CheckpointError
from infimm_fast.models.infimm_hd.checkpoint import plan_conversion
from infimm_fast.models.infimm_hd.tokenization_bytes import byte_tokenizer


@pytest.fixture(scope="module")
def official():
    return golden.official_state_dict_a()


def expand_patterns(name):
    """All keys and shapes of a real checkpoint."""
    patterns = official_checkpoint.key_patterns(name)
    shapes = {}
    for pattern, entry in patterns["patterns"].items():
        indices = entry["indices"]
        if isinstance(indices, str):
            first, last = map(int, indices.split(".."))
            indices = range(first, last + 1)
        for index in indices or (None,):
            shapes[pattern.replace("{N}", str(index))] = tuple(entry["shape"])
    assert len(shapes) == patterns["n_keys"]
    return shapes, patterns


@pytest.mark.parametrize(
    "key, name",
    (
        ("hd_7b", "infimm-pretrain-vicuna-7b"),
        ("hd_13b", "infimm-pretrain-vicuna-13b"),
        ("zephyr", "infimm-zephyr-7b"),
    ),
)
def test_presets_have_the_parameters_of_the_real_checkpoints(key, name):
    shapes, patterns = expand_patterns(key)
    plan = plan_conversion(SimpleNamespace(shapes=shapes), preset(name))
    sizes = {target: torch.Size(shape).numel() for target, shape in plan.shapes.items()}
    assert sum(sizes.values()) == patterns["params_unique"]
    assert sum(size for target, size in sizes.items() if target.startswith("vision_tower.")) == patterns["params_vision"]
    assert sum(size for target, size in sizes.items() if "gated_cross_attention" in target) == patterns["params_gated"]
    second_names = [name for name in shapes if "old_decoder_blocks" in name or "gated_cross_attn_layers" in name]
    assert sorted(second for second, _ in plan.duplicates) == sorted(second_names)


def test_the_high_resolution_preset_takes_the_same_checkpoint():
    shapes, _ = expand_patterns("hd_13b")
    plan = plan_conversion(SimpleNamespace(shapes=shapes), preset("infimm-hd-vicuna-13b"))
    assert plan.shapes["vision_tower.embeddings.position_embedding"] == (1, 1025, 1792)


def test_shared_tensors_are_stored_once(official, tmp_path):
    save_file({name: value.clone() for name, value in official.items()}, tmp_path / "official.safetensors")
    convert_checkpoint(tmp_path / "official.safetensors", tmp_path / "out", golden.config_a())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    unique = golden.tensors("case_a_state_dict")
    assert sum(value.nbytes for value in stored.values()) == sum(value.nbytes for value in unique.values())
    for name, value in golden.renamed(unique).items():
        assert torch.equal(stored[name].float(), value), name


@pytest.mark.parametrize("wrap", ("state_dict", "model", "module", "prefix"))
def test_wrapped_checkpoints(official, tmp_path, wrap):
    content = (
        {f"module.{name}": value for name, value in official.items()} if wrap == "prefix" else {wrap: official, "epoch": 3}
    )
    torch.save(content, tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "out", golden.config_a())
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 157


def test_folder_of_parts_and_several_shards(official, tmp_path):
    names, parts = sorted(official), tmp_path / "parts"
    parts.mkdir()
    for index in range(3):
        torch.save({name: official[name] for name in names[index::3]}, parts / f"pytorch_model-{index}.bin")
    convert_checkpoint(parts, tmp_path / "out", golden.config_a(), max_shard_bytes=3_000_000)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / file).stat().st_size < 3_100_000 for file in files)
    model = InfiMMHDForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, value in golden.renamed(golden.tensors("case_a_state_dict")).items():
        assert torch.equal(model.state_dict()[name], value), name


def test_tokenizer_makes_the_folder_complete(official, tmp_path):
    torch.save(official, tmp_path / "a.ckpt")
    convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "out", golden.config_a(), byte_tokenizer())
    processor = InfiMMHDProcessor.from_pretrained(tmp_path / "out")
    model = InfiMMHDForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert processor.image_processor.tile_size == 56 and processor.image_processor.max_grid == 1
    assert processor.token_ids()["image_token_id"] == model.config.image_token_id == 260
    assert model.generation_config.eos_token_id == [2, 259]
    assert model.dtype == torch.bfloat16


def test_positions_are_resized_in_float32(official, tmp_path):
    config = golden.config_a()
    config.vision_config.image_size = 112
    torch.save(official, tmp_path / "a.ckpt")
    convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "out", config)
    stored = load_file(tmp_path / "out" / "model.safetensors")["vision_tower.embeddings.position_embedding"]
    assert stored.dtype == torch.float32 and stored.shape == (1, 65, 224)


def misfit(official, tmp_path, message, config=None):
    torch.save(official, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "bad.ckpt", tmp_path / "out", config or golden.config_a())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.ckpt"], "something was left behind"


def test_unknown_missing_and_misshapen_keys_are_named(official, tmp_path):
    state = {**official, "vision_encoder.extra.weight": torch.zeros(1)}
    del state["vision_encoder.norm.bias"]
    state["lang_encoder.lm_head.weight"] = torch.zeros(3, 4)
    misfit(
        state,
        tmp_path,
        r"1 unknown: vision_encoder\.extra\.weight.*1 missing: vision_tower\.norm\.bias.*"
        r"1 of another shape: lang_encoder\.lm_head\.weight \[\[3, 4\]\], expected \[320, 128\]",
    )


def test_another_configuration_is_refused(official, tmp_path):
    misfit(official, tmp_path, "1062 missing: .*157 of another shape", config=preset("infimm-pretrain-vicuna-7b"))


def test_duplicates_that_differ_are_refused(official, tmp_path):
    name = "lang_encoder.old_decoder_blocks.1.mlp.up_proj.weight"
    misfit({**official, name: official[name] + 1}, tmp_path, "two names of one tensor")


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch /tmp/infimm_fast_was_here",))


def test_unsafe_and_broken_files_are_refused(official, tmp_path):
    legacy, code, cut, other = (tmp_path / name for name in ("old.bin", "code.ckpt", "cut.ckpt", "notes.txt"))
    torch.save({"a": torch.zeros(2)}, legacy, _use_new_zipfile_serialization=False)
    torch.save({"a": Malicious()}, code)
    torch.save(official, cut)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    other.write_text("text")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": "text"}, tmp_path / "text.pt")
    (tmp_path / "nothing").mkdir()
    cases = {
        legacy: "not in PyTorch's zip format",
        code: "weights_only",
        cut: "truncated",
        other: r"suffix '\.txt'",
        tmp_path / "pickle.pt": "zip format",
        tmp_path / "broken.safetensors": "not a readable safetensors file",
        tmp_path / "list.pt": "no state dict",
        tmp_path / "text.pt": "of type str",
        tmp_path / "nothing": "not a checkpoint",
        tmp_path / "missing.ckpt": "does not exist",
    }
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(path, tmp_path / "out", golden.config_a())
    assert not (tmp_path / "out").exists() and not os.path.exists("/tmp/infimm_fast_was_here")


def test_a_used_destination_is_left_alone(official, tmp_path):
    torch.save(official, tmp_path / "a.ckpt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "out", golden.config_a())
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("error", (OSError("disk full"), KeyboardInterrupt()))
def test_an_interrupted_conversion_leaves_nothing(official, tmp_path, error):
    torch.save(official, tmp_path / "a.ckpt")

    def interrupt(done, total):
        if done > total // 2:
            raise error

    with pytest.raises(type(error)):
        convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "out", golden.config_a(), progress=interrupt)
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


MEASURE = """
import sys
from infimm_fast import InfiMMHDConfig, convert_checkpoint
config = InfiMMHDConfig.from_pretrained(sys.argv[3])
convert_checkpoint(sys.argv[1], sys.argv[2], config)
# Not ru_maxrss: that is inherited from the process that started this one.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("ckpt", "safetensors"))
def test_two_gigabytes_convert_in_less_than_one(tmp_path, kind):
    config = InfiMMHDConfig(
        vision_config=InfiMMHDVisionConfig(num_hidden_layers=4, image_size=224),
        text_config=LlamaConfig(
            vocab_size=32002, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32
        ),
        cross_attention_every_n_layers=2,
    )
    config.save_pretrained(tmp_path / "config")
    state = {
        name: torch.full(shape, index % 100, dtype=torch.bfloat16)
        for index, (name, shape) in enumerate(official_checkpoint.official_names(config))
    }
    size = sum(value.nbytes for value in state.values())
    assert size > 1.9e9
    source = tmp_path / f"big.{kind}"
    if kind == "ckpt":
        twice = {
            name.replace("model.layers.", "old_decoder_blocks.").replace(".decoder_layer", ""): value
            for name, value in state.items()
            if ".decoder_layer." in name
        }
        torch.save({**state, **twice}, source)
    else:
        save_file(state, source)
    del state
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out"), str(tmp_path / "config")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    print(f"peak memory {peak / 1e9:.2f} GB")
    assert peak < 1e9, f"peak memory {peak / 1e9:.2f} GB"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(value.nbytes for value in stored.values()) == size
    for index, (name, _) in enumerate(official_checkpoint.official_names(config)):
        target, _ = golden.rename_key(name)
        assert (stored[target].flatten()[:: max(stored[target].numel() // 1000, 1)] == index % 100).all(), name
