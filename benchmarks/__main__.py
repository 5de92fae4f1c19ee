"""``python -m infimm_fast.benchmarks``: what ``infimm-fast bench`` does, on a machine that has neither typer nor rich."""

from __future__ import annotations

import sys

from infimm_fast.benchmarks.run import bench
from infimm_fast.errors import UserError

if __name__ == "__main__":
    try:
        raise SystemExit(bench(sys.argv[1:], "python -m infimm_fast.benchmarks"))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
