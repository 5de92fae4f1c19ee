"""Full disks, killed processes and two writers: a folder appears whole or not at all."""

import contextlib
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import golden
from infimm_fast import InfiMMHDForConditionalGeneration, VisualContext, convert_checkpoint, preset
from infimm_fast.errors import CheckpointError
from infimm_fast.folders import new_folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    torch.save(golden.official_state_dict_a(), folder / "a.ckpt")
    golden.config_a().save_pretrained(folder / "config")
    return folder


@contextlib.contextmanager
def disk_of(size):
    """No file may grow beyond `size` bytes: as on a full disk, writes fail in the middle, in Python and in native code."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else None


@pytest.mark.parametrize("size", (0, 1000, 1_000_000))
def test_a_full_disk_during_conversion(checkpoint, tmp_path, size):
    destination = tmp_path / "out"
    with disk_of(size), pytest.raises(OSError):
        convert_checkpoint(checkpoint / "a.ckpt", destination, golden.config_a())
    assert not list(tmp_path.iterdir())
    convert_checkpoint(checkpoint / "a.ckpt", destination, golden.config_a())
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("size", (100, 1_000_000))
@pytest.mark.parametrize("exists", (False, True))
def test_a_full_disk_during_save(tmp_path, size, exists):
    """An earlier save stays as it was."""
    model = InfiMMHDForConditionalGeneration(preset("tiny-zephyr"))
    destination = tmp_path / "out"
    if exists:
        model.save_pretrained(destination)
        (destination / "notes.txt").write_text("mine")
    before = content(destination)
    with torch.no_grad():
        model.resampler.latents.add_(1)
    with disk_of(size), pytest.raises(OSError):
        model.save_pretrained(destination)
    assert content(destination) == before
    assert [file.name for file in tmp_path.iterdir()] == (["out"] if exists else [])


def test_a_full_disk_while_a_context_is_saved(tmp_path):
    context = VisualContext(torch.zeros(1000, 64), torch.tensor([0, 1000]), torch.tensor([[0, 1]]))
    with disk_of(10_000), pytest.raises(OSError):
        context.save(tmp_path / "context.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces_all_weights_and_nothing_else(tmp_path):
    model = InfiMMHDForConditionalGeneration(preset("tiny-zephyr"))
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    (tmp_path / "model.fp16.safetensors").write_bytes(b"a variant")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    with torch.no_grad():
        model.resampler.latents.fill_(3.0)
    model.save_pretrained(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["config.json", "generation_config.json", "model.fp16.safetensors", "model.safetensors"]
    assert (InfiMMHDForConditionalGeneration.from_pretrained(tmp_path).resampler.latents == 3).all()
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert not (tmp_path / "model.safetensors").exists()


SLOW_CONVERSION = """
import sys, time
from infimm_fast import InfiMMHDConfig, convert_checkpoint

def progress(done, total):
    if done > total // 2:
        print("half", flush=True)
        time.sleep(60)

convert_checkpoint(sys.argv[1], sys.argv[2], InfiMMHDConfig.from_pretrained(sys.argv[3]), progress=progress)
"""


@pytest.mark.slow
def test_two_processes_and_a_killed_one(checkpoint, tmp_path):
    """The second is refused while the first works; killed without a chance to clean up, it leaves nothing that disturbs."""
    arguments = [str(checkpoint / "a.ckpt"), str(tmp_path / "out"), str(checkpoint / "config")]
    first = subprocess.Popen([sys.executable, "-c", SLOW_CONVERSION, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "half\n"
        with pytest.raises(CheckpointError, match="out is being written by another process"):
            convert_checkpoint(checkpoint / "a.ckpt", tmp_path / "out", golden.config_a())
        convert_checkpoint(checkpoint / "a.ckpt", tmp_path / "other", golden.config_a())
        assert not (tmp_path / "out").exists()
    finally:
        first.kill()
        first.wait()
    assert (tmp_path / ".out.partial" / "model.safetensors").stat().st_size > 0
    convert_checkpoint(checkpoint / "a.ckpt", tmp_path / "out", golden.config_a())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "out"]
    files = ["config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == files
    assert content(tmp_path / "out")["model.safetensors"] == content(tmp_path / "other")["model.safetensors"]


RACE = """
import sys, time
from pathlib import Path
from infimm_fast.errors import CheckpointError
from infimm_fast.folders import new_folder

while time.time() < float(sys.argv[2]):
    pass
wins = 0
for index in range(200):
    try:
        with new_folder(Path(sys.argv[1]) / f"{index}") as folder:
            (folder / "a.txt").write_text(sys.argv[3])
            (folder / "b.txt").write_text(sys.argv[3])
        wins += 1
    except CheckpointError:
        pass
print(wins)
"""


@pytest.mark.slow
def test_in_a_race_each_folder_has_one_writer(tmp_path):
    start = str(time.time() + 8)
    command = [sys.executable, "-c", RACE, str(tmp_path), start]
    racers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "xyz"]
    wins = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert sum(wins) == 200 and sorted(int(folder.name) for folder in tmp_path.iterdir()) == list(range(200))
    for folder in tmp_path.iterdir():
        assert len({file.read_text() for file in folder.iterdir()}) == 1 and len(list(folder.iterdir())) == 2


def test_a_folder_that_fills_up_meanwhile_is_left_alone(tmp_path):
    """Between our check and the end somebody puts a file there: theirs stays."""
    with pytest.raises(OSError), new_folder(tmp_path / "out") as folder:
        (folder / "ours.txt").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs.txt").write_text("theirs")
    assert content(tmp_path / "out") == {"theirs.txt": b"theirs"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
