"""What a family of models says of itself, and the register of families.

A family is one class: which models it takes, their graphs, the modules behind them, what they are verified with, and what
runs them. Exporters and runtimes know a model only through it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from infimm_fast.export.common.cases import Case, random_cases
from infimm_fast.export.common.errors import ArtifactError, ExportError
from infimm_fast.export.common.source import cast_model
from infimm_fast.export.common.spec import GraphSpec

if TYPE_CHECKING:
    from infimm_fast.export.common.artifact import Manifest
    from infimm_fast.export.common.runner import Backend, ExportedModel


class Family:
    """A family of models that share their graphs.

    A subclass sets `name`, `model_class` and `graphs` and defines `specs` and `modules`. Everything else has a default that
    suits a model without text.

    `config` stands for whatever `specs` reads sizes from: by default the model's own ``config``.

    Attributes:
        name: in manifests; also the ``model_type`` in ``config.json`` of its models' folders.
        model_class: name of the class of its models, or of a base of it.
        graphs: names, in the order in which data goes through them.
        bounded_axes: free axes whose largest default size is a property of the model, which nobody may raise.
        derived_axes: free axes whose size follows from others, for tracers that find that out by themselves.
        fp8_graphs: graphs whose linear layers may run in FP8.
    """

    name: str = ""
    model_class: str = ""
    graphs: tuple[str, ...] = ()
    bounded_axes: tuple[str, ...] = ()
    derived_axes: tuple[str, ...] = ()
    fp8_graphs: tuple[str, ...] = ()

    def specs(self, config: Any, dtype: str) -> dict[str, GraphSpec]:
        """Return name -> declaration of every graph, for weights of a dtype."""
        raise NotImplementedError

    def modules(self, model: Any) -> dict[str, nn.Module]:
        """Return name -> module of every graph; they share the model's parameters, and its inputs are `GraphSpec.nest`'s."""
        raise NotImplementedError

    def takes(self, model: Any) -> bool:
        """Return whether a model is of this family."""
        return self.model_class in (kind.__name__ for kind in type(model).__mro__)

    def load_model(self, folder: Path, dtype: torch.dtype | None) -> Any:
        """Load a model from its folder, in a dtype or its own."""
        raise ExportError(f"{self.name} models are given as objects: the family does not load {folder}")

    def load_processor(self, folder: Path) -> Any:
        """Load the processor in a folder; None if it holds none."""
        return None

    def config(self, model: Any) -> Any:
        """Return what `specs` reads sizes from."""
        return getattr(model, "config", None)

    def config_to_json(self, config: Any) -> dict[str, Any]:
        """Return a configuration as JSON's types, for the manifest."""
        return config.to_dict() if hasattr(config, "to_dict") else {}

    def config_from_json(self, content: dict[str, Any]) -> Any:
        """Return the configuration that a manifest holds."""
        return content

    def generation(self, model: Any) -> dict[str, Any]:
        """Return ids that end and pad a generated text, for the manifest."""
        return {}

    def default_limits(self, config: Any) -> dict[str, tuple[int, int]]:
        """Return (smallest, largest) size of each free axis that has limits."""
        return {}

    def sample_sizes(self, specs: Mapping[str, GraphSpec]) -> dict[str, int]:
        """Return the sizes of free axes that graphs are traced with: all different, none 0 or 1."""
        axes = sorted({axis for spec in specs.values() for axis in spec.free_axes})
        return {axis: 3 + 2 * index for index, axis in enumerate(axes)}

    def cases(self, spec: GraphSpec, config: Any) -> list[Case]:
        """Return what a graph is verified with; by default random numbers, which suit floating-point inputs."""
        return random_cases(spec, self.sample_sizes({spec.name: spec}))

    def axis_ranges(self, config: Any, limits: Any) -> dict[str, tuple[int, int, int]]:
        """Return the range of every free axis that `to_tensorrt.profiles.Limits` of a conversation stand for."""
        raise ExportError(
            f"{self.name} has no conversations: give profiles as Profile, by free axis, in place of {limits.name}"
        )

    def check_dtype(self, model: Any, dtype: str) -> None:
        """Raise `ExportError` if a model cannot be exported in a dtype."""

    def cast(self, model: Any, dtype: torch.dtype) -> Any:
        """Return a model with its parameters in a dtype on the CPU; itself if they are."""
        return cast_model(model, dtype)

    @contextlib.contextmanager
    def as_exported(self, model: Any) -> Iterator[None]:
        """Put a model into the state that is exported, and back afterwards."""
        training = model.training
        try:
            model.eval()
            yield
        finally:
            model.train(training)

    def runner(self, manifest: Manifest, backend: Backend, processor: Any) -> ExportedModel:
        """Return what `infimm_fast.export.load` gives its caller."""
        from infimm_fast.export.common.runner import ExportedModel

        return ExportedModel(manifest, backend, processor)


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known to exporters and to `infimm_fast.export.load`; one of the same name is replaced."""
    if not family.name or not family.graphs:
        raise ExportError(f"{type(family).__name__} needs a name and the names of its graphs")
    _families()[family.name] = family


def _families() -> dict[str, Family]:
    """Return the families that are known: those of the package, which register when first asked for, and the user's."""
    importlib.import_module("infimm_fast.export.models")
    return _FAMILIES


def family_of_manifest(manifest: Manifest) -> Family:
    """Return the family of an artifact's model.

    Raises:
        ArtifactError: it is not registered.
    """
    name = manifest.family or manifest.config.get("model_type", "")
    families = _families()
    if name not in families:
        raise ArtifactError(f"the artifact's family {name!r} is not registered; known are {', '.join(families)}")
    return families[name]


def family_of(model: Any) -> Family:
    """Return the family of a model, or of the folder of one.

    Raises:
        ExportError: no family takes it.
    """
    families: Sequence[Family] = list(_families().values())
    if isinstance(model, (str, Path)):
        kind = _model_type(Path(model))
        found = [family for family in families if family.name == kind]
        if not found:
            raise ExportError(f"{model} is of the model_type {kind!r}; known are {', '.join(f.name for f in families)}")
        return found[-1]
    found = [family for family in families if family.takes(model)]
    if not found:
        accepted = ", ".join(family.model_class for family in families)
        raise ExportError(
            f"{type(model).__name__} is of no known family ({accepted}), and not the folder of one; "
            "register_family adds one, and single modules go to export_module_onnx"
        )
    return found[-1]


def _model_type(folder: Path) -> Any:
    file = folder / "config.json"
    if not file.is_file():
        raise ExportError(f"{folder} is not the folder of a model: it has no config.json")
    try:
        return json.loads(file.read_text())["model_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{file} names no model_type") from error
