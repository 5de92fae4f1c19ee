"""What the configuration tables of all ops are made of: architectures, rows, covers of a head dim."""

from __future__ import annotations

from dataclasses import dataclass

from infimm_fast.kernels.common.checks import KernelArgumentError

ARCHITECTURES = (80, 89, 90, 100, 120)


@dataclass(frozen=True)
class Row:
    """One row of the table: tiles for head dims up to `head_dim`; the others as in `LaunchConfig`."""

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def cover_of(width: int) -> tuple[int, ...]:
    """Return powers of two, at least 16 each, that cover `width` channels: the fewest channels, then the fewest pieces.

    ``72 -> (64, 16)``, ``88 -> (64, 32)``, ``112 -> (64, 32, 16)``, ``128 -> (128,)``.
    """
    padded = max(16, 1 << (width - 1).bit_length())
    if padded == 16:
        return (16,)
    half = padded // 2
    pieces = (half, *cover_of(width - half))
    return pieces if sum(pieces) < padded else (padded,)


def architecture_of(capability: int) -> int:
    """Return the architecture whose rows serve a compute capability (90 for a Hopper).

    Raises:
        KernelArgumentError: the GPU is older than Ampere.
    """
    if capability < 80:
        raise KernelArgumentError(f"the kernels need compute capability 8.0 or later, not {capability / 10}")
    # 8.6 has the shared memory of 8.9, 12.1 is a 12.0, and 11.0 and 10.3 belong to 10.0.
    if 80 < capability < 90 and capability != 87:
        return 89
    return max(architecture for architecture in ARCHITECTURES if architecture <= capability)
