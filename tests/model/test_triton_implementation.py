"""The model on our Triton kernels, in Triton's interpreter: on a CPU nothing else would ever run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infimm_fast.kernels import BackendUnavailableError

CODE = """
import sys
sys.path.insert(0, {folder!r})
import torch
import golden
from infimm_fast.kernels.subimage_attention import forward
launches = []
original = forward.launch_forward
forward.launch_forward = lambda *args, **kwargs: launches.append(1) or original(*args, **kwargs)
{body}
print("launches", len(launches))
"""

GOLDEN_A = """
model, data = golden.model_a("triton"), golden.tensors("case_a_forward")
with torch.no_grad():
    features = model.vision_tower(golden.images_a())
golden.assert_close(features, data["vision.all_features"], golden.FORWARD, "features")
result = model(
    input_ids=data["mixed.input_ids"],
    attention_mask=data["mixed.attention_mask"],
    labels=data["mixed.labels"],
    pixel_values=golden.images_a(),
    image_counts=torch.tensor([2, 2]),
)
golden.assert_close(result.logits.detach(), data["mixed.logits"], golden.FORWARD, "logits")
result.loss.backward()
ours = {name: value.grad for name, value in model.vision_tower.named_parameters()}
model.zero_grad()
model.set_implementation("reference")
model(
    input_ids=data["mixed.input_ids"],
    attention_mask=data["mixed.attention_mask"],
    labels=data["mixed.labels"],
    pixel_values=golden.images_a(),
    image_counts=torch.tensor([2, 2]),
).loss.backward()
for name, value in model.vision_tower.named_parameters():
    if value.grad is not None:
        golden.assert_close(ours[name], value.grad, 1e-3 if "k_" in name else golden.GRADIENT_A, name)
"""

GOLDEN_B = """
sys.path.insert(0, {folder!r} + "/model")
from infimm_fast import EvaVisionTower
from test_golden_b import tower_config, tower_state
tower = EvaVisionTower(tower_config("triton")).eval()
tower.load_state_dict(tower_state())
data = golden.tensors("case_b_forward")
with torch.no_grad():
    golden.assert_close(tower(data["images"]), data["all_features"], golden.FORWARD, "features")
"""


@pytest.mark.parametrize("body, launches", ((GOLDEN_A, 8), (GOLDEN_B, 3)), ids=("case A", "case B, RoPE"))
def test_golden_cases(body, launches):
    folder = str(Path(__file__).parents[1])
    code = CODE.format(folder=folder, body=body.replace("{folder!r}", repr(folder)))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert f"launches {launches}" in result.stdout, "the kernel did not run"


def test_on_a_cpu_it_is_refused(tiny_model):
    tiny_model.set_implementation("triton")
    try:
        with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
            tiny_model.vision_tower(torch.zeros(1, 3, 112, 112))
    finally:
        tiny_model.set_implementation("sdpa")
