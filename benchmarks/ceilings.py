"""What the device can do at best, measured in the same run: the rate of large matrix products and of copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infimm_fast.benchmarks.timing import Timer

# (rows, inner, columns): square ones, and the shape of InfiMM-HD's MLP on ten tiles.
_MATMULS = {"cuda": ((4096,) * 3, (8192,) * 3, (10250, 1792, 15360)), "cpu": ((512,) * 3, (1024,) * 3)}
_COPIED_BYTES = {"cuda": 2**31, "cpu": 2**27}


@dataclass(frozen=True)
class Ceilings:
    """Rates that nothing on the device can pass.

    Attributes:
        matmul_tflops: fastest matrix product, in 10^12 operations per second.
        copy_gb_s: copying device memory, bytes read and written, in 10^9 per second.
    """

    matmul_tflops: float
    copy_gb_s: float

    def least_ms(self, flops: int, moved_bytes: int) -> tuple[float, str]:
        """Return the least time of a case in milliseconds, and which ceiling binds it: "matmul" or "copy"."""
        by_matmul, by_copy = flops / (self.matmul_tflops * 1e9), moved_bytes / (self.copy_gb_s * 1e6)
        return (by_matmul, "matmul") if by_matmul >= by_copy else (by_copy, "copy")

    def raised_by(self, other: Ceilings) -> Ceilings:
        """Return the higher one of each rate."""
        return Ceilings(max(self.matmul_tflops, other.matmul_tflops), max(self.copy_gb_s, other.copy_gb_s))


def measure_ceilings(dtype: torch.dtype, timer: Timer) -> Ceilings:
    """Measure the ceilings of one dtype; random data, since zeros run faster than any real product."""
    device = timer.device
    rates = []
    for rows, inner, columns in _MATMULS[device.type]:
        a = torch.randn(rows, inner, device=device, dtype=dtype)
        b = torch.randn(inner, columns, device=device, dtype=dtype)
        rates.append(2 * rows * inner * columns / (timer.eager([lambda a=a, b=b: a @ b]).median * 1e9))  # type: ignore[misc]
    source = torch.zeros(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = timer.eager([lambda: target.copy_(source)]).median
    return Ceilings(max(rates), 2 * source.nbytes / (copied * 1e6))
