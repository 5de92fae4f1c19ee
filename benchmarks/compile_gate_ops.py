"""The rows of the compile gate: for every op its kernels, the inputs a model gives them, and what their code must hold.

Adding an op is one entry of `OPS`, with a function that runs the op's launcher on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.interval import config as cross_config
from infimm_fast.kernels.interval import options as cross_options
from infimm_fast.kernels.residual import config as residual_config
from infimm_fast.kernels.residual import options as residual_options
from infimm_fast.kernels.subimage import config as subimage_config
from infimm_fast.kernels.subimage.options import Options

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_DIMS = subimage_config.HEAD_DIMS
# Hidden sizes of decoders: small ones, 7B, 13B, 70B.
CHANNELS = (1024, 2048, 4096, 5120, 8192)


@dataclass(frozen=True)
class Job:
    """One configuration to compile.

    Args:
        op: key of `OPS`.
        kernel: key of the op's `kernels`.
        variant: which inputs; the op's own word.
        width: head dim, or channels of an op without heads.
        dtype: key of `DTYPES`.
        arch: compute capability, 90 for a Hopper.
    """

    op: str
    kernel: str
    variant: str
    width: int
    dtype: str
    arch: int


@dataclass(frozen=True)
class Rules:
    """What the code of one kernel must hold, beside few spills and little enough shared memory.

    Args:
        wide: at least one global access of 16 bytes.
        no_elements: no global access of two bytes; single elements are read where a kernel gathers.
        mostly_wide: at least as many global accesses of 16 bytes as narrower ones.
        tensor_rows: rows of the tile that tensor cores accumulate, 0 for none; 64 make a warp group's instruction.
    """

    wide: bool = True
    no_elements: bool = False
    mostly_wide: bool = False
    tensor_rows: int = 0


@dataclass(frozen=True)
class Op:
    """One op.

    Args:
        kernels: kernel -> name of its jitted function.
        rows: the (kernel, variant, width) to compile in one dtype.
        config: the shipped configuration of a job.
        launch: runs the op's launcher for a job with a configuration, on meta tensors.
        rules: what the code of a job must hold.
        spills: local memory instructions that a (kernel, dtype, width, arch) may hold. A forward never spills; a
            backward that has to is listed with its count, so that a change for the worse is seen.
    """

    kernels: Mapping[str, str]
    rows: Callable[[str], Iterator[tuple[str, str, int]]]
    config: Callable[[Job], LaunchConfig]
    launch: Callable[[Job, LaunchConfig], None]
    rules: Callable[[Job, LaunchConfig], Rules]
    spills: Mapping[tuple[str, str, int, int], int] = field(default_factory=dict)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# Tokens of each variant of sub-image attention: a class token in front of full tiles; a tail; RoPE in the prologue; a
# window.
SUBIMAGE_TOKENS = {"peeled": 1025, "masked": 729, "rope": 1025, "short": 49}


def _subimage_rows(dtype: str) -> Iterator[tuple[str, str, int]]:
    """All variants in 16 bits; in fp32 the masked one, whose code contains the others'."""
    for head_dim in HEAD_DIMS:
        for kernel in subimage_config.KERNELS:
            variants = ["masked"] if dtype == "fp32" else ["peeled", "masked"]
            if kernel == "forward" and dtype != "fp32":
                variants += ["rope", "short"]
            yield from ((kernel, variant, head_dim) for variant in variants)


def _subimage_config(job: Job) -> LaunchConfig:
    tokens, rope = SUBIMAGE_TOKENS[job.variant], job.variant == "rope"
    config = subimage_config.choose_config(job.kernel, job.width, DTYPES[job.dtype], tokens, job.arch, rope=rope)
    return config if job.variant in ("peeled", "rope") else replace(config, peel=False)


