"""A wheel of the checkout, installed elsewhere, does what the README promises: import and optimise, export, benchmark."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

USES = """
import sys, torch
import infimm_fast
from infimm_fast import InfiMMHDForConditionalGeneration, InfiMMHDProcessor, optimize, preset, restore
from infimm_fast.export import export_onnx, load
from infimm_fast.models.infimm_hd.tokenization_bytes import byte_tokenizer

assert infimm_fast.__file__.startswith(sys.argv[1]), infimm_fast.__file__
config = preset("tiny")
model = InfiMMHDForConditionalGeneration(config).eval().requires_grad_(False)
ids = torch.tensor([[1, config.image_token_id, 5]])
pixels = torch.rand(1, 3, 112, 112)
expected = model(ids, pixel_values=pixels).logits
torch.testing.assert_close(optimize(model)(ids, pixel_values=pixels).logits, expected, atol=1e-4, rtol=1e-4)
restore(model)
processor = InfiMMHDProcessor.from_config(config, byte_tokenizer())
export_onnx(model, "artifact", processor=processor, verify=False)
print("answer", repr(load("artifact", threads=1).generate("photo.jpg", "What is it?", max_new_tokens=2)))
"""


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_does_the_three_uses(tmp_path):
    target = tmp_path / "installed"
    environment = os.environ | {"PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}

    def run(*command):
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    # Setuptools puts into a wheel whatever earlier builds left there.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheels", ROOT)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", target, wheel)
    assert not (target / "tools").exists() and not (target / "tests").exists()
    (tmp_path / "photo.jpg").write_bytes((ROOT / "examples" / "images" / "raccoon.jpg").read_bytes())
    assert "answer" in run(sys.executable, "-c", USES, str(target))
    bench = ("-m", "infimm_fast.benchmarks", "ops", "--ops", "gated_residual", "--seconds", "0.01", "--out", "results")
    assert "gated_residual" in run(sys.executable, *bench)
    assert list((tmp_path / "results").glob("*.json"))
