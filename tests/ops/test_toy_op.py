"""A new op from a folder of its own gets the gate, the benchmarks, the tuner and the error budget; no other file changes."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from infimm_fast.kernels.common import cases
from infimm_fast.kernels.common.cases import BENCH, GATE, SMALL, Op, find_ops, jobs_of, load_op, register_op
from infimm_fast.kernels.common.checks import KernelArgumentError

FILES = {
    "__init__.py": '"""Scale and shift."""\n',
    "reference.py": '''
        """y = a * x + b in plain PyTorch."""


        def affine_reference(x, a, b):
            return x * a + b
        ''',
    "kernels.py": '''
        """The kernel and its launcher."""

        import torch
        import triton
        import triton.language as tl


        @triton.jit
        def affine_kernel(x_ptr, out_ptr, a, b, size, BLOCK: tl.constexpr):
            o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + o_x, mask=o_x < size)
            tl.store(out_ptr + o_x, x.to(tl.float32) * a + b, mask=o_x < size)


        def launch_forward(x, a, b, *, config):
            out = torch.empty_like(x)
            grid = (triton.cdiv(x.numel(), config.block_m),)
            affine_kernel[grid](x, out, a, b, x.numel(), BLOCK=config.block_m, **config.options())
            return out
        ''',
    "api.py": '''
        """The public function."""

        from infimm_fast.kernels.common.launch import LaunchConfig, resolve_backend

        from affine.reference import affine_reference

        CONFIG = LaunchConfig(block_m=1024, block_n=1, num_warps=4, num_stages=1, cover=(1024,))


        def affine(x, a, b, *, backend="auto"):
            if resolve_backend(backend, x) == "triton":
                from affine.kernels import launch_forward

                return launch_forward(x, a, b, config=CONFIG)
            return affine_reference(x, a, b)
        ''',
    "cases.py": '''
        """What is known about it."""

        from infimm_fast.kernels.common.cases import BENCH, GATE, SMALL, TUNE, Case, Cost, Op, Rules
        from infimm_fast.kernels.common.numerics import outlier_normal

        from affine.api import CONFIG, affine
        from affine.reference import affine_reference


        class Affine(Op):
            name = "affine"
            kernels = {"forward": "affine_kernel"}
            cases = (Case("many", {"size": 65536}, uses=(BENCH, GATE, TUNE)), Case("odd", {"size": 1037}, uses=(SMALL,)))

            def make_inputs(self, case, dtype, device, seed=0):
                return {"x": outlier_normal(case.sizes["size"], dtype=dtype, device=device, seed=seed)}

            def call(self, case, inputs, backend):
                return (affine(inputs["x"], 2.0, 0.5, backend=backend),)

            def reference(self, case, inputs, dtype):
                return {"out": affine_reference(inputs["x"].to(dtype), 2.0, 0.5)}

            def cost(self, case, dtype, kernel=None):
                return Cost(2 * case.sizes["size"], 2 * case.sizes["size"] * dtype.itemsize)

            def kernels_of(self, case):
                return ("forward",)

            def width(self, case):
                return case.sizes["size"]

            def config(self, job):
                return CONFIG

            def launch(self, job, inputs, config):
                from affine.kernels import launch_forward

                return (launch_forward(inputs["x"], 2.0, 0.5, config=config),)

            def rules(self, job, config):
                return Rules(no_elements=job.dtype != "float32", mostly_wide=True)


        OP = Affine()
        ''',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The op as its author would write it."""
    path = tmp_path_factory.mktemp("ops") / "affine"
    path.mkdir()
    for name, text in FILES.items():
        (path / name).write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def op(folder: Path) -> Iterator[Op]:
    """The op made known, and forgotten afterwards."""
    from infimm_fast.benchmarks import registry

    with (
        mock.patch.dict(cases._REGISTERED),
        mock.patch.dict(registry.STAGES),
        mock.patch.dict(registry.IMPLEMENTATIONS),
        mock.patch.dict(sys.modules),
    ):
        yield load_op(folder)


def test_it_is_known_once(op: Op, folder: Path) -> None:
    assert find_ops()["affine"] is op and len(find_ops()) == 4 and load_op(folder) is op
    with pytest.raises(KernelArgumentError, match="an op named 'affine' already"):
        register_op(type(op)())
    with pytest.raises(KernelArgumentError, match="module named 'affine' already"):
        load_op(folder.parent / "elsewhere" / "affine")


def test_what_cannot_be_imported_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "cases.py").write_text("raise ImportError('not yet')")
    with mock.patch.dict(cases._REGISTERED), mock.patch.dict(sys.modules):
        for _ in range(2):
            with pytest.raises(ImportError, match="not yet"):
                load_op(broken)
        assert not [name for name in sys.modules if name.partition(".")[0] == "broken"] and "broken" not in find_ops()


def test_the_gate_judges_it(op: Op) -> None:
    from compile_gate import describe, run_job

    (job,) = jobs_of(op, GATE, ("bfloat16",), (90,))
    verdict = run_job(op, job)
    assert verdict.failures == () and verdict.code.accesses[16] == 2 and describe(verdict).startswith("affine")


def test_the_benchmarks_check_and_time_it(op: Op) -> None:
    from infimm_fast.benchmarks.harness import Settings, run_benchmarks
    from infimm_fast.benchmarks.run import make_plan

    plan = make_plan("tiny", "float32", device="cpu")
    report = run_benchmarks(Settings(("ops",), plan, 0.0, ops=("affine",)))
    (case,) = report.cases
    assert case.case == "many" and BENCH in op.cases[0].uses
    timed = {row.implementation for row in case.rows if row.median_ms}
    assert timed == {"reference", "infimm_fast sdpa"} and not any(row.failed for row in case.rows)


def test_the_tuner_has_candidates_for_it(op: Op) -> None:
    from infimm_fast.benchmarks.tuning.run import Settings, work_of

    ((found, job, candidates),) = [one for one in work_of(Settings(), 90) if one[0] is op]
    assert found is op and job.kernel == "forward" and candidates[0].shipped and len(candidates) > 4


def check(folder: str) -> list[str]:
    """Run the small cases in the interpreter's process, checked; return their names."""
    from launch import cases_with, run_case

    load_op(Path(folder))
    found = [(name, *pair) for name, pair in cases_with(SMALL).items() if pair[0].name == "affine"]
    for _, op, case in found:
        run_case(op, case, torch.float32, torch.device("cpu"))
    return [name for name, _, _ in found]


def test_its_kernel_keeps_the_error_budget(interpreter, folder: Path) -> None:
    assert interpreter.call(__file__, "check", folder=str(folder)) == ["affine: odd"]
