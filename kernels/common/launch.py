"""What a kernel launch is made of: the frozen configuration, checked strides, and the device it runs on."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from infimm_fast.kernels.common.checks import BackendUnavailableError, KernelArgumentError, check_choice

INT32_MAX = 2**31 - 1
BACKENDS = ("auto", "triton", "sdpa", "reference")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 128


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is cut into tiles; every field is a compile-time constant of the kernel.

    Args:
        block_m: query rows of a tile.
        block_n: key rows of a tile.
        num_warps: warps of a program.
        num_stages: depth of the load pipeline.
        cover: powers of two whose sum covers the head dim; a single one is the padded head dim.
        peel: the first token is taken out of the tiles and handled apart.
        max_registers: cap on a thread's registers, so that one more program fits on a multiprocessor; None for no cap.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    cover: tuple[int, ...]
    peel: bool = False
    max_registers: int | None = None

    def options(self) -> dict[str, int]:
        """Return the launch options that Triton takes beside the constants."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


def head_strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return the (batch, token, head) strides of ``[B, N, H, D]``; the stride of an axis of size 1 is 0."""
    return tuple(  # type: ignore[return-value]
        stride if size > 1 else 0 for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
    )


def unit_strides(align: int, *tensors: torch.Tensor) -> list[int]:
    """Return the `head_strides` of all tensors in units of `align` elements, as kernels take them."""
    return [stride // align for tensor in tensors for stride in head_strides(tensor)]


def common_alignment(*tensors: torch.Tensor) -> int:
    """Return 8 if every row of every ``[B, N, H, D]`` tensor starts at a multiple of 8 elements, else 1.

    Kernels take strides in this unit and multiply by it, so that the compiler knows the alignment from arithmetic that
    cannot lie; head dims of 72, 88 and 104 have no stride divisible by 16, which is all it would infer by itself. The
    base pointers' alignment is inferred by Triton at launch.
    """
    return 8 if all(stride % 8 == 0 for tensor in tensors for stride in head_strides(tensor)) else 1


def rows_are_wide(rows: int, *tensors: torch.Tensor) -> bool:
    """Return whether offsets inside a tile of `rows` tokens can pass 2^31 elements."""
    return any(rows * abs(head_strides(tensor)[1]) > INT32_MAX for tensor in tensors)


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, copied only if its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def interpreting() -> bool:
    """Return whether Triton kernels run on CPU tensors, under ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _find_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


# Found, not imported; a constant, so that torch.compile can trace through the choice of backend.
TRITON_INSTALLED = _find_triton()


def resolve_backend(backend: str, tensor: torch.Tensor) -> str:
    """Turn ``"auto"`` into a backend for `tensor`, and refuse an explicit ``"triton"`` that cannot run.

    Args:
        backend: one of `BACKENDS`.
        tensor: one of the inputs.

    Raises:
        KernelArgumentError: there is no such backend.
        BackendUnavailableError: ``"triton"`` was asked for, and triton is missing or the tensor is on a CPU without
            ``TRITON_INTERPRET=1``.
    """
    if backend == "auto":
        return "triton" if tensor.device.type == "cuda" and TRITON_INSTALLED else "sdpa"
    check_choice("backend", backend, BACKENDS)
    if backend == "triton":
        if not TRITON_INSTALLED:
            raise BackendUnavailableError("backend='triton' needs the triton package; pip install 'infimm-fast[gpu]'")
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreting()):
            raise BackendUnavailableError(
                f"backend='triton' needs CUDA tensors (or CPU tensors and TRITON_INTERPRET=1), not {tensor.device.type}"
            )
    return backend


def settle_backend(backend: str, tensor: torch.Tensor, obstacles: Callable[[], str | None], stacklevel: int = 3) -> str:
    """Turn ``"auto"`` into a backend that takes the arguments; a backend asked for by name is never replaced.

    Args:
        backend: one of `BACKENDS`.
        tensor: one of the inputs.
        obstacles: return why the Triton kernels do not take these arguments, or None; called if they are wanted.
        stacklevel: of the warning; 3 if the caller is the public function.

    Raises:
        KernelArgumentError: there is no such backend, or ``"triton"`` was asked for and there is an obstacle.
        BackendUnavailableError: see `resolve_backend`.
    """
    chosen = resolve_backend(backend, tensor)
    obstacle = obstacles() if chosen == "triton" else None
    if obstacle is None:
        return chosen
    if backend == "triton":
        raise KernelArgumentError(obstacle)
    warnings.warn(f"backend='auto' falls back to 'sdpa': {obstacle}", stacklevel=stacklevel)
    return "sdpa"


_operators_kept = False


@contextlib.contextmanager
def keep_operators() -> Iterator[None]:
    """Let the public functions call their torch operator whatever the backend, so that an exported graph holds one node.

    Outside, only Triton hides behind an operator; the other backends are traced as the ordinary functions they are made
    of. For the whole process, since tracing may run in other threads.
    """
    global _operators_kept
    before, _operators_kept = _operators_kept, True
    try:
        yield
    finally:
        _operators_kept = before


def calls_operator(backend: str) -> bool:
    """Return whether a public function hands a call for this (resolved) backend to its torch operator."""
    return backend == "triton" or _operators_kept


def dtype_obstacle(tensor: torch.Tensor) -> str | None:
    """Return why no kernel takes tensors of this dtype, or None."""
    if tensor.dtype not in TRITON_DTYPES:
        return f"the kernel takes float16, bfloat16 and float32, not {str(tensor.dtype).removeprefix('torch.')}"
    return None


def triton_obstacle(q: torch.Tensor) -> str | None:
    """Return why no attention kernel takes queries ``[..., D]`` of this kind, or None."""
    head_dim = q.shape[-1]
    obstacle = dtype_obstacle(q)
    if obstacle is not None:
        return obstacle
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        return f"the kernel takes head dims that are multiples of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


def can_read(tensor: torch.Tensor) -> bool:
    """Return whether the values of a tensor may decide what runs next.

    They may not while `torch.compile` or `torch.export` trace, nor under capture: a graph would replay today's decision on
    tomorrow's values, even if today's is known already.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if tensor.is_cpu:
        return True
    kind = tensor.device.type
    return kind != "meta" and not (kind == "cuda" and torch.cuda.is_current_stream_capturing())


@functools.cache
def _device_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(tensor: torch.Tensor) -> int:
    """Return the compute capability of the tensor's device, 90 for a Hopper; a CPU (interpreter) counts as 80."""
    return _device_capability(tensor.device.index or 0) if tensor.device.type == "cuda" else 80


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one, since Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
