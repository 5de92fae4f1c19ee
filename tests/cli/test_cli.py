"""The command line as a user types it."""

import importlib.metadata
import re
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs typer")

import torch
from PIL import Image
from typer.testing import CliRunner

import golden
from infimm_fast.cli import app
from infimm_fast.cli import doctor as doctor_command
from infimm_fast.cli.demo import StageResults, _print_parity
from infimm_fast.cli.doctor import conflicts
from infimm_fast.cli.tiles import draw_tiles
from infimm_fast.errors import FoldError
from infimm_fast.models.infimm_hd.tokenization_bytes import byte_tokenizer

PICTURE = Path(__file__).parents[2] / "examples" / "images" / "raccoon.jpg"


def invoke(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_help_names_every_command():
    text = invoke("--help")
    for command in ("demo", "convert", "doctor"):
        assert command in text
        assert "Usage" in invoke(command, "--help")


def test_demo_with_random_weights(tmp_path):
    text = invoke("demo", PICTURE, "--output", tmp_path, "--max-new-tokens", 3, "--repeats", 1)
    assert "Random weights" in text and "2 x 2 sub-images and a thumbnail" in text
    assert "5 tiles = 325 visual tokens" in text
    for stage in ("tiling", "vision", "K/V projection", "prefill", "per token"):
        assert stage in text
    assert "sdpa against reference" in text and "fused against reference" in text
    assert text.count(" ok") == 8 and text.count("same tokens") == 2 and "FAILED" not in text
    with Image.open(tmp_path / "tiles.png") as drawn:
        assert drawn.width > 900


def test_demo_with_a_converted_checkpoint(tmp_path):
    torch.save(golden.official_state_dict_a(), tmp_path / "a.ckpt")
    config = golden.config_a()
    config.max_grid = 2
    config.save_pretrained(tmp_path / "config")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    text = invoke(
        "convert",
        tmp_path / "a.ckpt",
        tmp_path / "model",
        "--config",
        tmp_path / "config" / "config.json",
        "--tokenizer",
        tmp_path / "tokenizer",
    )
    assert "Wrote" in text
    options = ("--checkpoint", tmp_path / "model", "--output", tmp_path / "o", "--max-new-tokens", 2, "--repeats", 1)
    text = invoke("demo", PICTURE, *options)
    assert "Random weights" not in text and "same tokens" in text


def test_parity_fails_on_a_wrong_backend(capsys):
    from rich.console import Console

    good = StageResults({"vision": torch.ones(3)}, {}, [1, 2])
    wrong = StageResults({"vision": torch.ones(3) * 1.01}, {}, [1, 2])
    other_answer = StageResults({"vision": torch.ones(3)}, {}, [1, 3])
    assert _print_parity(Console(), {"reference": good, "sdpa": good}, torch.float32)
    assert not _print_parity(Console(), {"reference": good, "sdpa": wrong}, torch.float32)
    assert "FAILED" in capsys.readouterr().out
    assert not _print_parity(Console(), {"reference": good, "sdpa": other_answer}, torch.float32)


def test_the_drawing_shows_grid_and_thumbnail():
    picture = Image.new("RGB", (300, 200), "black")
    tiles = [Image.new("RGB", (100, 100), "black")] * 6 + [Image.new("RGB", (100, 100), "red")]
    drawn = draw_tiles(picture, tiles, (2, 3))
    colours = {colour for _, colour in drawn.getcolors(1 << 20)}
    assert (255, 196, 0) in colours and (255, 0, 0) in colours
    single = draw_tiles(picture, tiles[:1], (1, 1))
    assert (255, 0, 0) not in {colour for _, colour in single.getcolors(1 << 20)} and single.width < drawn.width


@pytest.mark.parametrize(
    "arguments, message",
    (
        (("demo", "missing.jpg"), "no file"),
        (("demo", PICTURE, "--preset", "huge"), "choose one of"),
        (("demo", PICTURE, "--checkpoint", "nowhere"), "not a folder made by"),
        (("demo", PICTURE, "--device", "abacus"), "abacus"),
        (("demo", PICTURE, "--dtype", "int3"), "int3"),
        (("convert", "missing.ckpt", "out", "--preset", "tiny"), "does not exist"),
        (("convert", "missing.ckpt", "out"), "give either --preset"),
        (("convert", "missing.ckpt", "out", "--config", PICTURE), "not a JSON file"),
    ),
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = invoke(*arguments, code=1)
    lines = [line for line in text.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_a_weight_that_cannot_be_folded_is_one_line_too(monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise FoldError("q_proj is quantised")

    monkeypatch.setattr("infimm_fast.integrations.optimization.optimize", refuse)
    text = invoke("export", "onnx", "tiny", tmp_path / "out", "--fold", code=1)
    assert "error: q_proj is quantised" in text and "Traceback" not in text


def test_doctor_says_what_is_there_and_how_to_get_the_rest(monkeypatch):
    text = invoke("doctor")
    assert f"torch {importlib.metadata.version('torch')}" in text
    assert re.search(r"reference\s.*yes", text) and re.search(r"fused\s.*yes", text)
    original = doctor_command.installed_version
    monkeypatch.setattr(doctor_command, "installed_version", lambda names: None if "onnx" in names else original(names))
    assert "infimm-fast[onnx]" in invoke("doctor")


def test_doctor_sees_packages_that_overwrite_each_other(monkeypatch):
    monkeypatch.setattr(doctor_command, "installed_version", lambda names: f"{names[0]} 1.0")
    assert len(conflicts()) == 1
    assert "overwrite each other" in invoke("doctor")
