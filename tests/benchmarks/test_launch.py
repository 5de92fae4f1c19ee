"""The cases that NVIDIA's tools watch: they launch every kernel, and their check sees a mistake."""

import contextlib
import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import launch as tool
from infimm_fast.kernels.common.cases import PROFILE, SMALL, Job, find_ops
from infimm_fast.kernels.common.offline import recorded_launches
from infimm_fast.kernels.subimage.config import KERNELS as KINDS
from infimm_fast.kernels.subimage.config import choose_config

pytest.importorskip("triton", reason="needs triton")

ROOT = Path(__file__).parents[2]
SMALL_CASES, PROFILED = tool.cases_with(SMALL), tool.cases_with(PROFILE)
DECODE = "interval_attention: small, decode one row"
FOLDERS = {op.name: type(op).__module__.split(".")[2] for op in find_ops().values()}


def launched_by_source():
    """Return (module, name) of every jitted function that some launcher calls as ``kernel[grid](...)``."""
    found = set()
    for file in (ROOT / "kernels").glob("*/[a-z]*.py"):
        source, module = file.read_text(), importlib.import_module(f"infimm_fast.kernels.{file.parent.name}.{file.stem}")
        kernels = {name: value.fn for name, value in vars(module).items() if hasattr(value, "fn")}
        found |= {(fn.__module__, fn.__name__) for name, fn in kernels.items() if re.search(rf"\b{name}\[", source)}
    return found


def recorded(op, case):
    """Return (module, name) of the kernels that a case launches, without running any."""
    kernel = op.kernels_of(case)[-1]
    job = Job("decode" if kernel == "combine" else kernel, case, "bfloat16", 90)
    with recorded_launches() as launches:
        op.launch(job, op.make_inputs(case, torch.bfloat16, torch.device("meta")), op.config(job))
    return [(one.kernel.fn.__module__, one.kernel.fn.__name__) for one in launches]


def test_every_launched_kernel_has_a_small_case_and_is_profiled():
    expected = launched_by_source()
    assert len(expected) >= 13
    assert {kernel for op, case in SMALL_CASES.values() for kernel in recorded(op, case)} == expected
    small, profiled = (
        {(op.name, kernel) for op, case in cases.values() for kernel in op.kernels_of(case)}
        for cases in (SMALL_CASES, PROFILED)
    )
    assert profiled == small and not set(SMALL_CASES) & set(PROFILED)


@pytest.mark.parametrize("name", [*SMALL_CASES, *PROFILED])
def test_cases_say_what_they_launch(name):
    op, case = (SMALL_CASES | PROFILED)[name]
    kernels = recorded(op, case)
    assert {kernel for _, kernel in kernels} == set(tool.kernel_names(op, case))
    assert {module.split(".")[2] for module, _ in kernels} <= {FOLDERS[op.name], "common"}


def test_the_peeled_case_is_peeled_wherever_it_runs():
    dtypes, capabilities = (torch.bfloat16, torch.float16, torch.float32), (80, 89, 90, 100, 120)
    for kernel, dtype, capability in itertools.product(KINDS, dtypes, capabilities):
        assert choose_config(kernel, 72, dtype, 129, capability).peel, (kernel, dtype, capability)


def test_command(capsys, monkeypatch):
    assert tool.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(SMALL_CASES) + len(PROFILED)
    assert listed[0].startswith("subimage_attention: small, peeled: forward_kernel")
    assert tool.main(["nonsense"]) == 2
    assert "'nonsense' is not known" in capsys.readouterr().err
    monkeypatch.setattr(tool, "run_case", mock.Mock(side_effect=AssertionError("out: too large")))
    assert tool.main(["gated_residual: small", "--device", "cpu"]) == 1
    assert capsys.readouterr().out == "gated_residual: small: WRONG: out: too large\n"


def check(name, mutation):
    """Run a small case in the interpreter's process, with a mistake in its op's kernels if one is given."""
    from mutation import mutated

    op, case = SMALL_CASES[name]
    with mutated(FOLDERS[op.name], mutation):
        tool.run_case(op, case, torch.float16, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        *((name, None) for name in SMALL_CASES),
        (DECODE, ("decode", "first_key = low + split * share", "first_key = low + split * (share - 1)")),
        ("gated_residual: small", ("tiles", "dgate[i] * (1.0 - slope[i] * slope[i])", "dgate[i]")),
    ],
)
def test_small_cases_are_right_in_the_interpreter_and_mutations_are_noticed(interpreter, name, mutation):
    noticed = pytest.raises(AssertionError, match=r"^(out|lse|dq|dk|dv|gate): ")
    with noticed if mutation else contextlib.nullcontext():
        interpreter.call(__file__, "check", name=name, mutation=mutation)


@pytest.mark.slow
def test_the_command_runs_in_the_interpreter():
    command = [sys.executable, tool.__file__, "gated_residual: small", "--device", "cpu", "--dtype", "float32"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and done.stdout == "gated_residual: small: ok\n", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL_CASES)
def test_small_cases_are_right(name):
    tool.run_case(*SMALL_CASES[name], torch.bfloat16, torch.device("cuda"))
