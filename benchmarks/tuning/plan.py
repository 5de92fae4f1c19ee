"""Compile all candidates without a GPU, drop those whose code is bad, predict the others' times, keep the likeliest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from infimm_fast.benchmarks.compile_gate import SHARED_LIMIT
from infimm_fast.benchmarks.machine_code import (
    Instruction,
    code_around,
    hot_loop,
    innermost_loops,
    mix_of,
    read_kernel,
    serialised,
)
from infimm_fast.benchmarks.report import save_json
from infimm_fast.benchmarks.tuning.candidates import Candidate, candidates_of, constants_set, split_of
from infimm_fast.benchmarks.tuning.jobs import RESIDUAL, SUBIMAGE, Job, launch, main_kernel, make_inputs
from infimm_fast.benchmarks.tuning.prediction import MACHINES, Prediction, Work, predict, resident_programs
from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.common.offline import Launch, compile_triton, recorded_launches, source_of
from infimm_fast.kernels.interval.config import MIN_BLOCKS_PER_UNIT
from infimm_fast.kernels.residual.config import rows_of_programs

FORMAT = "infimm_fast tuning plan 1"
# Candidates of a job that are timed, by its importance.
_SURVIVORS = {0: 16, 1: 8, 2: 5, 3: 4}


@dataclass(frozen=True)
class Code:
    """What the machine code of a candidate holds.

    Attributes:
        registers: of a thread.
        shared: memory of a program, bytes.
        spills: instructions on local memory.
        resident: programs that share a multiprocessor.
        programs: of the grid.
        steps: times that a program passes its hot loop.
        loop: instructions of the hot loop.
        hgmma: of them, matrix instructions of a warp group by shape.
        waits: of them, waits for those.
        mufu: of them, exponentials and the like.
    """

    registers: int
    shared: int
    spills: int
    resident: int
    programs: int
    steps: int
    loop: int
    hgmma: dict[str, int]
    waits: int
    mufu: int


@dataclass(frozen=True)
class Assessed:
    """A candidate, its code, its predicted time, and why it is not timed ("" if it is)."""

    candidate: Candidate
    code: Code | None = None
    prediction: Prediction | None = None
    dropped: str = ""


@dataclass
class TuningPlan:
    """All jobs of one architecture with their candidates, the shipped one first and then by predicted time.

    Attributes:
        arch: compute capability, 90 for a Hopper.
        versions: of triton and torch.
        jobs: with their candidates.
    """

    arch: int
    versions: dict[str, str]
    jobs: list[tuple[Job, list[Assessed]]] = field(default_factory=list)

    def save(self, file: Path) -> None:
        """Write the plan; the file is complete at every moment."""
        jobs = [asdict(job) | {"candidates": [asdict(one) for one in assessed]} for job, assessed in self.jobs]
        save_json(file, {"format": FORMAT, "arch": self.arch, "versions": self.versions, "jobs": jobs})

    @classmethod
    def load(cls, file: Path) -> TuningPlan:
        """Read what `save` wrote.

        Raises:
            ConfigurationError: the file is not a plan of this version.
        """
        content = read_json(file, FORMAT)
        jobs = []
        for entry in content["jobs"]:
            candidates = [_assessed_from(one) for one in entry.pop("candidates")]
            jobs.append((Job(**entry), candidates))
        return cls(content["arch"], content["versions"], jobs)


def read_json(file: Path, expected: str) -> dict[str, Any]:
    """Read JSON of one format.

    Raises:
        ConfigurationError: it cannot be read, or is of another format.
    """
    try:
        content = json.loads(file.read_text())
        found = content.get("format") if isinstance(content, dict) else None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read as {expected!r}: {error}") from error
    if found != expected:
        raise ConfigurationError(f"{file} has format {found!r}; expected {expected!r}")
    return content


def candidate_from(content: dict[str, Any]) -> Candidate:
    """Return a candidate from what `asdict` made of it."""
    config = content["config"]
    return Candidate(**content | {"config": LaunchConfig(**config | {"cover": tuple(config["cover"])})})


def _assessed_from(content: dict[str, Any]) -> Assessed:
    return Assessed(
        candidate_from(content["candidate"]),
        Code(**content["code"]) if content["code"] else None,
        Prediction(**content["prediction"]) if content["prediction"] else None,
        content["dropped"],
    )


def make_plan(jobs: Sequence[Job], arch: int, processes: int, tell: Callable[[str], None]) -> TuningPlan:
    """Assess all candidates of some jobs.

    Args:
        jobs: see `all_jobs`.
        arch: compute capability.
        processes: that compile at the same time.
        tell: takes a line of progress.
    """
    import triton

    work = [(job, candidate) for job in jobs for candidate in candidates_of(job, arch)]
    results: dict[int, list[tuple[int, Assessed]]] = {index: [] for index in range(len(jobs))}
    place = {id(job): index for index, job in enumerate(jobs)}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        tasks = {pool.submit(assess, job, candidate, arch): (job, n) for n, (job, candidate) in enumerate(work)}
        for done, task in enumerate(as_completed(tasks), 1):
            job, order = tasks[task]
            assessed = task.result()
            results[place[id(job)]].append((order, assessed))
            tell(f"[{done}/{len(work)}] {job.op} {job.kernel} {job.name}: {describe(assessed)}")
    plan = TuningPlan(arch, {"triton": triton.__version__, "torch": torch.__version__})
    for index, job in enumerate(jobs):
        ordered = [assessed for _, assessed in sorted(results[index], key=lambda pair: pair[0])]
        plan.jobs.append((job, select(ordered, _SURVIVORS[job.importance])))
    return plan


def describe(assessed: Assessed) -> str:
    """Return one line."""
    code, prediction = assessed.code, assessed.prediction
    words = [assessed.candidate.label + (" (shipped)" if assessed.candidate.shipped else "")]
    if code and prediction:
        words.append(f"reg {code.registers} smem {code.shared // 1024}K x{code.resident} loop {code.loop}")
        words.append(f"predicted {prediction.ms:.3f} ms")
    return ", ".join(words + [assessed.dropped] * bool(assessed.dropped))


def select(assessed: Iterable[Assessed], most: int) -> list[Assessed]:
    """Return the shipped candidate first and the others by predicted time; those beyond the `most` best are dropped."""
    shipped, *others = sorted(assessed, key=lambda one: (not one.candidate.shipped, bool(one.dropped), _milliseconds(one)))
    kept = [shipped]
    for rank, one in enumerate(others, 2):
        late = rank > most and not one.dropped
        kept.append(replace(one, dropped=f"predicted to be number {rank}, {most} are timed") if late else one)
    return kept


def _milliseconds(assessed: Assessed) -> float:
    return assessed.prediction.ms if assessed.prediction else math.inf


def assess(job: Job, candidate: Candidate, arch: int) -> Assessed:
    """Compile one candidate as it would run, and judge its code."""
    with constants_set(job, candidate.constants):
        recorded = record(job, candidate, arch)
    if recorded is None:
        return Assessed(candidate, dropped=f"does not launch {main_kernel(job)}")
    try:
        compiled = compile_triton(source_of(recorded), arch)
    except Exception as error:  # whatever the compiler refuses is a reason, not an end
        return Assessed(candidate, dropped=f"does not compile: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    registers, instructions = read_kernel(compiled)
    warps, shared = candidate.config.num_warps, compiled.metadata.shared
    machine = MACHINES[arch]
    resident = resident_programs(machine, registers, shared, warps)
    loop = mix_of(hot_loop(instructions))
    works = works_of(job, candidate, math.prod(recorded.grid), instructions)
    code = Code(
        registers=registers,
        shared=shared,
        spills=sum(one.spills for one in instructions),
        resident=resident,
        programs=sum(work.programs for work in works),
        steps=works[0].steps,
        loop=loop.instructions,
        hgmma=loop.hgmma,
        waits=loop.waits,
        mufu=loop.mufu,
    )
    prediction = predict(machine, works, warps, resident, job.case.bytes + _partial_bytes(job, candidate))
    return Assessed(candidate, code, prediction, _obstacle(code, arch))


def record(job: Job, candidate: Candidate, arch: int) -> Launch | None:
    """Run the job's launcher on tensors without memory and return the launch of its kernel, or None if there is none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with recorded_launches() as launches, FakeTensorMode():
        launch(job, make_inputs(job, torch.device("cpu"), 0, arch), candidate.config, arch)
    return next((one for one in reversed(launches) if one.kernel.__name__ == main_kernel(job)), None)


