"""The ops' small and profiled cases: they launch every kernel, on either way, and a check of theirs sees a mistake."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import launch as tool
from infimm_fast.kernels.common import launch
from infimm_fast.kernels.common.cases import PROFILE, SMALL, Case, Job, Op, find_ops, run_op
from infimm_fast.kernels.common.offline import recorded_launches
from infimm_fast.kernels.subimage.config import KERNELS, choose_config
from interpreter import InterpreterProcess

ROOT = Path(__file__).parents[2]
SMALL_CASES, PROFILED = tool.cases_with(SMALL), tool.cases_with(PROFILE)
FOLDERS = {op.name: type(op).__module__.split(".")[2] for op in find_ops().values()}
DECODE = "interval_attention: small, decode one row"


def _unset(*shape: int, dtype: torch.dtype, device: Any, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)  # memory that is never touched costs nothing


def _recorded(op: Op, case: Case, public: bool) -> set[tuple[str, str]]:
    """Return (module, name) of the kernels that the launcher, or the public function, launches; none runs."""
    inputs = op.make_inputs(case, torch.bfloat16, torch.device("cpu" if public else "meta"))
    kernel = op.kernels_of(case)[-1]
    job = Job("decode" if kernel == "combine" else kernel, case, "bfloat16", 90)
    with recorded_launches() as launches:
        if public:
            run_op(op, case, inputs, "triton")
        else:
            op.launch(job, inputs, op.config(job))
    return {(one.kernel.fn.__module__, one.kernel.fn.__name__) for one in launches}


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("name", [*SMALL_CASES, *PROFILED])
def test_cases_say_what_they_launch(name: str, public: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    op, case = (SMALL_CASES | PROFILED)[name]
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    monkeypatch.setattr(f"{type(op).__module__}.outlier_normal", _unset)
    kernels = _recorded(op, case, public)
    assert {kernel for _, kernel in kernels} == set(tool.kernel_names(op, case))
    assert {module.split(".")[2] for module, _ in kernels} <= {FOLDERS[op.name], "common"}


def _launched_by_source() -> set[tuple[str, str]]:
    """Return (module, name) of every jitted function that some launcher calls as ``kernel[grid](...)``."""
    found = set()
    for file in (ROOT / "kernels").glob("*/[a-z]*.py"):
        source, module = file.read_text(), importlib.import_module(f"infimm_fast.kernels.{file.parent.name}.{file.stem}")
        kernels = {name: value.fn for name, value in vars(module).items() if hasattr(value, "fn")}
        found |= {(fn.__module__, fn.__name__) for name, fn in kernels.items() if re.search(rf"\b{name}\[", source)}
    return found


def test_every_launched_kernel_has_a_small_case_and_is_profiled() -> None:
    expected = _launched_by_source()
    assert len(expected) >= 13
    assert {kernel for op, case in SMALL_CASES.values() for kernel in _recorded(op, case, public=False)} == expected
    small, profiled = (
        {(op.name, kernel) for op, case in cases.values() for kernel in op.kernels_of(case)}
        for cases in (SMALL_CASES, PROFILED)
    )
    assert profiled == small and not set(SMALL_CASES) & set(PROFILED)


def test_the_peeled_case_is_peeled_wherever_it_runs() -> None:
    dtypes, capabilities = (torch.bfloat16, torch.float16, torch.float32), (80, 89, 90, 100, 120)
    for kernel, dtype, capability in itertools.product(KERNELS, dtypes, capabilities):
        assert choose_config(kernel, 72, dtype, 129, capability).peel, (kernel, dtype, capability)


def check(name: str, mutation: tuple[str, str, str] | None) -> None:
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
def test_small_cases_are_right_in_the_interpreter_and_mutations_are_noticed(
    interpreter: InterpreterProcess, name: str, mutation: tuple[str, str, str] | None
) -> None:
    noticed = pytest.raises(AssertionError, match=r"^(out|lse|dq|dk|dv|gate): ")
    with noticed if mutation else contextlib.nullcontext():
        interpreter.call(__file__, "check", name=name, mutation=mutation)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL_CASES)
def test_small_cases_are_right(name: str) -> None:
    tool.run_case(*SMALL_CASES[name], torch.bfloat16, torch.device("cuda"))
