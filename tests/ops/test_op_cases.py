"""What the ops' cases say of their public functions: which kernels these launch, with which configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from infimm_fast.kernels.common import launch
from infimm_fast.kernels.common.cases import PROFILE, SMALL, Case, Op, find_ops, run_op
from infimm_fast.kernels.common.offline import recorded_launches

CASES = [
    pytest.param(op, case, id=f"{op.name}: {case.name}")
    for op in find_ops().values()
    for case in op.cases
    if {SMALL, PROFILE} & set(case.uses)
]


def _unset(*shape: int, dtype: torch.dtype, device: Any, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)  # memory that is never touched costs nothing


@pytest.mark.parametrize(("op", "case"), CASES)
def test_public_functions_launch_what_the_cases_say(op: Op, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    monkeypatch.setattr(f"{type(op).__module__}.outlier_normal", _unset)
    inputs = op.make_inputs(case, torch.bfloat16, torch.device("cpu"))
    with recorded_launches() as launches:
        run_op(op, case, inputs, "triton")
    assert {one.kernel.__name__ for one in launches} == {op.kernels[kernel] for kernel in op.kernels_of(case)}
    folders = {one.kernel.fn.__module__.split(".")[2] for one in launches}
    assert folders <= {type(op).__module__.split(".")[2], "common"}
