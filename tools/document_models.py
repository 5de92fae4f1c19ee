"""Rewrites the computed parts of the pages about models: ``python tools/document_models.py docs/models/*.md``.

A computed part stands between ``<!-- computed: PRESET WIDTHxHEIGHT ... -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from infimm_fast.benchmarks.document import markdown_table
from infimm_fast.cli.inspect import COST_COLUMNS, COST_LEGEND, cost_rows, count_preset, format_bytes, parse_size
from infimm_fast.export.common.artifact import writing
from infimm_fast.models.infimm_hd.presets import preset

_COMPUTED = re.compile(r"(<!-- computed: (\S+)((?: \d+x\d+)+) -->\n).*?(<!-- end -->)", re.DOTALL)


def update_page(text: str) -> str:
    """Return a page with its computed parts made anew."""
    return _COMPUTED.sub(lambda match: match[1] + "\n" + describe(match[2], match[3].split()) + "\n" + match[4], text)


def describe(name: str, sizes: Sequence[str]) -> str:
    """Return the parts of a preset and the costs of pictures as Markdown tables."""
    config = preset(name)
    parts = count_preset(config)
    totals = [sum(column) for column in zip(*parts.values(), strict=True)]
    part_rows = [[label, f"{count:,}", format_bytes(nbytes)] for label, (count, nbytes) in parts.items()]
    part_rows.append(["all", f"{totals[0]:,}", format_bytes(totals[1])])
    costs = cost_rows(config, [parse_size(size) for size in sizes])
    return (
        f"Preset `{name}`, 16-bit numbers:\n\n"
        + markdown_table(["part", "parameters", "memory"], part_rows, "---:")
        + "\n"
        + markdown_table(COST_COLUMNS, costs, "---:")
        + f"\n{COST_LEGEND}\n"
    )


def main(files: Sequence[str]) -> None:
    """Rewrite these pages."""
    for file in map(Path, files):
        with writing(file) as partial:
            partial.write_text(update_page(file.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
