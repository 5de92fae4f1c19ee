"""Argument checks of the public ops: typed errors that say what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Collection

import torch

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class KernelArgumentError(ValueError):
    """An op was given an argument outside its contract."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], layout: str) -> None:
    """Raise `KernelArgumentError` unless `tensor` has `shape`; `None` accepts any size.

    Args:
        name: argument name used in the message.
        tensor: the tensor to check.
        shape: expected sizes.
        layout: the expected sizes in words, for example ``"[B, N, H, D]"``.
    """
    matches = tensor.shape == shape  # mostly settles it, at a tenth of the loop's cost
    if not matches and tensor.dim() == len(shape):
        matches = all(want is None or have == want for have, want in zip(tensor.shape, shape, strict=True))
    if not matches:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise KernelArgumentError(f"{name} has shape {list(tensor.shape)}; expected {layout} = [{wanted}]")


def check_same_kind(reference_name: str, reference: torch.Tensor, **tensors: torch.Tensor) -> None:
    """Raise `KernelArgumentError` unless all tensors share the reference's dtype and device."""
    if reference.dtype not in SUPPORTED_DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        raise KernelArgumentError(f"{reference_name} has dtype {reference.dtype}; accepted are {accepted}")
    dtype, device = reference.dtype, reference.device
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or tensor.device != device:
            raise KernelArgumentError(
                f"{name} is {tensor.dtype} on {tensor.device}; it must match {reference_name}, {dtype} on {device}"
            )


def check_choice(name: str, value: str, accepted: Collection[str]) -> None:
    """Raise `KernelArgumentError` unless `value` is one of `accepted`."""
    if value not in accepted:
        raise KernelArgumentError(f"{name}={value!r} is not known; accepted are {', '.join(sorted(accepted))}")
