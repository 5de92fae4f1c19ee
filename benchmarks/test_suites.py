"""The registered cases under pytest-benchmark: ``make bench``. Not part of ``make test``.

Each case is a group, so that ``--benchmark-compare`` and ``pytest-benchmark compare`` set implementations side by side.
``-k`` chooses: ``make bench ARGS="-k 'decode_step and fused'"``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from infimm_fast.benchmarks.registry import IMPLEMENTATIONS, STAGES, BenchCase, Stage, load_suites, prepare
from infimm_fast.benchmarks.run import make_plan

load_suites()
PLAN = make_plan()
_PARAMETERS = [
    pytest.param(stage, case, name, id=f"{stage.name}-{case.name}-{name}".replace(" ", "_"))
    for stage in STAGES.values()
    for case in stage.cases(PLAN)
    for name, one in IMPLEMENTATIONS[stage.name].items()
    if one.obstacle(case, PLAN.device) is None
]


@pytest.mark.parametrize(("stage", "case", "name"), _PARAMETERS)
def test_time(benchmark: Any, stage: Stage, case: BenchCase, name: str) -> None:
    """Check one implementation on one case, then time it."""
    benchmark.group = f"{stage.name}, {case.name}, {case.dtype}"
    with torch.set_grad_enabled(case.backward):
        inputs = stage.make_inputs(case, PLAN.device, seed=0)
        expected = stage.expected(case, inputs)
        prepared = prepare(stage, case, IMPLEMENTATIONS[stage.name][name], inputs)

        def run_and_wait() -> None:
            prepared.run()
            if PLAN.device.type == "cuda":
                torch.cuda.synchronize(PLAN.device)

        try:
            stage.check(case, inputs, expected, name, prepared.run)
            benchmark(run_and_wait)
        finally:
            prepared.close()
