"""Runs exported graphs on declared shapes and compares them with PyTorch, within the kernels' error budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from infimm_fast.export.common.artifact import Progress, no_progress
from infimm_fast.export.common.errors import LimitError, ShapeError, ToleranceError
from infimm_fast.export.common.graphs import nest_inputs
from infimm_fast.export.common.spec import VISUAL_MULTIPLE, GraphSpec, padded_visual_length
from infimm_fast.kernels.common.numerics import Errors, measure_errors, outlier_normal
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.position_embedding import THUMBNAIL
from infimm_fast.models.infimm_hd.visual_context import VisualContext, consecutive_ranges, count_images

# Runs a graph: name, inputs by name -> outputs by name.
Run = Callable[[str, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """Inputs that a graph is tried with.

    Attributes:
        name: in the report.
        inputs: by name.
        compared: output name -> bool mask of the positions that matter; outputs that are not named matter everywhere.
    """

    name: str
    inputs: dict[str, torch.Tensor]
    compared: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _DecoderShape:
    """A batch of text: tiles of each picture of each row, new tokens, cached ones, padding of the last row."""

    name: str
    pictures: tuple[tuple[int, ...], ...]
    length: int
    past: int = 0
    padding: int = 0


_DECODER_SHAPES = (
    _DecoderShape("one tile", ((1,),), 6),
    _DecoderShape("ten tiles", ((10,),), 5),
    _DecoderShape("several images in a row, padding", ((1, 2, 1), (2,)), 9, padding=3),
    _DecoderShape("a text-only row among others", ((2,), ()), 6, padding=2),
    _DecoderShape("text only", ((), ()), 4),
    _DecoderShape("a cache", ((1,), (1, 1)), 3, past=7, padding=2),
    _DecoderShape("one token after a cache", ((1,), ()), 1, past=9, padding=4),
    _DecoderShape("one token, nothing before", ((1,),), 1),
)
_TILE_COUNTS = (1, 2, 10)


class Float64(TorchFunctionMode):
    """Computes everything in float64, with weights cast for one function at a time: no second copy of the model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one function of PyTorch on float64 in place of its floating-point tensors and dtypes."""
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):  # attributes are those of the tensor itself
            return func(*args, **(kwargs or {}))
        assert name.startswith("_") or not name.endswith("_"), f"{name} writes to its arguments"
        if name in ("float", "half", "bfloat16"):
            func = torch.Tensor.double
        return func(*tree_map(_widen, args), **tree_map(_widen, kwargs or {}))


def _widen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def model_cases(graph: GraphSpec, config: InfiMMHDConfig) -> list[Case]:
    """Return the cases of one of a model's graphs; the numbers are random but the same every time."""
    if graph.name == "decoder":
        return [_decoder_case(graph, shape, config, seed) for seed, shape in enumerate(_DECODER_SHAPES)]
    return [_tile_case(graph, tiles) for tiles in _TILE_COUNTS]


