"""``python -m infimm_fast.benchmarks.tuning --out FOLDER``: check and time candidates; needs torch and triton."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from infimm_fast.benchmarks.run import tell
from infimm_fast.benchmarks.tuning.candidates import add_choices
from infimm_fast.benchmarks.tuning.run import Settings, read_plan, tune
from infimm_fast.errors import ConfigurationError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 if a shipped configuration failed its check, 2 if the arguments are not accepted."""
    parser = argparse.ArgumentParser(prog="python -m infimm_fast.benchmarks.tuning", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON file")
    parser.add_argument("--plan", type=Path, help="what the compiler shows of each candidate, by tools/tuning_plan.py")
    add_choices(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--budget", type=float, help="seconds for everything; less important jobs are left out")
    parser.add_argument("--seconds", type=float, default=0.1, help="of timing for each candidate")
    parser.add_argument("--processes", type=int, default=12, help="that compile at the same time; 0 for none")
    options = vars(parser.parse_args(arguments))
    out, plan = options.pop("out"), options.pop("plan")
    try:
        settings = Settings(**options, plan=read_plan(plan) if plan else {})
        return tune(settings, out, tell)
    except (ConfigurationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
