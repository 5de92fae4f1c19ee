"""Runs exported graphs on declared shapes and compares them with PyTorch, within the kernels' error budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from infimm_fast.export.common.artifact import Progress, no_progress
from infimm_fast.export.common.cases import Case
from infimm_fast.export.common.errors import LimitError, ShapeError, ToleranceError
from infimm_fast.export.common.spec import AxisLimits, GraphSpec
from infimm_fast.kernels.common.numerics import Errors, measure_errors

# Runs a graph: name, inputs by name -> outputs by name.
Run = Callable[[str, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


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
    with torch.no_grad():
        arguments = graph.nest(flat)
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
    limits: AxisLimits,
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


def _within(sizes: Mapping[str, int], limits: AxisLimits) -> bool:
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
