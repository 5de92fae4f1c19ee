"""The model on our Triton kernels: in the interpreter, since on a CPU nothing else would ever run them, and on a GPU."""

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
{setup}
import golden
import infimm_fast
from infimm_fast.kernels.subimage import forward
from infimm_fast.kernels.interval import forward as cross_forward
launches = []
for name, module in (("tower", forward), ("cross", cross_forward)):
    original = module.launch_forward
    def counted(*args, name=name, original=original, **kwargs):
        launches.append(name)
        return original(*args, **kwargs)
    module.launch_forward = counted
{body}
print("launches", launches.count("tower"), launches.count("cross"))
"""

GOLDEN_A = """
model, data = infimm_fast.optimize(golden.model_a("triton"), fold=False, backend="triton"), golden.tensors("case_a_forward")

def run(name):
    return model(
        input_ids=data[name + ".input_ids"],
        attention_mask=data[name + ".attention_mask"],
        labels=data[name + ".labels"],
        pixel_values=golden.images_a(),
        image_counts=torch.tensor([2, 2]),
    )

with torch.no_grad():
    features = model.vision_tower(golden.images_a())
    golden.assert_close(features, data["vision.all_features"], golden.FORWARD, "features")
    for name in ("mixed", "textonly_row", "right_pad", "left_pad"):
        real = data[name + ".attention_mask"].bool()
        golden.assert_close(run(name).logits[real], data[name + ".logits"][real], golden.FORWARD, name)
run("mixed").loss.backward()
ours = {{name: value.grad for name, value in model.named_parameters() if value.grad is not None}}
model.zero_grad()
model.set_backend("reference")
run("mixed").loss.backward()
for name, value in model.named_parameters():
    if value.grad is not None:
        golden.assert_close(ours.pop(name), value.grad, golden.GRADIENT_A, name)
assert not ours
"""

SHORT_A = """
model, data = infimm_fast.optimize(golden.model_a("triton"), fold=False, backend="triton"), golden.tensors("case_a_forward")
with torch.no_grad():
    logits = model(
        input_ids=data["mixed.input_ids"], pixel_values=golden.images_a(), image_counts=torch.tensor([2, 2])
    ).logits
golden.assert_close(logits, data["mixed.logits"], golden.FORWARD, "logits")
"""

GENERATE = """
model, data = golden.model_a("triton").requires_grad_(False), golden.tensors("case_a_generate")
infimm_fast.optimize(model, backend="triton")
tokens = model.generate(
    input_ids=data["gen_left_pad.input_ids"],
    attention_mask=data["gen_left_pad.attention_mask"],
    pixel_values=golden.images_a(),
    image_counts=torch.tensor([2, 2]),
    do_sample=False,
    max_new_tokens=12,
    pad_token_id=0,
    eos_token_id=300,
)
assert torch.equal(tokens, data["gen_left_pad.sequences"][:, : tokens.shape[1]])
"""

GOLDEN_C = """
sys.path.insert(0, {folder!r} + "/model")
import test_golden_c as case_c
for mode in ("imm_L1", "imm_cached_L1", "all_cached_L1", "none_cached"):
    case_c.test_outputs_and_gradients(mode, "fused:triton")
for mode in ("all_L1", "all_L2", "imm_L2"):
    case_c.test_outputs_of_tokens_that_no_quirk_touches(mode, "folded:triton")
for mode in ("step_imm_cached_L1", "step_all_cached_L1", "step_imm_cached_L2", "step_all_cached_L2"):
    case_c.test_single_token_steps(mode, "folded:triton")
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


# As precise as the CPU: convolutions would round to 10 bits otherwise.
ON_A_GPU = """
torch.set_default_device("cuda")
torch.backends.cudnn.allow_tf32 = False
"""

# 4 layers in 6 runs of the tower, 2 gated blocks in 5 of the model.
CASES = {
    "case A, logits": (SHORT_A, "4 2"),
    "case A": (GOLDEN_A, "24 10"),
    "case A, greedy tokens": (GENERATE, None),
    "case B, RoPE": (GOLDEN_B, "3 0"),
    "case C": (GOLDEN_C, "0 11"),
}
SLOW = ("case A", "case A, greedy tokens", "case C")


def run_case(name, setup, environment):
    body, launches = CASES[name]
    folder = str(Path(__file__).parents[1])
    code = CODE.format(folder=folder, setup=setup, body=body.format(folder=folder))
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert result.returncode == 0, result.stderr
    assert "launches" in result.stdout
    if launches is not None:
        assert f"launches {launches}" in result.stdout, "the kernels did not run as often as expected"


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_golden_cases(name):
    run_case(name, "", {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_golden_cases_on_a_gpu(name):
    run_case(name, ON_A_GPU, {})


def test_on_a_cpu_it_is_refused(tiny_model):
    tiny_model.set_backend("triton")
    try:
        with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
            tiny_model.vision_tower(torch.zeros(1, 3, 112, 112))
    finally:
        tiny_model.set_backend("sdpa")
