"""Time sub-image attention against the ways to do without it.

Every implementation is first compared with the fp64 reference; one that misses the error budget gets no time. FLOPs are
counted on the true head dim. Run ``python -m infimm_fast.benchmarks.subimage_attention --help``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from infimm_fast.kernels import subimage_attention
from infimm_fast.kernels.subimage_attention.reference import subimage_attention_reference
from infimm_fast.testing import assert_error_budget, outlier_normal

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SDPA_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# The fp64 reference of all tiles would not fit; tiles do not see each other.
_CHECKED_TILES = 1


@dataclass(frozen=True)
class Case:
    """One shape: the attention of one layer over a batch of tiles."""

    tiles: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str

    @property
    def forward_flops(self) -> int:
        """Two products of ``N x N x D`` for each head and tile, on the true head dim."""
        return 4 * self.tiles * self.heads * self.tokens**2 * self.head_dim


@dataclass(frozen=True)
class Timing:
    """Times of one implementation in milliseconds, or why there are none."""

    implementation: str
    direction: str
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    tflops: float | None = None
    peak_memory_mb: float | None = None
    remark: str = ""


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Matrix product, softmax, matrix product on ``[B, N, H, D]``, as towers without a fused attention do it."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def _forced_sdpa(backend: SDPBackend) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return attention


def _flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return attention


def implementations(device: torch.device) -> dict[str, Attention]:
    """Return what can be compared on a device, ours last."""

    def ours(backend: str) -> Attention:
        return lambda q, k, v: subimage_attention(q, k, v, backend=backend)  # type: ignore[return-value]

    known: dict[str, Attention] = {"naive": naive, "naive-compiled": torch.compile(naive, dynamic=False)}
    if device.type == "cuda":
        known |= {name: _forced_sdpa(backend) for name, backend in _SDPA_BACKENDS.items()}
        known["flex-compiled"] = _flex()
    known["sdpa"] = ours("sdpa")
    if device.type == "cuda":
        known["infimm_fast"] = ours("triton")
    return known


def make_inputs(case: Case, device: torch.device, seed: int) -> torch.Tensor:
    """Return a packed ``[B, N, 3, H, D]``: what one qkv projection writes, the layout that every implementation gets."""
    shape = (case.tiles, case.tokens, 3, case.heads, case.head_dim)
    return outlier_normal(*shape, dtype=_DTYPES[case.dtype], seed=seed, device=device)


def check(attention: Attention, case: Case, device: torch.device, backward: bool) -> None:
    """Raise AssertionError unless an implementation keeps the error budget on the first tiles of a case."""
    qkv = make_inputs(case, device, seed=1)[:_CHECKED_TILES]
    weight = outlier_normal(*qkv[:, :, 0].shape, dtype=qkv.dtype, seed=2, device=device)
    scale = case.head_dim**-0.5

    def run(function: Attention, packed: torch.Tensor) -> list[torch.Tensor]:
        packed = packed.clone().requires_grad_(backward)
        out = function(*packed.unbind(2))
        if not backward:
            return [out]
        (gradient,) = torch.autograd.grad(out, packed, weight.to(out.dtype))
        return [out.detach(), *gradient.unbind(2)]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return subimage_attention_reference(q, k, v, scale)[0]

    results = zip(("out", "dq", "dk", "dv"), run(attention, qkv), run(plain, qkv), run(plain, qkv.double()), strict=False)
    for name, actual, low, exact in results:
        assert_error_budget(name, actual, low, exact)


def measure(run: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Return times of single runs in milliseconds, with a cold L2 on a GPU."""
    for _ in range(3):
        run()
    times: list[float] = []
    if device.type != "cuda":
        deadline = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < deadline:
            started = time.perf_counter()
            run()
            times.append((time.perf_counter() - started) * 1e3)
        return times
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device=device)  # larger than any L2
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    torch.cuda.synchronize(device)
    deadline = time.perf_counter() + seconds
    while len(events) < 10 or (time.perf_counter() < deadline and len(events) < 200):
        cache.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        events.append((start, end))
        if len(events) % 10 == 0:
            torch.cuda.synchronize(device)
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def matmul_ceiling(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Return the rate of a large square matrix product in TFLOP/s, as the ceiling of everything that multiplies."""
    size = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind(0)
    return 2 * size**3 / (statistics.median(measure(lambda: a @ b, device, seconds)) * 1e9)


def time_one(name: str, attention: Attention, case: Case, device: torch.device, backward: bool, seconds: float) -> Timing:
    """Check one implementation, then time it; a failed check or a refusal leaves a remark instead of a time."""
    direction = "forward+backward" if backward else "forward"
    try:
        check(attention, case, device, backward)
        qkv = make_inputs(case, device, seed=0).requires_grad_(backward)
        q, k, v = qkv.unbind(2)
        gradient = torch.ones_like(q)

        def run() -> object:
            out = attention(q, k, v)
            return torch.autograd.grad(out, qkv, gradient, retain_graph=True) if backward else out

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        times = sorted(measure(run, device, seconds))
        peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20 if device.type == "cuda" else None
    except AssertionError as error:
        return Timing(name, direction, remark=f"FAILED the check: {error}")
    except (RuntimeError, NotImplementedError) as error:
        return Timing(name, direction, remark=f"does not run: {str(error).strip().splitlines()[0][:120]}")
    median = statistics.median(times)
    # The backward pass multiplies five matrices where the forward multiplies two.
    flops = case.forward_flops * (3.5 if backward else 1.0)
    p10, p90 = times[len(times) // 10], times[len(times) * 9 // 10]
    return Timing(name, direction, median, p10, p90, flops / (median * 1e9), peak)


def run_case(case: Case, device: torch.device, names: list[str] | None, backward: bool, seconds: float) -> list[Timing]:
    """Time every implementation on one case."""
    known = implementations(device)
    chosen = known if names is None else {name: known[name] for name in names}
    return [
        time_one(name, attention, case, device, direction, seconds)
        for direction in ((False, True) if backward else (False,))
        for name, attention in chosen.items()
    ]


def print_table(console: Console, case: Case, timings: list[Timing], ceiling: float) -> None:
    """Print times, rates on the true head dim, and their share of the ceiling."""
    title = f"{case.tiles} tiles x {case.heads} heads x {case.tokens} tokens x {case.head_dim}, {case.dtype}"
    table = Table(
        "implementation", "direction", "ms", "p10", "p90", "TFLOP/s", "of matmul", "peak MB", "remark", title=title
    )
    for row in timings:
        numbers = [row.median_ms, row.p10_ms, row.p90_ms, row.tflops]
        cells = ["" if number is None else f"{number:.3f}" for number in numbers]
        cells.append("" if row.tflops is None else f"{row.tflops / ceiling:.0%}")
        cells.append("" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}")
        table.add_row(row.implementation, row.direction, *cells, row.remark)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 if any implementation failed its check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=1025)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[112, 72, 80])
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bf16")
    parser.add_argument("--implementations", nargs="+", help="only these")
    parser.add_argument("--no-backward", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each row")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=180)
    ceiling = matmul_ceiling(_DTYPES[options.dtype], device, options.seconds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{name}, torch {torch.__version__}; a large matrix product runs at {ceiling:.1f} TFLOP/s")
    results = []
    failed = False
    for head_dim in options.head_dims:
        case = Case(options.tiles, options.tokens, options.heads, head_dim, options.dtype)
        timings = run_case(case, device, options.implementations, not options.no_backward, options.seconds)
        print_table(console, case, timings, ceiling)
        failed |= any("FAILED" in row.remark for row in timings)
        results.append({"case": asdict(case), "timings": [asdict(row) for row in timings]})
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps({**report, "matmul_tflops": ceiling, "results": results}, indent=1) + "\n")
        partial.rename(options.out)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
