"""``infimm-fast inspect``, and the computed parts of the pages about models."""

import re
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs typer")

import torch
from PIL import Image
from typer.testing import CliRunner

from document_models import update_page
from infimm_fast import InfiMMHDForConditionalGeneration, preset
from infimm_fast.cli import app
from infimm_fast.cli.inspect import count_preset, format_operations, read_gates
from infimm_fast.models.infimm_hd.checkpoint_io import CheckpointReader
from infimm_fast.models.infimm_hd.presets import PRESETS

PAGES = sorted((Path(__file__).parents[2] / "docs" / "models").glob("*.md"))


def invoke(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model in bfloat16; its second gated block has one attention gate in four closed and a closed MLP."""
    model = InfiMMHDForConditionalGeneration(preset("tiny")).to(torch.bfloat16)
    first, second = model.gated_blocks
    with torch.no_grad():
        first.attn_gate.fill_(-10.0)
        first.ff_gate.fill_(10.0)
        second.attn_gate.fill_(0.5)
        second.attn_gate[: len(second.attn_gate) // 4] = 0.01
        second.ff_gate.fill_(0.0)
    path = tmp_path_factory.mktemp("inspect") / "model"
    model.save_pretrained(path, max_shard_size="1MB")
    return path


def rows(text):
    """Cells of every row of every table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_a_folder(folder):
    table = rows(invoke("inspect", folder, "--image", "100x100", "--image", "500x90"))
    model = InfiMMHDForConditionalGeneration.from_pretrained(folder)
    tower = sum(value.numel() for value in model.vision_tower.parameters())
    assert [cells[1] for cells in table if cells[0] == "vision tower"] == [f"{tower:,}"]
    total = sum(value.numel() for value in model.parameters())
    assert ["all", f"{total:,}", f"{2 * total / 1e6:.1f} MB", ""] in table
    assert ["3", "1.000", "1.000", "0%", "1.000", "1.000", "0%"] in table
    assert ["7", "0.349", "0.462", "25%", "0.000", "0.000", "100%"] in table
    assert [cells[:4] for cells in table if "x" in cells[0]] == [
        ["100x100", "1", "65", format_bytes_of(65)],
        ["500x90", "3", "195", format_bytes_of(195)],
    ]


def format_bytes_of(tokens):
    """224 channels; two blocks, keys and values, 12 heads of 64; 2 bytes each."""
    return f"{tokens * (224 + 2 * 2 * 768) * 2 / 1e6:.1f} MB"


def test_of_a_folder_only_the_gates_are_read(folder, monkeypatch):
    read = []
    original = CheckpointReader.read
    monkeypatch.setattr(CheckpointReader, "read", lambda self, name: read.append(name) or original(self, name))
    invoke("inspect", folder)
    assert len(read) == 4 and all(name.endswith("_gate") for name in read)


def test_the_plot(folder, tmp_path):
    pytest.importorskip("matplotlib")
    assert "Wrote" in invoke("inspect", folder, "--plot", tmp_path / "gates.png")
    with Image.open(tmp_path / "gates.png") as drawn:
        assert drawn.width > 500
    assert [file.name for file in tmp_path.iterdir()] == ["gates.png"]


def test_a_plot_without_matplotlib_says_how_to_get_it(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "infimm-fast[plot]" in invoke("inspect", folder, "--plot", tmp_path / "gates.png", code=1)
    assert not list(tmp_path.iterdir())


def test_a_preset_makes_no_weights():
    text = invoke("inspect", "infimm-hd-vicuna-13b", "--image", "1344x1344")
    assert "no weights" in text
    assert ["1344x1344", "10", "10250", "351.6 MB", "336.2 MB", "92.5 T", "-", "564 G", "93 T"] in rows(text)


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_of_every_preset_add_up(name):
    parts = count_preset(preset(name))
    assert "other" not in parts and all(2 * count == nbytes for count, nbytes in parts.values())
    assert ("Perceiver resampler" in parts) == bool(preset(name).resampler_layers)


def test_operations_are_rounded_to_three_digits():
    assert [format_operations(n) for n in (92_512_345_678_901, 563_900_000_000, 8_390_000)] == ["92.5 T", "564 G", "8.39 M"]


@pytest.mark.parametrize(
    "arguments, message",
    (
        (("nowhere",), "neither a folder with a config.json nor a preset"),
        (("tiny", "--image", "12"), "WIDTHxHEIGHT"),
        (("tiny", "--image", "0x5"), "WIDTHxHEIGHT"),
        (("tiny", "--plot", "a.png"), "is a preset"),
        (("MODEL", "--plot", "a.doc"), "accepted are"),
    ),
)
def test_errors_are_one_line(arguments, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = invoke("inspect", *(str(folder) if argument == "MODEL" else argument for argument in arguments), code=1)
    lines = [line for line in text.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_gates_is_refused(tmp_path):
    from safetensors.torch import save_file

    from infimm_fast.errors import CheckpointError

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no gate"):
        read_gates(CheckpointReader(tmp_path))


def test_there_is_a_page_for_each_family_member():
    assert {page.stem for page in PAGES} == {"infimm-hd", "infimm-pretrain", "infimm-zephyr", "openflamingo"}
    computed = re.findall(r"<!-- computed: (\S+)", "".join(page.read_text() for page in PAGES))
    assert sorted(computed) == sorted(name for name in PRESETS if "tiny" not in name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_are_computed(page):
    """After a change of a preset or a formula: python tools/document_models.py docs/models/*.md."""
    text = page.read_text()
    assert update_page(text) == text
    assert update_page(text.replace("parameters |", "|")) == text, "the computed part is replaced whole"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_examples_run_and_links_exist(page):
    text = page.read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, page.name, "exec"), {})
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
