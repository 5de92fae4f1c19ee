"""``python -m infimm_fast.benchmarks.tuning --out FOLDER``: check and time candidates; needs torch and triton."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from infimm_fast.benchmarks.tuning.run import Settings, read_plan, tune
from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.cases import find_ops


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 if a shipped configuration failed its check, 2 if the arguments are not accepted."""
    parser = argparse.ArgumentParser(prog="python -m infimm_fast.benchmarks.tuning", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON file")
    parser.add_argument("--plan", type=Path, help="what the compiler shows of each candidate, by tools/tuning_plan.py")
    parser.add_argument("--op", nargs="+", choices=tuple(find_ops()))
    parser.add_argument("--kernel", nargs="+", help="as in the op's kernels")
    parser.add_argument("--width", type=int, nargs="+", help="head dims, or channels of ops without heads")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--budget", type=float, help="seconds for everything; less important jobs are left out")
    parser.add_argument("--seconds", type=float, default=0.1, help="of timing for each candidate")
    parser.add_argument("--processes", type=int, default=12, help="that compile at the same time; 0 for none")
    options = parser.parse_args(arguments)
    try:
        settings = Settings(
            ops=options.op,
            kernels=options.kernel,
            widths=options.width,
            dtype=options.dtype,
            budget=options.budget,
            seconds=options.seconds,
            processes=options.processes,
            plan=read_plan(options.plan) if options.plan else {},
        )
        return tune(settings, options.out, lambda line: print(line, flush=True))
    except (ConfigurationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
