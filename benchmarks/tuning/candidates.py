"""Which configurations compete for a job: the shipped one first, then shapes, stages, covers and register caps around it."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from infimm_fast.kernels.common.cases import Job, Op, find_ops, jobs_of
from infimm_fast.kernels.common.configs import cover_of
from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.residual.config import REGISTERS, row_cover

# Importance from which on cases get few candidates.
LEAST_IMPORTANT = 3


@dataclass(frozen=True)
class Candidate:
    """A launch configuration, and constants of the op's modules where it needs others than the shipped ones.

    Attributes:
        config: of the job's kernel.
        constants: name -> value.
        shipped: whether it is what the library does now.
    """

    config: LaunchConfig
    constants: Mapping[str, int] = field(default_factory=dict)
    shipped: bool = False

    @property
    def label(self) -> str:
        """A short name, unique among the candidates of a job."""
        config = self.config
        words = [f"{config.block_m}x{config.block_n}", f"w{config.num_warps}", f"s{config.num_stages}"]
        words.append("+".join(map(str, config.cover)))
        words += ["peel"] * config.peel + [f"r{config.max_registers}"] * bool(config.max_registers)
        return " ".join(words + [f"{name}={value}" for name, value in self.constants.items()])


# As in a label, the most usual first: block_m x block_n, warps, stages, register cap.
_ATTENTION = {
    "forward": "128x64 w8 s2, 128x64 w8 s3, 128x64 w8 s2 r128, 128x128 w8 s2, 64x64 w4 s2, 64x64 w4 s3, 64x64 w4 s2 r168, "
    "64x128 w4 s2, 128x32 w8 s4, 128x64 w4 s3",
    "backward_kv": "64x128 w8 s2, 64x128 w8 s3, 32x128 w8 s2, 32x128 w8 s3, 64x64 w8 s2, 64x64 w4 s2, 32x64 w4 s2, "
    "32x64 w4 s3, 64x64 w4 s2 r168, 32x64 w8 s3, 16x128 w8 s2",
    "backward_q": "128x64 w8 s2, 128x64 w8 s3, 128x64 w8 s2 r128, 128x32 w8 s3, 128x128 w8 s2, 64x64 w4 s2, 64x64 w4 s3, "
    "64x64 w4 s2 r168, 64x32 w4 s3",
}
# Decode folds rows into `block_m`; tiles of 64 rows are what a warp group multiplies, smaller ones are another instruction.
_DECODE = "16x64 w4 s2, 16x64 w4 s3, 16x64 w4 s4, 16x32 w4 s4, 16x128 w4 s2, 16x128 w8 s3, 32x64 w4 s3"
_ONE_ROW = "TARGET_PROGRAMS=264, TARGET_PROGRAMS=1024, TARGET_PROGRAMS=1024 MIN_BLOCKS_PER_SPLIT=2, MIN_SPLITS=16"
_ROWS = "TARGET_POOL=1024, TARGET_POOL=2048, TARGET_POOL=8192, MIN_BLOCKS_PER_UNIT=4, MIN_BLOCKS_PER_UNIT=16"
# Rows of a step and warps, and the programs of a launch.
_RESIDUAL_SHAPES = ((1, 4), (1, 8), (1, 16), (2, 8), (2, 16))
_RESIDUAL_PROGRAMS = {"forward": (528, 1056), "backward": (132, 528)}


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Give a parser options for what `select_jobs` takes."""
    parser.add_argument("--op", dest="ops", nargs="+", choices=tuple(find_ops()), help="all without it, as of the next two")
    parser.add_argument("--kernel", dest="kernels", nargs="+", help="as in the op's kernels")
    parser.add_argument("--width", dest="widths", type=int, nargs="+", help="head dims, or channels of ops without heads")


def select_jobs(use: str, dtypes: Sequence[str], archs: Sequence[int], chosen: Any) -> list[tuple[Op, Job]]:
    """Return the jobs of `jobs_of` for all ops; `chosen` has those ops, kernels and widths, None for all of them."""
    return [
        (op, job)
        for op in find_ops().values()
        for job in jobs_of(op, use, dtypes, archs)
        if (chosen.ops is None or op.name in chosen.ops)
        and (chosen.kernels is None or job.kernel in chosen.kernels)
        and (chosen.widths is None or op.width(job.case) in chosen.widths)
    ]


