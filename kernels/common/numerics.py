"""How a result is judged: an error budget against float64, inputs with outliers, poisoned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# A kernel may err twice as much as the plain statement run in the same precision.
BUDGET_FACTOR = 2.0
# Exponents of softmax scores are fp32 in every backend: with unit-scale inputs and a few outliers they reach some tens,
# and a probability is no better than that many fp32 roundings. Two correct orders of summation differ by as much.
SOFTMAX_FLOOR = 32 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Errors:
    """Errors against the fp64 reference, with what was allowed."""

    max_abs: float
    rms: float
    allowed_max_abs: float
    allowed_rms: float


def measure_errors(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> Errors:
    """Compare a kernel's result and the plain statement's with the exact one.

    The floor, which matters where the plain statement happens to be exact, is twice the error of storing the exact
    result in the kernel's dtype, half a unit in the last place (eps / 2) of its largest value (of its root mean square
    for the RMS), plus `SOFTMAX_FLOOR` of that or of the inputs' unit scale.

    Args:
        actual: the kernel's result.
        plain: `reference.py` run on the same low-precision inputs.
        exact: `reference.py` run in fp64 on the same inputs.

    Returns:
        The kernel's errors and ``2 x`` those of the plain statement plus the floor.
    """
    wide = exact.double()
    error, plain_error = actual.double() - wide, plain.double() - wide
    eps = torch.finfo(actual.dtype).eps
    return Errors(
        max_abs=_max(error),
        rms=_rms(error),
        allowed_max_abs=BUDGET_FACTOR * _max(plain_error) + _floor(eps, _max(wide)),
        allowed_rms=BUDGET_FACTOR * _rms(plain_error) + _floor(eps, _rms(wide)),
    )


def assert_error_budget(name: str, actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> Errors:
    """Assert that a kernel's maximal and RMS errors stay within the budget; report which one did not.

    Args:
        name: of the result, for the message.
        actual: see `measure_errors`. It may be infinite exactly where `exact` is, and never NaN.
        plain: see `measure_errors`.
        exact: see `measure_errors`.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)} instead of {list(exact.shape)}"
    unset = int(torch.isnan(actual).sum())
    assert not unset, f"{name}: {unset} of {actual.numel()} values are NaN"
    finite = torch.isfinite(exact)
    assert torch.equal(actual[~finite].double(), exact[~finite].double()), f"{name}: infinities differ"
    assert torch.isfinite(actual[finite]).all(), f"{name}: infinite where the exact result is finite"
    errors = measure_errors(actual[finite], plain[finite], exact[finite])
    assert errors.max_abs <= errors.allowed_max_abs and errors.rms <= errors.allowed_rms, f"{name}: {errors}"
    return errors


def _floor(eps: float, size: float) -> float:
    return eps * size + SOFTMAX_FLOOR * max(1.0, size)


def _max(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def outlier_normal(
    *shape: int, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu", outliers: int = 4
) -> torch.Tensor:
    """Return unit-scale normal numbers of which a few are eight times as large, as activations of real towers are.

    Tiny inputs would make every softmax uniform, and a test with them passes whatever the kernel does.

    Args:
        shape: of the result.
        dtype: of the result; the numbers are drawn in float32, so that every dtype sees the same.
        seed: of the generator.
        device: where the numbers are drawn, since drawing many elsewhere and copying them takes long; "meta" gives a
            tensor without memory.
        outliers: how many values are enlarged.
    """
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=device)
    if values.numel():
        index = torch.randint(values.numel(), (outliers,), generator=generator, device=device)
        values.view(-1)[index] *= 8.0
    return values.to(dtype)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN, so that an output which a kernel forgets shows up."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
