"""One export, prepared: what was asked for, checked and settled once, and handed on as one value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infimm_fast.dtypes import DTYPES, dtype_name
from infimm_fast.export.common.artifact import PROCESSOR, Manifest, Progress, no_progress, prepare_folder, write_manifest
from infimm_fast.export.common.errors import ExportError
from infimm_fast.export.common.family import Family, family_of
from infimm_fast.export.common.spec import AxisLimits, GraphSpec, check_dtype


@dataclass(frozen=True)
class PreparedExport:
    """An export whose arguments were accepted.

    Attributes:
        family: of the model.
        model: in its own dtype; it is not changed.
        config: what the family reads sizes from.
        out: folder of the artifact.
        dtype: of the exported weights.
        specs: name -> declaration of each graph that is exported.
        limits: free axis -> (smallest, largest) size.
        kind: "model", or "module" for a single one.
        folder: of the model, if it was given as one.
        processor: saved with the model, if there is one.
        progress: told about every step.
    """

    family: Family
    model: Any
    config: Any
    out: Path
    dtype: str
    specs: Mapping[str, GraphSpec]
    limits: AxisLimits
    kind: str = "model"
    folder: Path | None = None
    processor: Any = None
    progress: Progress = no_progress

    @property
    def torch_dtype(self) -> torch.dtype:
        """The weights' dtype as PyTorch's."""
        return DTYPES[self.dtype]

    def samples(self, spec: GraphSpec, device: str = "cpu") -> list[torch.Tensor]:
        """Return zeros in the shapes that a graph is traced with."""
        sizes = self.family.sample_sizes(self.specs)
        return [torch.zeros(tensor.sizes(sizes), dtype=tensor.torch_dtype, device=device) for tensor in spec.inputs]

    def finish(
        self,
        target: str,
        graph_files: Mapping[str, str],
        names: Iterable[str],
        options: dict[str, Any],
        verified: bool = False,
    ) -> Path:
        """Save the processor, write the manifest, and return the folder.

        Args:
            target: of the export.
            graph_files: name -> path of the graph's file in the folder.
            names: paths of the files that were written.
            options: what the export was asked for.
            verified: a verification passed.
        """
        files = set(names)
        if self.processor is not None:
            self.processor.save_pretrained(self.out / PROCESSOR)
            files |= {str(file.relative_to(self.out)) for file in (self.out / PROCESSOR).rglob("*") if file.is_file()}
        manifest = Manifest(
            kind=self.kind,
            target=target,
            dtype=self.dtype,
            graphs=dict(self.specs),
            graph_files=dict(graph_files),
            limits=dict(self.limits),
            options=options,
            config=self.family.config_to_json(self.config),
            generation=self.family.generation(self.model),
            verified=verified,
            family=self.family.name,
        )
        write_manifest(self.out, manifest, files, self.progress)
        return self.out


def prepare_export(
    model: Any,
    out: str | Path,
    *,
    dtype: str | None,
    graphs: tuple[str, ...] | None,
    limits: AxisLimits | None,
    processor: Any,
    overwrite: bool,
    progress: Progress | None,
    within_checkpoint: bool = False,
) -> PreparedExport:
    """Load a model, settle dtype, graphs and limits, and make the folder.

    Args:
        model: a model of a registered family, or the folder of one.
        out: folder to make.
        dtype: "float32", "float16" or "bfloat16"; None for the model's own.
        graphs: which of the family's; None for all.
        limits: free axis -> (smallest, largest) size, in place of the family's default.
        processor: None takes the one in the model's folder, if there is one.
        overwrite: replace an artifact in `out`.
        progress: told about every step.
        within_checkpoint: `out` is the folder of the model itself.

    Raises:
        ExportError: an argument is not accepted; nothing was written.
    """
    if dtype is not None:
        check_dtype(dtype)
    family = family_of(model)
    chosen = family.graphs if graphs is None else graphs
    if not chosen or not set(chosen) <= set(family.graphs):
        raise ExportError(f"graphs={chosen!r} is not accepted; choose from {', '.join(family.graphs)}")
    folder = Path(model) if isinstance(model, (str, Path)) else None
    if folder is not None:
        processor = processor or family.load_processor(folder)
        model = family.load_model(folder, None if dtype is None else DTYPES[dtype])
    dtype = _settle_dtype(family, model, dtype)
    config = family.config(model)
    specs = {name: spec for name, spec in family.specs(config, dtype).items() if name in chosen}
    prepared = PreparedExport(
        family=family,
        model=model,
        config=config,
        out=Path(out),
        dtype=dtype,
        specs=specs,
        limits=_settle_limits(family, config, specs, limits),
        folder=folder,
        processor=processor,
        progress=progress or no_progress,
    )
    prepare_folder(prepared.out, overwrite, within_checkpoint)
    return prepared


def _settle_dtype(family: Family, model: Any, dtype: str | None) -> str:
    """Return the dtype of the export: the model's, unless another one was asked for."""
    own = {dtype_name(parameter.dtype) for parameter in model.parameters()}
    if dtype is None:
        if len(own) > 1:
            raise ExportError(f"the model has weights of {', '.join(sorted(own))}; give one dtype")
        dtype = next(iter(own), "float32")
        check_dtype(dtype)
    family.check_dtype(model, dtype)
    return dtype


def _settle_limits(
    family: Family, config: Any, specs: Mapping[str, GraphSpec], limits: AxisLimits | None
) -> dict[str, tuple[int, int]]:
    """Return (smallest, largest) size of free axes: the family's, with those that were asked for in place."""
    settled = family.default_limits(config)
    known = {axis: (1, None) for spec in specs.values() for axis in spec.free_axes} | settled
    for axis, (smallest, largest) in (limits or {}).items():
        if axis not in known or not known[axis][0] <= smallest <= largest:
            raise ExportError(f"limits {smallest} to {largest} of {axis!r} are not accepted; the axes start at {known}")
        longest = settled[axis][1] if axis in family.bounded_axes else largest
        if largest > longest:
            raise ExportError(f"{axis} up to {largest} is not accepted; the model is right up to {longest}")
        settled[axis] = (smallest, largest)
    return settled