def _random(graph: GraphSpec, free: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Return unit-scale numbers with outliers for all floating-point inputs."""
    floating = [tensor for tensor in graph.inputs if tensor.torch_dtype.is_floating_point]
    return {
        tensor.name: outlier_normal(*tensor.sizes(free), dtype=tensor.torch_dtype, seed=100 * seed + index)
        for index, tensor in enumerate(floating)
    }


def _tile_case(graph: GraphSpec, tiles: int) -> Case:
    inputs = _random(graph, {"num_tiles": tiles}, tiles)
    if graph.name == "vision":
        places = [(tile // 3, tile % 3) for tile in range(tiles - 1)]
        inputs["tile_positions"] = torch.tensor([*places, THUMBNAIL if tiles > 1 else (0, 0)])
    return Case(f"{tiles} tile{'s' if tiles > 1 else ''}", inputs, {})


def _decoder_case(graph: GraphSpec, shape: _DecoderShape, config: InfiMMHDConfig, seed: int) -> Case:
    rows, total = len(shape.pictures), shape.past + shape.length
    tokens_per_tile = config.visual_tokens_per_tile
    generator = torch.Generator().manual_seed(seed)
    special = (config.image_token_id, config.end_of_chunk_token_id)
    ids = torch.randint(config.text_config.vocab_size, (rows, total), generator=generator)
    ids[(ids == special[0]) | (ids == special[1])] = 1
    mask = torch.ones(rows, total, dtype=torch.int64)
    mask[-1, : shape.padding] = 0
    for row, pictures in enumerate(shape.pictures):
        start = 1 + (shape.padding if row == rows - 1 else 0)  # the first token comes before the first picture
        ids[row, [min(start + 2 * index, total - 1) for index in range(len(pictures))]] = config.image_token_id
    tiles = [count for pictures in shape.pictures for count in pictures]
    row_images = consecutive_ranges(torch.tensor([len(pictures) for pictures in shape.pictures]))
    offsets = torch.tensor([0, *tiles]).cumsum(0) * tokens_per_tile
    context = VisualContext(torch.empty(0), offsets, row_images)
    seen = count_images(ids == config.image_token_id)[:, shape.past :]
    visual_length = max(padded_visual_length(sum(tiles) * tokens_per_tile), VISUAL_MULTIPLE)
    free = {"batch_size": rows, "past_sequence_length": shape.past, "visual_length": visual_length}
    inputs = _random(graph, free, seed) | {
        "input_ids": ids[:, shape.past :].contiguous(),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, shape.past :].contiguous(),
        "kv_range": context.kv_range(seen, config.only_attend_immediate_image),
        "has_image": context.images_per_row > 0,
    }
    # What comes out at padding is nobody's business.
    real = mask.bool()
    compared = {tensor.name: real[:, None, :, None] for tensor in graph.outputs}
    compared["logits"] = real[:, shape.past :, None]
    return Case(shape.name, inputs, compared)


def reference_outputs(module: nn.Module, graph: GraphSpec, case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a graph's module in PyTorch.

    Args:
        module: in the dtype of the graph.
        graph: its declaration.
        case: the inputs.

    Returns:
        The flat outputs in the module's dtype, and in float64.
    """
    flat = [case.inputs[tensor.name] for tensor in graph.inputs]
    layers = sum(tensor.name.startswith("past_key_values.") for tensor in graph.inputs) // 2
    with torch.no_grad():
        arguments = nest_inputs(graph.name, flat, layers)
        plain = _flatten(module(*arguments))
        with Float64():
            exact = _flatten(module(*tree_map(_widen, arguments)))
    return plain, exact


def _flatten(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def verify_graph(
    module: nn.Module,
    graph: GraphSpec,
    cases: list[Case],
    run: Run,
    limits: Mapping[str, tuple[int, int]],
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Compare an exported graph with its module on every case that lies within the limits.

    Args:
        module: the graph's module, in the graph's dtype.
        graph: its declaration.
        cases: what to try.
        run: runs the exported graph.
        limits: free axis -> (smallest, largest) size.
        progress: told about each case.

    Returns:
        For each case the sizes of its axes, and the worst output's errors with what was allowed.

    Raises:
        ShapeError: a result has another shape or dtype than declared.
        ToleranceError: a result lies outside the budget.
        LimitError: no case lies within the limits.
    """
    report: dict[str, Any] = {}
    sizes_of = [graph.resolve_axes({n: tuple(x.shape) for n, x in case.inputs.items()}, {}) for case in cases]
    tried = [(case, sizes) for case, sizes in zip(cases, sizes_of, strict=True) if _within(sizes, limits)]
    if not tried:
        raise LimitError(f"{graph.name}: no case of the verification lies within {dict(limits)}; verify=False skips it")
    for index, (case, sizes) in enumerate(tried):
        outputs = run(graph.name, case.inputs)
        plain, exact = reference_outputs(module, graph, case)
        measured = {}
        for tensor, expected, wanted in zip(graph.outputs, plain, exact, strict=True):
            actual = outputs[tensor.name]
            if actual.shape != expected.shape or actual.dtype != tensor.torch_dtype:
                raise ShapeError(
                    f"{graph.name}, {case.name}: {tensor.name} is {actual.dtype} {list(actual.shape)}; "
                    f"PyTorch gives {tensor.torch_dtype} {list(expected.shape)}"
                )
            mask = case.compared.get(tensor.name)
            measured[tensor.name] = _measure(actual, expected, wanted, mask)
        name, errors = max(measured.items(), key=lambda item: _excess(item[1]))
        if not _excess(errors) <= 1:
            raise ToleranceError(f"{graph.name}, {case.name}: {name} is outside the error budget: {errors}")
        report[case.name] = {"axes": sizes, "worst": name, **errors.__dict__}
        progress(f"verify {graph.name}", index + 1, len(tried))
    return report


def _within(sizes: Mapping[str, int], limits: Mapping[str, tuple[int, int]]) -> bool:
    return all(low <= sizes[axis] <= high for axis, (low, high) in limits.items() if axis in sizes)


def _measure(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, mask: torch.Tensor | None) -> Errors:
    if mask is not None:
        chosen = mask.expand_as(actual)
        actual, plain, exact = actual[chosen], plain[chosen], exact[chosen]
    # NaN compares as outside; an infinity where PyTorch has one too is PyTorch's overflow, not the graph's.
    same = torch.isinf(plain) & (actual == plain)
    return measure_errors(actual[~same], plain[~same], exact[~same])


def _excess(errors: Errors) -> float:
    """Return the errors over what is allowed; infinite if one is NaN."""
    ratio = max(errors.max_abs / errors.allowed_max_abs, errors.rms / errors.allowed_rms)
    return ratio if ratio == ratio else float("inf")
