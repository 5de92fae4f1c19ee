"""The registered cases under pytest-benchmark: ``make bench``. Not part of ``make test``.

Each case is a group, so that ``--benchmark-compare`` and ``pytest-benchmark compare`` set implementations side by side.
``-k`` chooses: ``make bench ARGS="-k 'decode_step and fused'"``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from infimm_fast.benchmarks.registry import IMPLEMENTATIONS, OPS, Case, load_suites, prepare
from infimm_fast.benchmarks.run import make_plan

load_suites()
PLAN = make_plan()
_PARAMETERS = [
    pytest.param(op.name, case, implementation, id=f"{op.name}-{case.name}-{implementation}".replace(" ", "_"))
    for op in OPS.values()
    for case in op.cases(PLAN)
    for implementation, one in IMPLEMENTATIONS[op.name].items()
    if one.obstacle(case, PLAN.device) is None
]


@pytest.mark.parametrize(("op_name", "case", "name"), _PARAMETERS)
def test_time(benchmark: Any, op_name: str, case: Case, name: str) -> None:
    """Check one implementation on one case, then time it."""
    op, implementation = OPS[op_name], IMPLEMENTATIONS[op_name][name]
    benchmark.group = f"{op_name}, {case.name}, {case.dtype}"
    with torch.set_grad_enabled(case.backward):
        inputs = op.make_inputs(case, PLAN.device, seed=0)
        expected = op.expected(case, inputs)
        prepared = prepare(op, case, implementation, inputs)
        try:
            op.check(case, inputs, expected, name, prepared.run)
            benchmark(_waiting(prepared.run))
        finally:
            prepared.close()


def _waiting(run: Any) -> Any:
    """Return `run`, made to wait for the GPU if there is one."""
    if PLAN.device.type != "cuda":
        return run

    def run_and_wait() -> None:
        run()
        torch.cuda.synchronize(PLAN.device)

    return run_and_wait
