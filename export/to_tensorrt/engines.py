"""The engines of an artifact: ``tensorrt/engines.json`` says which there are, for which TensorRT, GPU and shapes.

Engines belong to one version and one GPU. They are made from an artifact later than it, or on another machine, so that its
manifest does not speak of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infimm_fast.export.common.artifact import write_json
from infimm_fast.export.common.errors import ArtifactError, ProviderError
from infimm_fast.export.to_tensorrt.profiles import Profile
from infimm_fast.export.to_tensorrt.report import EngineReport

FOLDER = "tensorrt"
INDEX = "engines.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class EngineEntry:
    """One engine.

    Attributes:
        graph: "vision", "cross_kv" or "decoder".
        flavor: "tensorrt" or "rtx".
        version: of the TensorRT that built it, and the only one that runs it.
        sms: compute capabilities that it was built for.
        precision: "float32", "float16", "bfloat16" or "fp8".
        plugins: our Triton kernels are inside.
        profiles: shapes that it takes, in the engine's order.
        options: what it was built with.
        bytes: size of the file.
        sha256: of the file.
        graph_sha256: of the ONNX file that it was made of.
        decomposed: attention nodes that got no kernel of their own.
    """

    graph: str
    flavor: str
    version: str
    sms: tuple[int, ...]
    precision: str
    plugins: bool
    profiles: tuple[Profile, ...]
    options: dict[str, Any]
    bytes: int
    sha256: str
    graph_sha256: str
    decomposed: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """File name without its suffix, which tells what the engine is for."""
        plugins = ".plugins" if self.plugins else ""
        sms = "-".join(map(str, self.sms))
        return f"{self.graph}.{self.flavor}-{self.version}.sm{sms}.{self.precision}{plugins}"

    @property
    def file(self) -> str:
        """File name in the folder of engines."""
        return f"{self.stem}.engine"

    @property
    def report_file(self) -> str:
        """File name of the engine's report."""
        return f"{self.stem}.report.json"


def read_index(folder: Path) -> list[EngineEntry]:
    """Return the engines of an artifact; none if no engine was ever built.

    Raises:
        ArtifactError: the index is damaged or of another version.
    """
    file = folder / FOLDER / INDEX
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text())
        if content["format_version"] != FORMAT_VERSION:
            raise ArtifactError(f"{file} has format {content['format_version']}; this version reads {FORMAT_VERSION}")
        return [_entry(row) for row in content["engines"]]
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{file} is damaged: {error!r}") from error


def _entry(row: dict[str, Any]) -> EngineEntry:
    row = {name: value for name, value in row.items() if name != "file"}
    profiles = tuple(
        Profile(profile["name"], {axis: (low, usual, high) for axis, (low, usual, high) in profile["axes"].items()})
        for profile in row.pop("profiles")
    )
    return EngineEntry(profiles=profiles, **{**row, "sms": tuple(row["sms"]), "decomposed": tuple(row["decomposed"])})


def read_report(folder: Path, entry: EngineEntry) -> EngineReport:
    """Return what an engine is made of.

    Raises:
        ArtifactError: its report is missing or damaged.
    """
    file = folder / FOLDER / entry.report_file
    try:
        return EngineReport.from_json(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} cannot be read: {error!r}") from error


def write_index(folder: Path, entries: Iterable[EngineEntry]) -> None:
    """Write the index; entries replace those of the same file name."""
    kept = {entry.file: entry for entry in (*read_index(folder), *entries)}
    rows = [{"file": entry.file, **dataclasses.asdict(entry)} for _, entry in sorted(kept.items())]
    write_json(folder / FOLDER / INDEX, {"format_version": FORMAT_VERSION, "engines": rows})


def choose_engine(
    folder: Path, graph: str, flavor: str, version: str, sm: int, precision: str | None, graph_sha256: str | None
) -> EngineEntry:
    """Return the engine of a graph for this TensorRT and GPU.

    Args:
        folder: the artifact.
        graph: its name.
        flavor: "tensorrt" or "rtx".
        version: of the installed TensorRT.
        sm: of this machine's GPU.
        precision: wanted; None takes the newest entry of any.
        graph_sha256: of the artifact's ONNX file; None skips the comparison.

    Raises:
        ProviderError: there is none; the message says which there are, and what to run.
        ArtifactError: its file is missing or truncated, or was made of another ONNX file.
    """
    same = [entry for entry in read_index(folder) if entry.graph == graph and entry.flavor == flavor]
    fitting = [
        entry for entry in same if entry.version == version and sm in entry.sms and precision in (None, entry.precision)
    ]
    if not fitting:
        have = ", ".join(f"{e.version} for SM {'/'.join(map(str, e.sms))} in {e.precision}" for e in same) or "none"
        wanted = f"{flavor} {version} for SM {sm}" + (f" in {precision}" if precision else "")
        raise ProviderError(
            f"{folder} has no {graph} engine of {wanted}, and engines run nowhere else (there: {have}); build it with "
            f"infimm-fast export tensorrt {folder} --flavor {flavor}"
        )
    entry = fitting[-1]
    file = folder / FOLDER / entry.file
    size = file.stat().st_size if file.is_file() else None
    if size != entry.bytes:
        state = "is missing" if size is None else f"has {size} of {entry.bytes} bytes"
        raise ArtifactError(f"{file} {state}; build it again")
    if graph_sha256 not in (None, entry.graph_sha256):
        raise ArtifactError(f"{file} was built from another {graph} graph than the one in {folder}; build it again")
    return entry