def _subimage_launch(job: Job, config: LaunchConfig) -> None:
    """Packed qkv of 10 tiles and 16 heads; contiguous output and gradient."""
    from infimm_fast.kernels.subimage.backward import launch_backward
    from infimm_fast.kernels.subimage.forward import launch_forward

    tiles, heads, tokens, dtype = 10, 16, SUBIMAGE_TOKENS[job.variant], DTYPES[job.dtype]
    packed = _empty(tiles, tokens, 3, heads, job.width, dtype=dtype)
    table = _empty(tokens - 1, job.width) if job.variant == "rope" else None
    q, k, v = packed.unbind(2)
    options = Options(job.width**-0.5, rope_cos=table, rope_sin=table, rope_prefix=int(table is not None))
    if job.kernel == "forward":
        launch_forward(q, k, v, options, config=config)
        return
    out = _empty(tiles, tokens, heads, job.width, dtype=dtype)
    gradients = torch.empty_like(packed).unbind(2)
    lse = _empty(tiles, heads, tokens)
    launch_backward(out, q, k, v, out, lse, options, gradients=gradients, config_kv=config, config_q=config)


def _subimage_rules(job: Job, config: LaunchConfig) -> Rules:
    # The peeled token and RoPE's partners are read one element at a time; nothing else may be. Pieces of 16 channels
    # can leave a thread 8 bytes, and a backward reads the log-sum-exp and delta by 4.
    tiled = job.variant in ("masked", "short") and job.dtype != "fp32"
    rows = config.block_n if job.kernel == "backward_kv" else config.block_m
    return Rules(no_elements=tiled, mostly_wide=tiled and job.kernel == "forward", tensor_rows=rows)


# (B, T, query heads, KV heads) of each variant of cross-attention: prompts of InfiMM-HD and of a decoder with grouped
# heads; decode of one row, of folded rows, and of a whole tile from one row.
CROSS_SHAPES = {
    "prompt": (2, 2048, 12, 12),
    "short": (2, 32, 12, 12),
    "grouped": (2, 2048, 32, 8),
    "single": (1, 1, 12, 12),
    "folded": (64, 1, 12, 12),
    "drafted": (4, 8, 64, 8),
}
DECODE_KERNELS = ("plan", "decode", "combine")


def _cross_rows(dtype: str) -> Iterator[tuple[str, str, int]]:
    """All variants in 16 bits, grouped heads at the ends of the table; in fp32 the usual ones."""
    yield "plan", "folded", HEAD_DIMS[0]
    for head_dim in HEAD_DIMS:
        ends = dtype != "fp32" and head_dim in (HEAD_DIMS[0], HEAD_DIMS[-1])
        yield from (("decode", variant, head_dim) for variant in ("single", "folded") + ("drafted",) * ends)
        yield "combine", "folded", head_dim
        for kernel in ("forward", "backward_kv", "backward_q"):
            yield from ((kernel, variant, head_dim) for variant in ("prompt",) + ("grouped",) * ends)
        if dtype != "fp32":
            yield "forward", "short", head_dim


def _cross_config(job: Job) -> LaunchConfig:
    batch, tokens, heads, kv_heads = CROSS_SHAPES[job.variant]
    kernel = "decode" if job.kernel in DECODE_KERNELS else job.kernel
    rows = tokens * heads // kv_heads
    return cross_config.choose_config(kernel, job.width, DTYPES[job.dtype], rows, job.arch, batch=batch)


def _cross_launch(job: Job, config: LaunchConfig) -> None:
    """K and V of one of ten blocks out of one projection: the token stride is ten times as large."""
    from infimm_fast.kernels.interval.backward import launch_backward
    from infimm_fast.kernels.interval.forward import launch_forward

    (batch, tokens, heads, kv_heads), keys, blocks = CROSS_SHAPES[job.variant], 10250, 10
    q = _empty(batch, tokens, heads, job.width, dtype=DTYPES[job.dtype])
    k, v = _empty(keys, blocks, 2, kv_heads, job.width, dtype=DTYPES[job.dtype])[:, 3].unbind(1)
    kv_range = torch.empty((batch, tokens, 2), dtype=torch.int64, device="meta")
    options = cross_options.Options(job.width**-0.5)
    if not job.kernel.startswith("backward"):
        launch_forward(q, k, v, kv_range, options, config=config)
        return
    lse = _empty(batch, heads, tokens)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (q, k, v))
    configs = {"config_kv": config, "config_q": config}
    launch_backward(q, q, k, v, kv_range, q, lse, options, gradients=(dq, dk, dv), **configs)