def _obstacle(code: Code, arch: int) -> str:
    """Return all that is wrong with a candidate's code, or ""."""
    reasons, hgmma = [], sum(code.hgmma.values())
    if code.spills:
        reasons.append(f"{code.spills} spill instructions")
    if code.shared > SHARED_LIMIT[arch]:
        reasons.append(f"{code.shared} bytes of shared memory, {SHARED_LIMIT[arch]} available")
    if serialised(hgmma, code.waits):
        reasons.append(f"serialised matrix instructions: {code.waits} waits for {hgmma}")
    return "; ".join(reasons)


def works_of(job: Job, candidate: Candidate, programs: int, code: Sequence[Instruction]) -> list[Work]:
    """Return what the programs of a launch do, those with the hot loop first."""
    config, sizes = candidate.config, job.sizes
    hot = hot_loop(code)
    around, loop = mix_of(code_around(code, hot)), mix_of(hot)
    walked = config.block_m if job.kernel == "backward_kv" else config.block_n
    if job.op == RESIDUAL:
        with constants_set(job, candidate.constants):
            programs, share = rows_of_programs(job.kernel, sizes["tokens"], config.block_m)
        return [Work(programs, share // config.block_m, around, loop)]
    if job.op == SUBIMAGE:
        steps = math.ceil((sizes["tokens"] - config.peel) / walked)
        first = sizes["tiles"] * sizes["heads"] if config.peel else 0
        plain = [body for body in innermost_loops(code) if not mix_of(body).matrix_cycles]
        works = [Work(programs - first, steps, around, loop)]
        if first:
            alone = max(plain, key=len)
            works.append(Work(first, steps, mix_of(code_around(code, alone)), mix_of(alone)))
        return works
    length = sizes["tiles"] * sizes["tokens_per_tile"]
    split = split_of(job, candidate)
    if split is None:
        walks = sizes["tokens"] * sizes["heads"] // sizes["kv_heads"] if job.kernel == "backward_kv" else length
        return [Work(programs, math.ceil(walks / walked), around, loop)]
    blocks, splits = math.ceil(length / walked), split.splits
    if sizes["rows"] > 1:
        # What the plan does on the device where every row has a picture of its own.
        least = candidate.constants.get("MIN_BLOCKS_PER_UNIT", MIN_BLOCKS_PER_UNIT)
        share = max(math.ceil(sizes["rows"] * blocks / split.pool), least)
        splits = min(math.ceil(blocks / share), split.splits)
    return [Work(sizes["rows"] * sizes["kv_heads"] * splits, math.ceil(blocks / splits), around, loop)]


def _partial_bytes(job: Job, candidate: Candidate) -> int:
    """Return the bytes of decode's partial results, written and read back, in fp32."""
    split, sizes = split_of(job, candidate), job.sizes
    if split is None:
        return 0
    return 2 * split.splits * sizes["rows"] * sizes["tokens"] * sizes["heads"] * (sizes["head_dim"] + 1) * 4
