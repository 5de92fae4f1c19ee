"""Compile every shipped kernel configuration for every GPU generation, without a GPU, and refuse what would run badly.

The real launchers run on meta tensors with the strides a model produces; each launch is recorded instead of executed,
and its arguments are specialised the way Triton would at run time (a pointer's or integer's divisibility by 16 comes
from its value, never by decree). The compiled code is then read back: registers, shared memory, spills (local memory
instructions), widths of global accesses, warp-group matrix instructions.

Run ``python -m infimm_fast.benchmarks.compile_gate --out benchmarks/results/compile_gate.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from infimm_fast.kernels.common.configs import ARCHITECTURES
from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.subimage_attention.config import HEAD_DIMS, KERNELS, choose_config

# Shared memory that one block may use, bytes (CUDA programming guide, technical specifications per compute capability).
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNEL_NAMES = {"forward": "forward_kernel", "backward_kv": "key_value_kernel", "backward_q": "query_kernel"}
# Tokens of each variant: a class token in front of full tiles; a tail; RoPE in the prologue; a window.
VARIANTS = {"peeled": 1025, "masked": 729, "rope": 1025, "short": 49}
# Local memory instructions that a row may hold. The forward never spills; a backward row that has to is listed here
# with its count, so that a change for the worse is seen.
SPILL_BUDGET: dict[tuple[str, str, int, int], int] = {("backward_kv", "bf16", 88, 120): 4}
TILES, HEADS = 10, 16


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One configuration to compile."""

    kernel: str
    variant: str
    head_dim: int
    dtype: str
    arch: int


@dataclass(frozen=True)
class Code:
    """What the compiled code holds. Accesses are instructions on global memory, by their width in bytes."""

    registers: int
    shared: int
    spills: int
    accesses: dict[int, int]
    wgmma: int


@dataclass(frozen=True)
class Verdict:
    """A job, its configuration, its code, and what is wrong with it."""

    job: Job
    config: LaunchConfig
    code: Code
    failures: tuple[str, ...]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect Triton launches instead of running them."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    original = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


def specialise(value: Any, fixed: bool) -> tuple[str, Any, bool]:
    """Return (type, constant, divisible by 16) that Triton derives from one run-time argument.

    Args:
        value: a tensor, a number or None.
        fixed: the parameter is excluded from specialisation.
    """
    if isinstance(value, torch.Tensor):
        name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}[value.dtype]
        # PyTorch's allocations are aligned to more than 16 bytes, so the offset inside the storage decides.
        return f"*{name}", None, value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    if isinstance(value, int) and not isinstance(value, bool) and (fixed or value != 1):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), None, value % 16 == 0 and not fixed
    return "constexpr", value, False


def compile_launch(launch: Launch, arch: int) -> Any:
    """Compile one recorded launch for compute capability `arch` (90 for a Hopper)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: launch.kwargs[name] for name in ("num_warps", "num_stages", "maxnreg") if name in launch.kwargs}
    parameters = launch.kernel.params
    values = dict(zip((parameter.name for parameter in parameters), launch.args, strict=False)) | launch.kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(parameters):
        value = values[parameter.name]
        kind, constant, divisible = (
            ("constexpr", value, False) if parameter.is_constexpr else specialise(value, parameter.do_not_specialize)
        )
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = constant
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect_code(compiled: Any) -> Code:
    """Read a compiled kernel's machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", cubin.name], capture_output=True, text=True, check=True).stdout
    accesses: dict[int, int] = {}
    for modifiers in re.findall(r"\b(?:LDGSTS|LDG|STG)((?:\.\w+)*)", sass):
        parts = modifiers.split(".")
        width = 16 if "128" in parts else 8 if "64" in parts else 2 if {"U16", "S16", "U8", "S8"} & set(parts) else 4
        accesses[width] = accesses.get(width, 0) + 1
    return Code(
        registers=max(int(count) for count in re.findall(r"REG:(\d+)", usage)),
        shared=compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        accesses=accesses,
        wgmma=len(re.findall(r"\bHGMMA\b", sass)),
    )


def record(job: Job, config: LaunchConfig) -> Launch:
    """Run the real launcher of one job on meta tensors: packed qkv, contiguous output and gradient."""
    from infimm_fast.kernels.subimage_attention.backward import launch_backward
    from infimm_fast.kernels.subimage_attention.forward import launch_forward

    tokens, head_dim, dtype = VARIANTS[job.variant], job.head_dim, DTYPES[job.dtype]
    packed = torch.empty((TILES, tokens, 3, HEADS, head_dim), dtype=dtype, device="meta")
    table = torch.empty((tokens - 1, head_dim), device="meta") if job.variant == "rope" else None
    q, k, v = packed.unbind(2)
    common: dict[str, Any] = {
        "scale": head_dim**-0.5,
        "rope_cos": table,
        "rope_sin": table,
        "rope_prefix": 1 if table is not None else 0,
        "rope_interleaved": True,
        "lengths": None,
        "packed": False,
        "max_tokens": tokens,
        "is_causal": False,
    }
    with recorded_launches() as launches:
        if job.kernel == "forward":
            launch_forward(q, k, v, **common, config=config)
        else:
            out = torch.empty((TILES, tokens, HEADS, head_dim), dtype=dtype, device="meta")
            lse = torch.empty((TILES, HEADS, tokens), device="meta")
            dq, dk, dv = torch.empty_like(packed).unbind(2)
            launch_backward(out, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **common, config_kv=config, config_q=config)
    return next(launch for launch in launches if launch.kernel.__name__ == KERNEL_NAMES[job.kernel])


