"""Import rules, each in a fresh process: what loads, what must not, and that no folder shadows another package."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code, *, cwd=None, path=None):
    prefix = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else "import sys\n"
    result = subprocess.run(
        [sys.executable, "-c", prefix + code], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


BLOCK_TRITON = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ImportError("triton is blocked in this test")
sys.meta_path.insert(0, Blocker())
"""


def test_the_package_imports_light():
    loaded = run("import infimm_fast; print(' '.join(sys.modules))").split()
    for heavy in ("torch", "transformers", "triton", "onnx", "onnxruntime", "PIL", "numpy"):
        assert heavy not in loaded


def test_the_kernels_import_without_triton_onnx_or_cuda():
    code = """
import torch
calls = []
torch.cuda._lazy_init = lambda: calls.append("cuda")
import infimm_fast.kernels
assert not calls
print(' '.join(sys.modules))
"""
    loaded = run(code).split()
    for heavy in ("triton", "transformers", "onnx", "onnxruntime"):
        assert heavy not in loaded


def test_help_imports_no_framework():
    loaded = run("import infimm_fast.cli; print(' '.join(sys.modules))").split()
    assert "torch" not in loaded and "transformers" not in loaded


def test_the_model_works_without_triton():
    code = (
        BLOCK_TRITON
        + """
import torch, infimm_fast
model = infimm_fast.InfiMMHDForConditionalGeneration(infimm_fast.preset("tiny")).eval()
ids = torch.tensor([[1, model.config.image_token_id, 5]])
print(model(ids, pixel_values=torch.zeros(1, 3, 112, 112)).logits.shape[-1])
"""
    )
    assert run(code) == "264"


def test_public_names_resolve():
    code = """
import infimm_fast
for name in infimm_fast.__all__:
    getattr(infimm_fast, name)
assert set(infimm_fast.__all__) <= set(dir(infimm_fast))
try:
    infimm_fast.nonsense
except AttributeError as error:
    print(error)
"""
    assert "nonsense" in run(code)


def test_an_op_and_its_folder_have_names_of_their_own():
    for name, folder in (
        ("subimage_attention", "subimage"),
        ("interval_attention", "interval"),
        ("gated_residual", "residual"),
    ):
        code = f"""
import infimm_fast.kernels.{folder}.reference
from infimm_fast.kernels.{folder} import api
assert infimm_fast.kernels.{name} is api.{name}
assert infimm_fast.kernels.{folder}.reference.{name}_reference
"""
        run(code)


@pytest.mark.parametrize("name", ("kernels", "export", "onnx"))
def test_no_root_folder_is_a_package_of_a_general_name(name):
    """From the checkout itself, where the root is on sys.path."""
    code = f"""
import importlib.util
spec = importlib.util.find_spec({name!r})
origin = spec.origin if spec else None
assert origin is None or not origin.startswith({str(ROOT / name)!r}), origin
"""
    run(code, cwd=ROOT)


@pytest.mark.parametrize("installed", (False, True))
def test_transformers_imports_from_the_checkout_with_and_without_hugging_faces_kernels(tmp_path, installed):
    """Transformers imports a package called ``kernels`` if there is one; our folder must never be taken for it."""
    if installed:
        package = tmp_path / "kernels"
        package.mkdir()
        (package / "__init__.py").write_text("marker = 'hugging face'\n")
    code = """
import importlib.util
import transformers
from transformers import PreTrainedModel
import infimm_fast
infimm_fast.EvaVisionTower
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec else None)
"""
    origin = run(code, cwd=ROOT, path=tmp_path)
    assert origin == (str(tmp_path / "kernels" / "__init__.py") if installed else "None")


def test_registration_in_a_fresh_process(tmp_path):
    run(f"import infimm_fast; infimm_fast.preset('tiny').save_pretrained({str(tmp_path)!r})")
    code = f"""
import infimm_fast
infimm_fast.register_auto()
infimm_fast.register_auto()
from transformers import AutoConfig
print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)
"""
    assert run(code) == "InfiMMHDConfig"


def test_every_folder_is_mapped_to_a_package():
    """Kernels and exporters live in root folders of their own; each is importable under infimm_fast."""
    folders = [init.parent for parent in ("kernels", "export") for init in (ROOT / parent).glob("*/__init__.py")]
    assert len(folders) >= 4
    names = [f"infimm_fast.{folder.parent.name}.{folder.name}" for folder in folders]
    run(f"import importlib\nfor name in {names}: importlib.import_module(name)")
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "export" / "__init__.py").exists()


@pytest.mark.slow
def test_a_bare_gpu_machine_collects_the_gpu_tests():
    """There may be torch, triton, transformers and pytest only; a file that cannot be imported would stop all tests."""
    code = """
import sys
for name in ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "typer", "rich", "peft", "accelerate", "tensorrt_rtx_bindings"):
    sys.modules[name] = None
import pytest
status = pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:xdist", "-p", "no:benchmark", "-p", "no:cacheprovider"])
print("status", int(status))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "status 0" in result.stdout, result.stdout[-2000:]
    assert "test_interval_attention_gpu.py" in result.stdout
