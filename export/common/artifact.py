"""An artifact: one folder with everything that a runtime needs, described by its ``manifest.json``.

The manifest is written last and at once, so that a folder with one is complete; a folder without one is no artifact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infimm_fast.export.common.errors import ArtifactError
from infimm_fast.export.common.spec import GraphSpec, TensorSpec

MANIFEST = "manifest.json"
VERIFICATION = "verification.json"
PROCESSOR = "processor"
FORMAT_VERSION = 1

_CHUNK = 16 * 2**20
_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu")

# Called with what is being done, how much of it is done, and how much there is in all.
Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        kind: "model" for a whole model with its family's graphs, "module" for a single module.
        target: "onnx" or "aoti".
        dtype: of the weights.
        graphs: name -> declaration.
        graph_files: name -> path of the graph's file in the folder.
        limits: free axis -> (smallest, largest) size.
        options: what the export was asked for (opset, plain, ...).
        config: the model's configuration, empty for a module.
        generation: ids that end and pad a generated text.
        verified: whether verification passed; False if it was not asked for. A folder that failed has no manifest.
        family: of the model, empty for a module; artifacts without it are of the family that `config` names.
        files: path in the folder -> {"sha256", "bytes"}.
        versions: package -> version.
    """

    kind: str
    target: str
    dtype: str
    graphs: dict[str, GraphSpec]
    graph_files: dict[str, str]
    limits: dict[str, tuple[int, int]]
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    verified: bool = False
    family: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON's types."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        content["graphs"] = {
            name: {
                "file": self.graph_files[name],
                "inputs": [dataclasses.asdict(tensor) for tensor in spec.inputs],
                "outputs": [dataclasses.asdict(tensor) for tensor in spec.outputs],
            }
            for name, spec in self.graphs.items()
        }
        del content["graph_files"]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Manifest:
        """Read what `to_json` wrote."""
        content = dict(content)
        del content["format_version"]
        graphs = content.pop("graphs")
        limits = {axis: (smallest, largest) for axis, (smallest, largest) in content.pop("limits").items()}

        def tensors(declared: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(tensor["name"], tensor["dtype"], tuple(tensor["shape"])) for tensor in declared)

        return cls(
            graphs={n: GraphSpec(n, tensors(graph["inputs"]), tensors(graph["outputs"])) for n, graph in graphs.items()},
            graph_files={name: graph["file"] for name, graph in graphs.items()},
            limits=limits,
            **content,
        )


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that take part in an export."""
    import infimm_fast

    found = {"infimm-fast": infimm_fast.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def writing(file: Path) -> Iterator[Path]:
    """Yield a path beside `file` to write to; it is renamed if all went well, and removed if not.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        partial.rename(file)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        remedy = "; free some space and run it again" if error.errno == errno.ENOSPC else ""
        raise OSError(error.errno or errno.EIO, f"{file} cannot be written: {reason}{remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file at once."""
    with writing(file) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def prepare_folder(folder: Path, overwrite: bool, within_checkpoint: bool = False) -> None:
    """Make a folder for an artifact; an artifact that is to be overwritten stops being one.

    Args:
        folder: to be made.
        overwrite: an artifact, whole or failed, may be there.
        within_checkpoint: the folder is that of the model itself.

    Raises:
        ArtifactError: something else is there.
    """
    if folder.is_file():
        raise ArtifactError(f"{folder} is a file; give a folder")
    occupied = folder.exists() and any(folder.iterdir())
    ours = (folder / MANIFEST).exists() or (folder / VERIFICATION).exists() or (folder / "onnx").exists()
    if occupied and ours and not overwrite:
        raise ArtifactError(f"{folder} holds an artifact already; overwrite it on purpose (overwrite=True, --overwrite)")
    if occupied and not ours and not within_checkpoint:
        raise ArtifactError(f"{folder} exists already and is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    if ours:
        shutil.rmtree(folder / "onnx", ignore_errors=True)


def hash_file(file: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Return the SHA-256 of a file, read in pieces; `on_bytes` is told the size of each."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def _hash_files(folder: Path, names: Iterable[str], progress: Progress) -> dict[str, dict[str, Any]]:
    names = sorted(names)
    sizes = {name: (folder / name).stat().st_size for name in names}
    total, done = sum(sizes.values()), 0
    result = {}

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress("hash", done, total)

    for name in names:
        result[name] = {"sha256": hash_file(folder / name, count), "bytes": sizes[name]}
    return result


def write_manifest(folder: Path, manifest: Manifest, names: Iterable[str], progress: Progress = no_progress) -> None:
    """Hash the files of an artifact and write its manifest, the last file of all.

    Args:
        folder: the artifact.
        manifest: its description; `files` and `versions` are filled in.
        names: paths of its files in the folder.
        progress: told about hashing.
    """
    manifest.files = _hash_files(folder, names, progress)
    manifest.versions = package_versions()
    write_json(folder / MANIFEST, manifest.to_json())


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artifact, and see that its files are there in their sizes.

    Raises:
        ArtifactError: the folder is none, or of another version, or a file is missing or of another size.
    """
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder} is not an artifact: it has no {MANIFEST} (an export that failed has none)")
    try:
        content = json.loads((folder / MANIFEST).read_text())
        version = content["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        made_by = content.get("versions", {}).get("infimm-fast", "unknown")
        raise ArtifactError(
            f"{folder} has format {version}, written by infimm_fast {made_by}; this version reads format {FORMAT_VERSION}: "
            "export it again"
        )
    try:
        manifest = Manifest.from_json(content)
    except (TypeError, KeyError, ValueError) as error:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: {error}") from error
    for name, entry in manifest.files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != entry["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes"
            raise ArtifactError(f"{name} {state}; the manifest of {folder} says {entry['bytes']} bytes")
    return manifest


def verify_files(folder: Path, progress: Progress = no_progress) -> Mapping[str, Any]:
    """Hash every file of an artifact and compare with the manifest.

    Returns:
        The manifest's files.

    Raises:
        ArtifactError: a file was changed; all such files are named.
    """
    manifest = load_manifest(folder)
    actual = _hash_files(folder, manifest.files, progress)
    changed = [name for name, entry in manifest.files.items() if actual[name]["sha256"] != entry["sha256"]]
    if changed:
        raise ArtifactError(f"{', '.join(changed)} of {folder} changed since the export: another sha256 than the manifest's")
    return manifest.files
