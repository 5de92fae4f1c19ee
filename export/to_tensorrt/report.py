"""What an engine is made of: its layers, the ONNX nodes fused into each, and which kernel every attention got.

A report comes from the engine inspector where the engine can be loaded, which takes a GPU, and from the table of layers that
the builder logs otherwise. Both list the same layers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from infimm_fast.export.common.errors import ExportError

# Names that TensorRT's fused attention kernels have.
_FUSED = re.compile(r"mha|flash|fused_attention", re.IGNORECASE)
# Layers that were compiled together, for one profile or one region of the graph, have a number in common.
_REGION = re.compile(r"_myl(\d+)_\d+$")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_LAYER = re.compile(
    r"^Name: (?P<name>.+?), LayerType: (?P<type>\w+), (?P<rest>.*)TacticName: (?P<tactic>.*?), (?:StreamId: \d+, )?"
    r"Metadata: (?P<metadata>.*)$"
)


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: as TensorRT names it.
        type: "gemm", "kgen", "PluginV3", ...
        tactic: the kernel, where it has a name.
        nodes: the ONNX nodes that it computes.
    """

    name: str
    type: str
    tactic: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Attention:
    """What became of one attention node.

    Attributes:
        node: its name in the prepared graph.
        kernel: "fused", "plugin", "decomposed" into several layers with scores in memory, or "unknown".
        layers: the layers that compute it.
    """

    node: str
    kernel: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class EngineReport:
    """What an engine is made of.

    Attributes:
        source: "inspector", "builder log", or why neither could be read.
        layers: in the order of execution.
        attention: one entry for each attention node of the graph.
    """

    source: str
    layers: tuple[Layer, ...]
    attention: tuple[Attention, ...]

    @property
    def decomposed(self) -> tuple[str, ...]:
        """The attention nodes without a kernel of their own."""
        return tuple(entry.node for entry in self.attention if entry.kernel == "decomposed")

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EngineReport:
        """Read what `to_json` wrote."""
        layers = tuple(Layer(**{**layer, "nodes": tuple(layer["nodes"])}) for layer in content["layers"])
        attention = tuple(Attention(**{**entry, "layers": tuple(entry["layers"])}) for entry in content["attention"])
        return cls(content["source"], layers, attention)

    def table(self) -> str:
        """Return the report as text: layers by type, fusions, and the attention kernels."""
        types = Counter(layer.type for layer in self.layers)
        fused = sum(len(layer.nodes) > 1 for layer in self.layers)
        lines = [f"{len(self.layers)} layers, {fused} of them made of several ONNX nodes ({self.source})"]
        lines += [f"  {count:5d}  {name}" for name, count in types.most_common()]
        counts = ", ".join(f"{count} {kernel}" for kernel, count in Counter(e.kernel for e in self.attention).items())
        lines.append(f"{len(self.attention)} attention nodes: {counts or 'none'}")
        for entry in self.attention:
            kernels = [layer for layer in entry.layers if _FUSED.search(layer)] or entry.layers
            lines.append(f"  {entry.node:40s}  {entry.kernel:10s}  {', '.join(kernels)}")
        return "\n".join(lines)


def report_from_inspector(information: str, attention_nodes: Mapping[str, bool]) -> EngineReport:
    """Read the engine inspector's JSON.

    Args:
        information: of an engine that was built with detailed profiling verbosity.
        attention_nodes: attention node -> whether a plugin runs it.

    Raises:
        ExportError: it is of another form.
    """
    try:
        entries = json.loads(information)["Layers"]
        layers = [
            Layer(
                entry["Name"],
                str(entry.get("LayerType", "")),
                str(entry.get("TacticName", "")),
                tuple(dict.fromkeys(_NODE.findall(str(entry.get("Metadata", ""))))),
            )
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"the engine inspector's report cannot be read: {error!r}") from error
    return _judge("inspector", layers, attention_nodes)


def report_from_log(lines: Iterable[str], attention_nodes: Mapping[str, bool]) -> EngineReport:
    """Read the table of layers that the builder logs; see `report_from_inspector`.

    Raises:
        ExportError: there is none.
    """
    matches = [match for line in lines if (match := _LAYER.match(line))]
    if not matches:
        raise ExportError("the builder's log has no table of layers; build with detailed profiling verbosity")
    layers = [
        Layer(match["name"], match["type"], match["tactic"], tuple(dict.fromkeys(_NODE.findall(match["metadata"]))))
        for match in matches
    ]
    return _judge("builder log", layers, attention_nodes)


def unknown_report(reason: str, attention_nodes: Mapping[str, bool]) -> EngineReport:
    """Return a report that knows nothing, for an engine whose layers cannot be read; see `report_from_inspector`."""
    return EngineReport(reason, (), tuple(Attention(node, "unknown", ()) for node in attention_nodes))


def _judge(source: str, layers: list[Layer], attention_nodes: Mapping[str, bool]) -> EngineReport:
    attention = []
    for node, is_plugin in attention_nodes.items():
        own = [layer for layer in layers if node in layer.nodes or (is_plugin and node in layer.name)]
        regions: dict[str, list[Layer]] = {}
        for layer in own:
            match = _REGION.search(layer.name)
            regions.setdefault(match[1] if match else "", []).append(layer)
        # Every region counts: an attention may be fused for one profile and taken apart for the next.
        fused = bool(regions) and all(
            any(_FUSED.search(f"{layer.name} {layer.tactic}") for layer in region) for region in regions.values()
        )
        kernel = "plugin" if is_plugin and own else "fused" if fused else "decomposed"
        attention.append(Attention(node, kernel, tuple(layer.name for layer in own)))
    return EngineReport(source, tuple(layers), tuple(attention))