def candidates_of(op: Op, job: Job) -> list[Candidate]:
    """Return the candidates of a job, different from each other, the shipped one first.

    An op that this module does not know gets other numbers of warps and stages.
    """
    shipped = op.config(job)
    if op.name == "gated_residual":
        others = _residual_candidates(job, shipped)
    elif job.kernel == "decode":
        others = _decode_candidates(job, shipped)
    elif job.kernel in _ATTENTION and "head_dim" in job.case.sizes:
        others = _attention_candidates(op, job, shipped)
    else:
        others = (Candidate(replace(shipped, num_warps=w, num_stages=s)) for w in (4, 8) for s in (1, 2, 3))
    found = [Candidate(shipped, shipped=True)]
    for candidate in others:
        if all((candidate.config, candidate.constants) != (other.config, other.constants) for other in found):
            found.append(candidate)
    return found


def _with_shape(config: LaunchConfig, shape: str) -> LaunchConfig:
    """Return a configuration with another shape, written as above."""
    numbers = re.fullmatch(r"(\d+)x(\d+) w(\d+) s(\d+)(?: r(\d+))?", shape).groups()  # type: ignore[union-attr]
    names = ("block_m", "block_n", "num_warps", "num_stages", "max_registers")
    changes: dict[str, Any] = {name: number and int(number) for name, number in zip(names, numbers, strict=True)}
    return replace(config, **changes)


def _attention_candidates(op: Op, job: Job, shipped: LaunchConfig) -> Iterator[Candidate]:
    width, shapes = op.width(job.case), _ATTENTION[job.kernel].split(", ")
    # The shipped cover with every shape, the other one with the most usual half of them. The last shapes are for jobs that
    # matter.
    others = sorted({cover_of(width), (1 << (width - 1).bit_length(),)} - {shipped.cover})
    most = len(shapes) if job.case.importance < LEAST_IMPORTANT else 6
    for cover in (shipped.cover, *others):
        for shape in shapes[: most if cover == shipped.cover else 6]:
            config = replace(_with_shape(shipped, shape), cover=cover)
            walked = config.block_m if job.kernel == "backward_kv" else config.block_n
            can_peel = op.name == "subimage_attention" and job.case.sizes["tokens"] % walked == 1
            yield Candidate(replace(config, peel=can_peel))
            # Without peeling the odd token costs a block; worth a look for the shapes that are likeliest.
            if can_peel and cover == shipped.cover and config.max_registers is None and config.num_stages == 2:
                yield Candidate(replace(config, peel=False))


def _decode_candidates(job: Job, shipped: LaunchConfig) -> Iterator[Candidate]:
    for constants in (_ONE_ROW if job.case.sizes["rows"] == 1 else _ROWS).split(", "):
        yield Candidate(shipped, {name: int(value) for name, value in (word.split("=") for word in constants.split())})
    for config in (_with_shape(shipped, shape) for shape in _DECODE.split(", ")):
        if config.block_m >= shipped.block_m:
            yield Candidate(config)


def _residual_candidates(job: Job, shipped: LaunchConfig) -> Iterator[Candidate]:
    for programs in _RESIDUAL_PROGRAMS[job.kernel]:
        yield Candidate(shipped, {"MAX_PROGRAMS": programs})
    for rows, warps in _RESIDUAL_SHAPES:
        cover, cap = row_cover(job.case.sizes["width"], rows, warps), min(255, REGISTERS // (32 * warps))
        yield Candidate(replace(shipped, block_m=rows, num_warps=warps, cover=cover, max_registers=cap))


@contextlib.contextmanager
def constants_set(op: Op, job: Job, constants: Mapping[str, int]) -> Iterator[None]:
    """Give constants other values, in every module of the op that has taken them over; of a table the job's entry."""
    package = type(op).__module__.rpartition(".")[0]
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{package}.")]
    with contextlib.ExitStack() as stack:
        for name, value in constants.items():
            for module in modules:
                found = vars(module).get(name)
                if isinstance(found, dict):
                    stack.callback(found.update, dict(found))
                    found[job.kernel] = value
                elif found is not None:
                    stack.callback(setattr, module, name, found)
                    setattr(module, name, value)
        yield
