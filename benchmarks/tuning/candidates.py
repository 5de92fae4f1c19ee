"""Which configurations compete for a job: the shipped one first, then shapes, stages, covers and register caps around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from infimm_fast.benchmarks.tuning.jobs import CROSS, RESIDUAL, SUBIMAGE, Job, shipped_config
from infimm_fast.kernels.common.configs import cover_of
from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.interval import config as cross_config
from infimm_fast.kernels.residual import config as residual_config

# Importance of jobs that get few candidates.
LEAST_IMPORTANT = 3
# (block_m, block_n, warps, stages, register cap)
Shape = tuple[int, int, int, int, int | None]


@dataclass(frozen=True)
class Candidate:
    """A launch configuration, and constants of the op's config module where it needs others than the shipped ones.

    Attributes:
        config: of the job's kernel.
        constants: name -> value.
        shipped: whether it is what the library does now.
    """

    config: LaunchConfig
    constants: dict[str, int] = field(default_factory=dict)
    shipped: bool = False

    @property
    def label(self) -> str:
        """A short name, unique among the candidates of a job."""
        config = self.config
        words = [f"{config.block_m}x{config.block_n}", f"w{config.num_warps}", f"s{config.num_stages}"]
        words.append("+".join(map(str, config.cover)))
        words += ["peel"] * config.peel + [f"r{config.max_registers}"] * bool(config.max_registers)
        return " ".join(words + [f"{name}={value}" for name, value in self.constants.items()])


_FORWARD: tuple[Shape, ...] = (
    (128, 64, 8, 2, None),
    (128, 64, 8, 3, None),
    (128, 64, 8, 2, 128),
    (128, 128, 8, 2, None),
    (64, 64, 4, 2, None),
    (64, 64, 4, 3, None),
    (64, 64, 4, 2, 168),
    (64, 128, 4, 2, None),
    (128, 32, 8, 4, None),
    (128, 64, 4, 3, None),
)
_BACKWARD_KV: tuple[Shape, ...] = (
    (64, 128, 8, 2, None),
    (64, 128, 8, 3, None),
    (32, 128, 8, 2, None),
    (32, 128, 8, 3, None),
    (64, 64, 8, 2, None),
    (64, 64, 4, 2, None),
    (32, 64, 4, 2, None),
    (32, 64, 4, 3, None),
    (64, 64, 4, 2, 168),
    (32, 64, 8, 3, None),
    (16, 128, 8, 2, None),
)
_BACKWARD_Q: tuple[Shape, ...] = (
    (128, 64, 8, 2, None),
    (128, 64, 8, 3, None),
    (128, 64, 8, 2, 128),
    (128, 32, 8, 3, None),
    (128, 128, 8, 2, None),
    (64, 64, 4, 2, None),
    (64, 64, 4, 3, None),
    (64, 64, 4, 2, 168),
    (64, 32, 4, 3, None),
)
_ATTENTION = {"forward": _FORWARD, "backward_kv": _BACKWARD_KV, "backward_q": _BACKWARD_Q}
# Decode folds rows into `block_m`; tiles of 64 rows are what a warp group multiplies, smaller ones are another instruction.
_DECODE: tuple[Shape, ...] = (
    (16, 64, 4, 2, None),
    (16, 64, 4, 3, None),
    (16, 64, 4, 4, None),
    (16, 32, 4, 4, None),
    (16, 128, 4, 2, None),
    (16, 128, 8, 3, None),
    (32, 64, 4, 3, None),
)
_DECODE_CONSTANTS: dict[bool, tuple[dict[str, int], ...]] = {
    # A batch of one, and any other.
    True: (
        {"TARGET_PROGRAMS": 264},
        {"TARGET_PROGRAMS": 1024},
        {"TARGET_PROGRAMS": 1024, "MIN_BLOCKS_PER_SPLIT": 2},
        {"MIN_SPLITS": 16},
    ),
    False: (
        {"TARGET_POOL": 1024},
        {"TARGET_POOL": 2048},
        {"TARGET_POOL": 8192},
        {"MIN_BLOCKS_PER_UNIT": 4},
        {"MIN_BLOCKS_PER_UNIT": 16},
    ),
}
# Rows of a step and warps, and the programs of a launch.
_RESIDUAL_SHAPES = ((1, 4), (1, 8), (1, 16), (2, 8), (2, 16))
_RESIDUAL_PROGRAMS = {"forward": (528, 1056), "backward": (132, 528)}


def candidates_of(job: Job, arch: int) -> list[Candidate]:
    """Return the candidates of a job, different from each other, the shipped one first."""
    shipped = shipped_config(job, arch)
    found = [Candidate(shipped, shipped=True)]
    if job.op == RESIDUAL:
        found += _residual_candidates(job, shipped)
    elif job.kernel == "decode":
        found += _decode_candidates(job, shipped)
    else:
        found += _attention_candidates(job, shipped)
    unique: list[Candidate] = []
    for candidate in found:
        if all((candidate.config, candidate.constants) != (other.config, other.constants) for other in unique):
            unique.append(candidate)
    return unique


def _attention_candidates(job: Job, shipped: LaunchConfig) -> Iterator[Candidate]:
    padded = (1 << (job.width - 1).bit_length(),)
    # The shipped cover with every shape, the other one with the most usual half of them.
    others = sorted({cover_of(job.width), padded} - {shipped.cover})
    # The last ones are for jobs that matter.
    most = len(_ATTENTION[job.kernel]) if job.importance < LEAST_IMPORTANT else 6
    for cover in (shipped.cover, *others):
        for block_m, block_n, warps, stages, cap in _ATTENTION[job.kernel][: most if cover == shipped.cover else 6]:
            config = replace(
                shipped, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages, cover=cover, max_registers=cap
            )
            walked = block_m if job.kernel == "backward_kv" else block_n
            can_peel = job.op == SUBIMAGE and job.sizes["tokens"] % walked == 1
            yield Candidate(replace(config, peel=can_peel))
            # Without peeling the odd token costs a block; worth a look for the shapes that are likeliest.
            if can_peel and cover == shipped.cover and cap is None and stages == 2:
                yield Candidate(replace(config, peel=False))


def _decode_candidates(job: Job, shipped: LaunchConfig) -> Iterator[Candidate]:
    for constants in _DECODE_CONSTANTS[job.sizes["rows"] == 1]:
        yield Candidate(shipped, constants)
    for block_m, block_n, warps, stages, cap in _DECODE:
        if block_m >= shipped.block_m:
            config = replace(shipped, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages)
            yield Candidate(replace(config, max_registers=cap))


def _residual_candidates(job: Job, shipped: LaunchConfig) -> Iterator[Candidate]:
    for programs in _RESIDUAL_PROGRAMS[job.kernel]:
        yield Candidate(shipped, {"MAX_PROGRAMS": programs})
    for rows, warps in _RESIDUAL_SHAPES:
        cover = residual_config.row_cover(job.width, rows, warps)
        cap = min(255, residual_config.REGISTERS // (32 * warps))
        yield Candidate(replace(shipped, block_m=rows, num_warps=warps, cover=cover, max_registers=cap))


@contextlib.contextmanager
def constants_set(job: Job, constants: dict[str, int]) -> Iterator[None]:
    """Give constants of the op's config module other values, in every module that has taken them over."""
    with contextlib.ExitStack() as stack:
        for name, value in constants.items():
            if job.op == RESIDUAL:
                table: dict[str, int] = getattr(residual_config, name)
                stack.callback(table.update, dict(table))
                table[job.kernel] = value
                continue
            for module in _modules_with(name):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield


def _modules_with(name: str) -> list[Any]:
    from infimm_fast.kernels.interval import decode

    return [module for module in (cross_config, decode) if hasattr(module, name)]


def split_of(job: Job, candidate: Candidate) -> cross_config.Split | None:
    """Return how decode splits the keys with a candidate; None for any other job."""
    if job.op != CROSS or job.kernel != "decode":
        return None
    sizes = job.sizes
    keys = sizes["tiles"] * sizes["tokens_per_tile"] * sizes["rows"]
    with constants_set(job, candidate.constants):
        group = sizes["heads"] // sizes["kv_heads"]
        return cross_config.choose_split(sizes["rows"], sizes["tokens"], group, sizes["kv_heads"], keys, candidate.config)
