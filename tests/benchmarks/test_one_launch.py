"""The cases that NVIDIA's tools watch: they launch every kernel, and their check sees a mistake."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infimm_fast.benchmarks import one_launch
from infimm_fast.benchmarks.one_launch import CASES, MAIN_CASES, evaluate
from infimm_fast.kernels.common import launch
from infimm_fast.kernels.subimage.config import KERNELS as KINDS
from infimm_fast.kernels.subimage.config import choose_config

pytest.importorskip("triton", reason="needs triton")

from infimm_fast.kernels.common.offline import recorded_launches

KERNELS = Path(__file__).parents[2] / "kernels"
HELPERS = Path(__file__).with_name("one_launch_cases.py")


def launched_by_source():
    """Return (module, name) of every jitted function that some launcher calls as ``kernel[grid](...)``."""
    found = set()
    for file in KERNELS.glob("*/*.py"):
        tree = ast.parse(file.read_text())
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {call.value.id for call in calls if isinstance(call, ast.Subscript) and isinstance(call.value, ast.Name)}
        if names:
            module = importlib.import_module(f"infimm_fast.kernels.{file.parent.name}.{file.stem}")
            found |= {(kernel.fn.__module__, kernel.fn.__name__) for kernel in (getattr(module, name) for name in names)}
    return found


def recorded(case, monkeypatch):
    """Return (module, name) of the kernels that a case launches, without running any."""
    launched_by_source()  # imports the kernels while Triton compiles them, not interprets
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    with recorded_launches() as launches:
        evaluate(case.make(torch.bfloat16, torch.device("cpu")), "triton", torch.bfloat16)
    return [(one.kernel.fn.__module__, one.kernel.fn.__name__) for one in launches]


def test_every_launched_kernel_has_a_small_case(monkeypatch):
    expected = launched_by_source()
    assert len(expected) >= 13
    covered = {kernel for case in CASES.values() for kernel in recorded(case, monkeypatch)}
    assert covered == expected


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_small_cases_say_what_they_launch(case, monkeypatch):
    kernels = recorded(case, monkeypatch)
    assert {name for _, name in kernels} == set(case.kernels)
    folders = {module.split(".")[2] for module, _ in kernels}
    assert folders <= {case.op, "common"}


@pytest.mark.parametrize("case", MAIN_CASES.values(), ids=lambda case: case.name)
def test_main_cases_say_what_they_launch(case, monkeypatch):
    def unset(*shape, dtype, device, seed):  # memory that is never touched costs nothing
        return torch.empty(shape, dtype=dtype, device=device)

    monkeypatch.setattr(one_launch, "random_tensor", unset)
    assert {name for _, name in recorded(case, monkeypatch)} == set(case.kernels)


def test_the_peeled_case_is_peeled_wherever_it_runs():
    for kernel in KINDS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for capability in (80, 89, 90, 100, 120):
                assert choose_config(kernel, 72, dtype, 129, capability).peel, (kernel, dtype, capability)


def test_every_op_has_a_main_case():
    assert {case.op for case in MAIN_CASES.values()} == {case.op for case in CASES.values()}
    small = {(case.op, kernel) for case in CASES.values() for kernel in case.kernels}
    assert {(case.op, kernel) for case in MAIN_CASES.values() for kernel in case.kernels} == small
    assert not set(CASES) & set(MAIN_CASES)


def test_command(capsys):
    assert one_launch.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(CASES) + len(MAIN_CASES) and listed[0].startswith("subimage, peeled: forward_kernel")
    assert one_launch.main(["nonsense"]) == 2
    assert "'nonsense' is not known" in capsys.readouterr().err


def test_a_wrong_result_ends_with_1(capsys, monkeypatch):
    def wrong(case, dtype, device):
        raise AssertionError("output 0: too large")

    monkeypatch.setattr(one_launch, "run_case", wrong)
    assert one_launch.main(["residual", "--device", "cpu"]) == 1
    assert capsys.readouterr().out == "residual: WRONG: output 0: too large\n"


# One of each op: the others take minutes there, and their kernels have tests of their own.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["subimage, window", "cross, decode one row", "residual, norm"])
def test_small_cases_are_right_in_the_interpreter(interpreter, name):
    interpreter.call(HELPERS, "check", name=name, dtype="float16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("cross, decode one row", ("decode", "first_key = low + split * share", "first_key = low + split * (share - 1)")),
        ("residual", ("tiles", "dgate[i] * (1.0 - slope[i] * slope[i])", "dgate[i]")),
    ],
)
def test_mutations_are_noticed(interpreter, name, mutation):
    with pytest.raises(AssertionError, match=r"^(output|gradient of) "):
        interpreter.call(HELPERS, "check", name=name, dtype="float16", mutation=mutation)


@pytest.mark.slow
def test_the_module_runs_in_the_interpreter():
    command = [sys.executable, "-m", "infimm_fast.benchmarks.one_launch", "residual", "--device", "cpu", "--dtype", "fp32"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and done.stdout == "residual: ok\n", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_small_cases_are_right(name):
    one_launch.run_case(CASES[name], torch.bfloat16, torch.device("cuda"))