def _cross_rules(job: Job, config: LaunchConfig) -> Rules:
    if job.kernel == "plan":
        return Rules(wide=False)
    rows = 0 if job.kernel == "combine" else config.block_n if job.kernel == "backward_kv" else config.block_m
    return Rules(no_elements=job.dtype != "fp32" and job.kernel != "combine", tensor_rows=rows)


def _residual_rows(dtype: str) -> Iterator[tuple[str, str, int]]:
    for channels in CHANNELS:
        for kernel in ("forward", "backward"):
            yield from ((kernel, variant, channels) for variant in ("plain", "normed"))


def _residual_config(job: Job) -> LaunchConfig:
    return residual_config.choose_config(job.width)


def _residual_launch(job: Job, config: LaunchConfig) -> None:
    """Contiguous rows with a keep flag; fp32 parameters, as in mixed precision."""
    from infimm_fast.kernels.residual.backward import launch_backward
    from infimm_fast.kernels.residual.forward import launch_forward

    x = _empty(2, 2048, job.width, dtype=DTYPES[job.dtype])
    keep = torch.empty(2, dtype=torch.bool, device="meta")
    vector = _empty(job.width)
    weight = vector if job.variant == "normed" else None
    options = residual_options.Options()
    if job.kernel == "forward":
        launch_forward(x, x, vector, keep, weight, weight, options, config=config)
    else:
        gradients = residual_options.Gradients(x, x, vector, vector, vector)
        launch_backward(x, x, x, vector, keep, weight, x, options, gradients=gradients, config=config)


# The LayerNorm's backward of 8192 channels holds three fp32 sums beside its row, 16 of each for each of 512 threads, and no
# thread of so many may have more than 128 registers. On 90 it is 54 with triton 3.6.
_RESIDUAL_SPILLS = {
    "bf16": {80: 50, 89: 50, 90: 54, 100: 46, 120: 60},
    "fp32": {80: 195, 89: 195, 90: 195, 100: 173, 120: 162},
}


def _residual_rules(job: Job, config: LaunchConfig) -> Rules:
    return Rules(no_elements=job.dtype != "fp32", mostly_wide=job.kernel == "forward")


OPS: dict[str, Op] = {
    "subimage_attention": Op(
        kernels={"forward": "forward_kernel", "backward_kv": "key_value_kernel", "backward_q": "query_kernel"},
        rows=_subimage_rows,
        config=_subimage_config,
        launch=_subimage_launch,
        rules=_subimage_rules,
        # On 90 masked and with triton 3.6 only, one store before the loop and one load behind it.
        spills={("backward_kv", "bf16", 88, 120): 4, ("backward_kv", "bf16", 88, 90): 2, ("backward_kv", "bf16", 96, 90): 2},
    ),
    "interval_attention": Op(
        kernels={
            "forward": "forward_kernel",
            "plan": "plan_kernel",
            "decode": "decode_kernel",
            "combine": "combine_kernel",
            "backward_kv": "key_value_kernel",
            "backward_q": "query_kernel",
        },
        rows=_cross_rows,
        config=_cross_config,
        launch=_cross_launch,
        rules=_cross_rules,
    ),
    "gated_residual": Op(
        kernels={"forward": "forward_kernel", "backward": "backward_kernel"},
        rows=_residual_rows,
        config=_residual_config,
        launch=_residual_launch,
        rules=_residual_rules,
        spills={
            ("backward", dtype, CHANNELS[-1], arch): count
            for dtype, counts in _RESIDUAL_SPILLS.items()
            for arch, count in counts.items()
        },
    ),
}
