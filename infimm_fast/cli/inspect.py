"""``infimm-fast inspect``: what a model is made of, how open its gates are, what a picture costs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from infimm_fast.errors import CheckpointError, ConfigurationError
from infimm_fast.models.infimm_hd.checkpoint_io import CheckpointReader
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.costs import picture_costs
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.presets import PRESETS
from infimm_fast.models.infimm_hd.presets import preset as make_preset

# A branch whose gate lets less than this through is called closed.
CLOSED = 0.05
COST_COLUMNS = ("picture", "tiles", "tokens", "memory", "scores", "tower", "Perceiver", "K/V", "all")
COST_LEGEND = (
    "Memory: the visual tokens and all gated blocks' K/V. Scores: what the naive path holds in each layer of the tower, "
    "and a fused one never. Tower to all: floating-point operations (T: 10^12, G: 10^9)."
)

_GATE = re.compile(r"\.layers\.(\d+)\.gated_cross_attention\.(attn|ff)_gate$")
_PARTS = (
    ("vision tower", re.compile(r"^vision_tower\.")),
    ("Perceiver resampler", re.compile(r"^resampler\.")),
    ("gated blocks", re.compile(r"\.gated_cross_attention\.")),
    ("language model", re.compile(r"^language_model\.")),
)


@dataclass(frozen=True)
class GateStatistics:
    """How open one gate is: of the absolute values of ``tanh(gate)``, over its channels.

    Attributes:
        mean: 0 closed, 1 open.
        largest: of all channels.
        closed: share of the channels below `CLOSED`.
    """

    mean: float
    largest: float
    closed: float


Gates = dict[int, dict[str, GateStatistics]]
Sizes = dict[str, tuple[int, int]]


def run_inspect(console: Console, model: str, images: Sequence[str], plot: Path | None) -> None:
    """Print the parts, the gates and the costs of a model.

    Args:
        console: where to print.
        model: folder made by ``infimm-fast convert`` or ``save_pretrained``, or the name of a preset. Of a folder's weights
            only the gates are read; a preset's are not made.
        images: picture sizes, each ``WIDTHxHEIGHT``.
        plot: file for a picture of the gates, or None.

    Raises:
        CheckpointError: the folder holds no such model.
        ConfigurationError: a size or the plot's file name is not accepted, a preset has no gates to draw, or matplotlib is
            missing.
    """
    sizes = [parse_size(size) for size in images]
    config, reader = _load(model)
    parts = count_preset(config) if reader is None else count_parts(_stored_sizes(reader))
    console.print(_parts_table(model, parts))
    gates: Gates = {}
    if reader is not None:
        gates = read_gates(reader)
        console.print(_gates_table(gates))
    else:
        console.print("A preset has no weights, so there are no gates to look at.", highlight=False)
    element_bytes = torch.bfloat16.itemsize if reader is None else _element_bytes(reader)
    costs = Table(*COST_COLUMNS, title=f"What a picture costs, at {element_bytes} bytes for a number", caption=COST_LEGEND)
    for row in cost_rows(config, sizes, element_bytes):
        costs.add_row(*row)
    console.print(costs)
    if plot is not None:
        if not gates:
            raise ConfigurationError(f"--plot draws gates, and {model!r} is a preset without any; give a folder")
        plot_gates(gates, plot)
        console.print(f"Wrote {plot}", highlight=False)


def parse_size(text: str) -> tuple[int, int]:
    """Return (width, height) of ``WIDTHxHEIGHT``.

    Raises:
        ConfigurationError: it is something else.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise ConfigurationError(f"picture size {text!r} is not accepted; give WIDTHxHEIGHT in pixels, as in 1920x1080")
    return int(match[1]), int(match[2])


def _load(model: str) -> tuple[InfiMMHDConfig, CheckpointReader | None]:
    folder = Path(model)
    if (folder / "config.json").is_file():
        return InfiMMHDConfig.from_pretrained(folder), CheckpointReader(folder)
    if model in PRESETS:
        return make_preset(model), None
    raise CheckpointError(f"{model!r} is neither a folder with a config.json nor a preset ({', '.join(PRESETS)})")


def _stored_sizes(reader: CheckpointReader) -> Iterable[tuple[str, int, int]]:
    for name, shape in reader.shapes.items():
        count = torch.Size(shape).numel()
        yield name, count, count * reader.dtypes[name].itemsize


def _element_bytes(reader: CheckpointReader) -> int:
    """Bytes of one number in the dtype that most of the weights have."""
    dtypes = list(reader.dtypes.values())
    return max(set(dtypes), key=dtypes.count).itemsize


def count_preset(config: InfiMMHDConfig) -> dict[str, tuple[int, int]]:
    """Return `count_parts` of a model of this configuration in bfloat16, without making its weights."""
    with torch.device("meta"):
        model = InfiMMHDForConditionalGeneration(config)
    return count_parts((name, value.numel(), 2 * value.numel()) for name, value in model.named_parameters())


