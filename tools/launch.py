"""Run single calls of the ops on Triton: what compute-sanitizer watches and Nsight Compute profiles.

``python tools/launch.py --list`` names the cases. Small ones have awkward sizes, multiples of nothing, and are checked
against the reference, which runs on the CPU so that a tool sees little beside our kernels. Profiled ones have the sizes of
models and are not checked.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from infimm_fast.dtypes import DTYPES
from infimm_fast.kernels.common.cases import PROFILE, SMALL, Case, Op, find_ops, run_op
from infimm_fast.kernels.common.numerics import assert_error_budget


def cases_with(use: str) -> dict[str, tuple[Op, Case]]:
    """Return all ops' cases with a use by a name of their own, the most important first."""
    found = [(op, case) for op in find_ops().values() for case in op.cases if use in case.uses]
    return {f"{op.name}: {case.name}": (op, case) for op, case in sorted(found, key=lambda pair: pair[1].importance)}


def kernel_names(op: Op, case: Case) -> list[str]:
    """Return the jitted functions that a case launches."""
    return [op.kernels[kernel] for kernel in op.kernels_of(case)]


def run_case(op: Op, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Run the Triton kernels of a case once; a small case is compared with the reference in float64.

    Raises:
        AssertionError: the result is worse than the error budget allows.
    """
    inputs = op.make_inputs(case, dtype, device)
    actual = run_op(op, case, inputs, "triton")
    if SMALL not in case.uses:
        return
    on_cpu: dict[str, Any] = tree_map_only(torch.Tensor, lambda x: x.detach().cpu(), inputs)
    plain, exact = (op.reference(case, on_cpu, kind) for kind in (dtype, torch.float64))
    assert actual.keys() == exact.keys(), f"results are {', '.join(actual)} instead of {', '.join(exact)}"
    for name, result in actual.items():
        assert_error_budget(name, result.cpu(), plain[name], exact[name])


def profile_second_run(op: Op, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Run a case twice; a profiler that waits for the program's word sees the second run alone."""
    inputs = op.make_inputs(case, dtype, device)
    run_op(op, case, inputs, "triton")
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run_op(op, case, inputs, "triton")
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 if a result is wrong, 2 if a name is not known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of cases; all small ones without any")
    parser.add_argument("--list", action="store_true", help="name the cases and the kernels that each launches")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda", help="cpu works under TRITON_INTERPRET=1, in float16 and float32")
    parser.add_argument("--profile", action="store_true", help="run twice, and mark the second run for a profiler")
    options = parser.parse_args(arguments)
    known = cases_with(SMALL) | cases_with(PROFILE)
    if options.list:
        for name, (op, case) in known.items():
            print(f"{name}: {', '.join(kernel_names(op, case))}")
        return 0
    unknown = [name for name in options.names if name not in known]
    if unknown:
        print(f"error: case {unknown[0]!r} is not known; --list names them", file=sys.stderr)
        return 2
    wrong = 0
    run = profile_second_run if options.profile else run_case
    for name in options.names or cases_with(SMALL):
        try:
            run(*known[name], DTYPES[options.dtype], torch.device(options.device))
            print(f"{name}: ok")
        except AssertionError as error:
            print(f"{name}: WRONG: {error}")
            wrong += 1
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