def config_of(job: Job) -> LaunchConfig:
    """Return the shipped configuration of one job."""
    dtype, tokens = DTYPES[job.dtype], VARIANTS[job.variant]
    config = choose_config(job.kernel, job.head_dim, dtype, tokens, job.arch, rope=job.variant == "rope")
    return config if job.variant in ("peeled", "rope") else replace(config, peel=False)


def judge(job: Job, config: LaunchConfig, code: Code) -> tuple[str, ...]:
    """Return what is wrong with one row."""
    failures = []
    budget = 0 if job.kernel == "forward" else SPILL_BUDGET.get((job.kernel, job.dtype, job.head_dim, job.arch), 0)
    if code.spills > budget:
        failures.append(f"{code.spills} spill instructions, {budget} allowed")
    if code.shared > SHARED_LIMIT[job.arch]:
        failures.append(f"{code.shared} bytes of shared memory, {SHARED_LIMIT[job.arch]} available")
    narrow = sum(count for width, count in code.accesses.items() if width < 16)
    if not code.accesses.get(16):
        failures.append("no 16-byte global access")
    # The peeled token and RoPE's partners are read one element at a time; nothing else may be. Pieces of 16 channels
    # can leave a thread 8 bytes, and a backward reads the log-sum-exp and delta by 4.
    if job.variant in ("masked", "short") and job.dtype != "fp32":
        if code.accesses.get(2):
            failures.append(f"{code.accesses[2]} two-byte global accesses")
        if job.kernel == "forward" and narrow > code.accesses.get(16, 0):
            failures.append(f"{narrow} of the global accesses are narrower than 16 bytes")
    if job.arch == 90 and job.dtype != "fp32" and not code.wgmma:
        failures.append("no wgmma")
    return tuple(failures)


def run_job(job: Job) -> Verdict:
    """Compile one job and judge it."""
    config = config_of(job)
    code = inspect_code(compile_launch(record(job, config), job.arch))
    return Verdict(job, config, code, judge(job, config, code))


def jobs_of(
    archs: Sequence[int] = ARCHITECTURES, head_dims: Sequence[int] = HEAD_DIMS, dtypes: Sequence[str] = tuple(DTYPES)
) -> list[Job]:
    """Return every shipped row: all variants in 16 bits; in fp32 the masked one, whose code contains the others'."""
    rows = []
    for arch in archs:
        for dtype in dtypes:
            for head_dim in head_dims:
                for kernel in KERNELS:
                    variants = ["masked"] if dtype == "fp32" else ["peeled", "masked"]
                    if kernel == "forward" and dtype != "fp32":
                        variants += ["rope", "short"]
                    rows += [Job(kernel, variant, head_dim, dtype, arch) for variant in variants]
    return rows


def describe(verdict: Verdict) -> str:
    """Return one line of the table."""
    job, config, code = verdict.job, verdict.config, verdict.code
    tiles = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
    widths = " ".join(f"{width}B:{count}" for width, count in sorted(code.accesses.items(), reverse=True))
    return (
        f"sm_{job.arch:<4}{job.kernel:<12}{job.variant:<7}{job.dtype:<5}D={job.head_dim:<4}{tiles:<15}"
        f"{'+'.join(map(str, config.cover)):<9}reg {code.registers:<4}smem {code.shared / 1024:>5.1f}K  "
        f"spill {code.spills:<3} wgmma {code.wgmma:<3} {widths:<28} {'; '.join(verdict.failures) or 'ok'}"
    )


def write_report(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write all rows as JSON, with the versions that made them."""
    import triton

    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}
    rows = [asdict(verdict) for verdict in verdicts]
    path.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate; the exit status is 1 if any row fails."""
    parser = argparse.ArgumentParser(description="Compile every shipped kernel configuration without a GPU.")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--head-dim", type=int, nargs="+", choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    verdicts = []
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for verdict in pool.map(run_job, jobs_of(options.arch, options.head_dim, options.dtype)):
            print(describe(verdict), flush=True)
            verdicts.append(verdict)
    failed = [verdict for verdict in verdicts if verdict.failures]
    print(f"{len(verdicts)} rows, {len(failed)} failed")
    if options.out:
        write_report(options.out, verdicts)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