def count_parts(sizes: Iterable[tuple[str, int, int]]) -> dict[str, tuple[int, int]]:
    """Return the number of parameters and the bytes of each part.

    Args:
        sizes: name, number of elements and bytes of each tensor.
    """
    parts: dict[str, tuple[int, int]] = {}
    for name, count, nbytes in sizes:
        part = next((label for label, pattern in _PARTS if pattern.search(name)), "other")
        before = parts.get(part, (0, 0))
        parts[part] = (before[0] + count, before[1] + nbytes)
    return {label: parts[label] for label in (*(label for label, _ in _PARTS), "other") if label in parts}


def read_gates(reader: CheckpointReader) -> Gates:
    """Return layer -> "attn" and "ff" -> statistics; no other tensor is read.

    Raises:
        CheckpointError: there is no gate.
    """
    gates: Gates = {}
    for name in reader.shapes:
        if match := _GATE.search(name):
            value = reader.read(name).float().tanh().abs()
            closed = (value < CLOSED).float().mean().item()
            statistics = GateStatistics(value.mean().item(), value.max().item(), closed)
            gates.setdefault(int(match[1]), {})[match[2]] = statistics
    if not gates:
        raise CheckpointError("the checkpoint holds no gate of a gated cross-attention block")
    return dict(sorted(gates.items()))


def cost_rows(config: InfiMMHDConfig, sizes: Iterable[tuple[int, int]], element_bytes: int = 2) -> list[list[str]]:
    """Return a row of `COST_COLUMNS` for each picture size (width, height); see `COST_LEGEND`."""
    rows = []
    for width, height in sizes:
        cost = picture_costs(config, width, height, element_bytes)
        operations = (
            cost.vision_linear_flops + cost.vision_attention_flops,
            cost.resampler_flops,
            cost.key_value_flops,
            cost.flops,
        )
        rows.append(
            [
                f"{width}x{height}",
                f"{cost.tiles}",
                f"{cost.visual_tokens}",
                format_bytes(cost.feature_bytes + cost.key_value_bytes),
                format_bytes(cost.score_bytes),
                *(format_operations(count) if count else "-" for count in operations),
            ]
        )
    return rows


def format_bytes(count: int) -> str:
    """Return a number of bytes in GB or MB (powers of ten)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def format_operations(count: int) -> str:
    """Return a number of operations in units of 10^12 (T), 10^9 (G) or 10^6 (M)."""
    unit, name = (1e12, "T") if count >= 1e12 else (1e9, "G") if count >= 1e9 else (1e6, "M")
    return f"{count / unit:.3g} {name}"


def _parts_table(model: str, parts: dict[str, tuple[int, int]]) -> Table:
    table = Table("part", "parameters", "memory", "share", title=f"Parts of {model}")
    total = sum(count for count, _ in parts.values())
    for label, (count, nbytes) in parts.items():
        table.add_row(label, f"{count:,}", format_bytes(nbytes), f"{count / total:.1%}")
    table.add_row("all", f"{total:,}", format_bytes(sum(nbytes for _, nbytes in parts.values())), "", style="bold")
    return table


def _gates_table(gates: Gates) -> Table:
    table = Table(
        "before layer",
        *(f"{label} {column}" for label in ("attn", "ff") for column in ("mean", "largest", "closed")),
        title="Gates: |tanh(gate)| over the channels",
    )
    for layer, kinds in gates.items():
        cells = [
            cell
            for kind in ("attn", "ff")
            for cell in (f"{kinds[kind].mean:.3f}", f"{kinds[kind].largest:.3f}", f"{kinds[kind].closed:.0%}")
        ]
        table.add_row(f"{layer}", *cells)
    count = sum(kinds["attn"].mean < CLOSED for kinds in gates.values())
    table.caption = f"closed: below {CLOSED}; {count} of {len(gates)} attention gates are closed on average"
    return table


def plot_gates(gates: Gates, file: Path) -> None:
    """Draw the mean of both gates of each layer; nothing is left of the file if that fails.

    Raises:
        ConfigurationError: matplotlib is missing, or does not know the file's suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("--plot needs matplotlib: pip install infimm-fast[plot]") from error
    figure = Figure(figsize=(max(6.0, 0.4 * len(gates)), 3.5), layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    suffix = file.suffix.removeprefix(".").lower()
    if suffix not in known:
        raise ConfigurationError(f"--plot {file} has suffix {file.suffix!r}; accepted are {', '.join(sorted(known))}")
    axes = figure.subplots()
    for offset, kind, label in ((-0.2, "attn", "cross-attention"), (0.2, "ff", "feed-forward")):
        heights = [kinds[kind].mean for kinds in gates.values()]
        axes.bar([index + offset for index in range(len(gates))], heights, width=0.4, label=label)
    axes.axhline(CLOSED, color="black", linewidth=0.8, linestyle="--", label=f"closed ({CLOSED})")
    axes.set(xlabel="before layer", ylabel="mean |tanh(gate)|", ylim=(0, 1))
    axes.set_xticks(range(len(gates)), [str(layer) for layer in gates])
    axes.legend()
    partial = file.with_name(f".{file.name}.partial")
    try:
        figure.savefig(partial, format=suffix, dpi=150)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
