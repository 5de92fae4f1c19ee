"""Run single calls of the Triton kernels: what compute-sanitizer watches and Nsight Compute profiles.

``python -m infimm_fast.benchmarks.one_launch --list`` names the cases. Small cases have awkward sizes, multiples of
nothing, and are checked against the reference, which runs on the CPU so that a tool sees little beside our kernels. Main
cases have the sizes of real models and are not checked: a float64 reference of them would not fit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from infimm_fast.benchmarks.cases import TOWERS
from infimm_fast.benchmarks.inputs import random_tensor
from infimm_fast.benchmarks.registry import DTYPES
from infimm_fast.kernels import gated_residual, interval_attention, subimage_attention, subimage_attention_packed
from infimm_fast.kernels.common.numerics import assert_error_budget

FORWARD, BACKWARD = ("forward_kernel",), ("delta_kernel", "key_value_kernel", "query_kernel")


@dataclass(frozen=True)
class Problem:
    """One call of a public function.

    Attributes:
        function: takes all the rest by name, and `backend`.
        leaves: floating-point tensors that get gradients.
        constants: tensors that get none.
        options: everything else.
        backward: whether gradients are wanted.
    """

    function: Callable[..., Any]
    leaves: Mapping[str, torch.Tensor]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    backward: bool = True


@dataclass(frozen=True)
class LaunchCase:
    """One problem by name.

    Attributes:
        name: of the case.
        op: folder below kernels/.
        kernels: the jitted functions of that op that the case launches.
        make: takes a dtype and a device.
        checked: whether the result is compared with the reference.
    """

    name: str
    op: str
    kernels: tuple[str, ...]
    make: Callable[[torch.dtype, torch.device], Problem]
    checked: bool = True


def evaluate(problem: Problem, backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return outputs and gradients by name.

    Args:
        problem: what to call.
        backend: of the op.
        dtype: that the leaves and the gradients of the outputs are cast to.
    """
    leaves = {name: x.detach().to(dtype).requires_grad_(problem.backward) for name, x in problem.leaves.items()}
    outputs = problem.function(**leaves, **problem.constants, **problem.options, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {index}": x.detach() for index, x in enumerate(outputs)}
    if problem.backward:
        kind = next(iter(problem.leaves.values())).dtype
        targets = [x for x in outputs if x.requires_grad]
        # Drawn on the CPU: the same numbers wherever the problem lives.
        seeds = [
            random_tensor(*x.shape, dtype=kind, device=torch.device("cpu"), seed=100 + index).to(x.device, dtype)
            for index, x in enumerate(targets)
        ]
        gradients = torch.autograd.grad(targets, list(leaves.values()), seeds)
        results |= {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return results


def run_case(case: LaunchCase, dtype: torch.dtype, device: torch.device) -> None:
    """Run the Triton kernels of a case once; a checked case is compared with the reference in float64.

    Raises:
        AssertionError: the result is worse than the error budget allows.
    """
    problem = case.make(dtype, device)
    actual = evaluate(problem, "triton", dtype)
    if not case.checked:
        return
    on_cpu = Problem(
        problem.function,
        {name: x.cpu() for name, x in problem.leaves.items()},
        {name: x.cpu() for name, x in problem.constants.items()},
        problem.options,
        problem.backward,
    )
    plain, exact = (evaluate(on_cpu, "reference", kind) for kind in (dtype, torch.float64))
    for name, result in actual.items():
        assert_error_budget(name, result.cpu(), plain[name], exact[name])


def _subimage(
    tiles: int, tokens: int, heads: int, head_dim: int, *, rope: bool = False, backward: bool = True, **extra: Any
) -> Callable[[torch.dtype, torch.device], Problem]:
    """Sub-image attention on q, k and v, each an allocation of its own; lists in `extra` become int32 tensors."""

    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        shape = (tiles, tokens, heads, head_dim)
        leaves = {name: random_tensor(*shape, dtype=dtype, device=device, seed=seed) for seed, name in enumerate("qkv")}
        constants = {
            name: torch.tensor(value, dtype=torch.int32, device=device)
            for name, value in extra.items()
            if isinstance(value, list)
        }
        options = {name: value for name, value in extra.items() if not isinstance(value, list)}
        if rope:
            # A class token is not rotated.
            angle = torch.arange((tokens - 1) * head_dim // 2, device=device).view(tokens - 1, -1).repeat_interleave(2, 1)
            constants |= {"rope_cos": angle.cos(), "rope_sin": angle.sin()}
            options["rope_prefix"] = 1
        return Problem(subimage_attention, leaves, constants, {"return_lse": True, **options}, backward)

    return make


def _packed(tiles: int, tokens: int, heads: int, head_dim: int, *, backward: bool) -> Callable[..., Problem]:
    """Sub-image attention on the output of one projection."""

    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        qkv = random_tensor(tiles, tokens, 3, heads, head_dim, dtype=dtype, device=device, seed=0)
        return Problem(subimage_attention_packed, {"qkv": qkv}, options={"return_lse": True}, backward=backward)

    return make


def _cross(
    shape: tuple[int, int, int, int],
    keys: int,
    kv_heads: int,
    ranges: list[list[int]],
    *,
    blocks: int = 0,
    backward: bool = True,
) -> Callable[..., Problem]:
    """Cross-attention of q `shape` (B, T, Hq, D); the intervals of `ranges` are dealt to the text tokens in turn.

    With `blocks`, K and V are one block's part of a projection that makes those of so many.
    """

    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        batch, tokens, _, head_dim = shape
        if blocks:
            k, v = random_tensor(keys, blocks, 2, kv_heads, head_dim, dtype=dtype, device=device, seed=1)[:, 0].unbind(1)
        else:
            k, v = (random_tensor(keys, kv_heads, head_dim, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
        leaves = {"q": random_tensor(*shape, dtype=dtype, device=device, seed=0), "k": k, "v": v}
        chosen = [ranges[index % len(ranges)] for index in range(batch * tokens)]
        kv_range = torch.tensor(chosen, device=device).view(batch, tokens, 2)
        return Problem(interval_attention, leaves, {"kv_range": kv_range}, {"return_lse": True}, backward)

    return make


def _residual(shape: tuple[int, int, int], *, normed: bool, keep: list[bool] | None = None) -> Callable[..., Problem]:
    """The gated residual of hidden states `shape` (B, N, C)."""

    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        leaves = {name: random_tensor(*shape, dtype=dtype, device=device, seed=seed) for seed, name in enumerate("xy")}
        vectors = ("gate", "norm_weight", "norm_bias") if normed else ("gate",)
        for seed, name in enumerate(vectors, start=2):
            leaves[name] = random_tensor(shape[-1], dtype=dtype, device=device, seed=seed)
        constants = {} if keep is None else {"keep": torch.tensor(keep, device=device)}
        return Problem(gated_residual, leaves, constants)

    return make


SUBIMAGE, CROSS, RESIDUAL = "subimage", "interval", "residual"
DECODE = ("decode_kernel", "combine_kernel")
# Nothing, one key, an inner interval, everything, bounds that have to be clamped.
_RAGGED = [[0, 207], [5, 5], [206, 207], [33, 150], [-3, 300], [0, 1]]
_SMALL = [
    # 129 tokens are a class token and full tiles of any width.
    LaunchCase("subimage, peeled", SUBIMAGE, FORWARD + BACKWARD, _subimage(2, 129, 3, 72)),
    LaunchCase("subimage, rope", SUBIMAGE, ("rotate_kernel", *FORWARD, *BACKWARD), _subimage(1, 77, 2, 80, rope=True)),
    LaunchCase("subimage, lengths", SUBIMAGE, FORWARD + BACKWARD, _subimage(3, 83, 1, 112, seqlens=[83, 0, 37])),
    LaunchCase(
        "subimage, sequences",
        SUBIMAGE,
        FORWARD + BACKWARD,
        _subimage(1, 101, 2, 88, cu_seqlens=[0, 17, 17, 90], max_seqlen=73, is_causal=True),
    ),
    LaunchCase("subimage, window", SUBIMAGE, FORWARD + BACKWARD, _packed(3, 49, 1, 104, backward=True)),
    LaunchCase("cross, prompt", CROSS, FORWARD + BACKWARD, _cross((2, 37, 6, 72), 207, 2, _RAGGED)),
    LaunchCase("cross, decode one row", CROSS, DECODE + BACKWARD, _cross((1, 1, 3, 64), 1111, 3, [[7, 1105]])),
    LaunchCase(
        "cross, decode rows",
        CROSS,
        ("plan_kernel", *DECODE, *BACKWARD),
        _cross((7, 3, 4, 112), 1111, 2, [[0, 1111], [0, 1111], [3, 1109], [40, 40], [500, 777]]),
    ),
    LaunchCase(
        "residual",
        RESIDUAL,
        ("forward_kernel", "backward_kernel"),
        _residual((3, 7, 1000), normed=False, keep=[True, False, True]),
    ),
    LaunchCase("residual, norm", RESIDUAL, ("forward_kernel", "backward_kernel"), _residual((2, 13, 776), normed=True)),
]


def _tower(name: str, *, backward: bool = False, **extra: Any) -> LaunchCase:
    shape = TOWERS[name]
    sizes = (shape.tiles, shape.tokens, shape.heads, shape.head_dim)
    rotated = ("rotate_kernel",) if extra else ()
    make = _subimage(*sizes, backward=backward, **extra) if extra else _packed(*sizes, backward=backward)
    kernels = (*rotated, *FORWARD, *BACKWARD * backward)
    return LaunchCase(f"{name}, head dim {shape.head_dim}", SUBIMAGE, kernels, make, checked=False)


_PICTURE = 10250  # ten tiles of 1025 tokens
# In the order of their weight in InfiMM-HD: where time is short, the last ones are left out.
_MAIN = [
    _tower("InfiMM-HD", backward=True),
    LaunchCase(
        "cross prefill, 2048 tokens",
        CROSS,
        FORWARD + BACKWARD,
        _cross((1, 2048, 12, 64), _PICTURE, 12, [[0, _PICTURE]], blocks=10),
        checked=False,
    ),
    LaunchCase(
        "cross decode, batch 1",
        CROSS,
        DECODE,
        _cross((1, 1, 12, 64), _PICTURE, 12, [[0, _PICTURE]], blocks=10, backward=False),
        checked=False,
    ),
    LaunchCase(
        "cross decode, batch 64",
        CROSS,
        ("plan_kernel", *DECODE),
        _cross(
            (64, 1, 12, 64),
            64 * _PICTURE,
            12,
            [[row * _PICTURE, (row + 1) * _PICTURE] for row in range(64)],
            backward=False,
        ),
        checked=False,
    ),
    LaunchCase(
        "residual, 2048 rows of 5120",
        RESIDUAL,
        ("forward_kernel", "backward_kernel"),
        _residual((1, 2048, 5120), normed=True),
        checked=False,
    ),
    _tower("InternViT"),
    _tower("SigLIP"),
    _tower("Mllama"),
    LaunchCase("InternViT-6B, head dim 128", SUBIMAGE, FORWARD, _packed(10, 1025, 25, 128, backward=False), checked=False),
    _tower("InfiMM-Zephyr", rope=True),
]
CASES = {case.name: case for case in _SMALL}
MAIN_CASES = {case.name: case for case in _MAIN}


def _profile_second_run(case: LaunchCase, dtype: torch.dtype, device: torch.device) -> None:
    """Run a case twice; a profiler that waits for the program's word sees the second run's call alone."""
    problem = case.make(dtype, device)
    evaluate(problem, "triton", dtype)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    evaluate(problem, "triton", dtype)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 if a result is wrong, 2 if a name is not known."""
    parser = argparse.ArgumentParser(prog="python -m infimm_fast.benchmarks.one_launch", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of cases, small or main; all small ones without any")
    parser.add_argument("--list", action="store_true", help="name the cases and the kernels that each launches")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda", help="cpu works under TRITON_INTERPRET=1, in fp16 and fp32")
    parser.add_argument("--profile", action="store_true", help="run twice, and mark the second run for a profiler")
    options = parser.parse_args(arguments)
    known = CASES | MAIN_CASES
    if options.list:
        for case in known.values():
            print(f"{case.name}: {', '.join(case.kernels)}")
        return 0
    unknown = [name for name in options.names if name not in known]
    if unknown:
        print(f"error: case {unknown[0]!r} is not known; --list names them", file=sys.stderr)
        return 2
    wrong = 0
    run = _profile_second_run if options.profile else run_case
    for name in options.names or CASES:
        try:
            run(known[name], DTYPES[options.dtype], torch.device(options.device))
            print(f"{name}: ok")
        except AssertionError as error:
            print(f"{name}: WRONG: {error}")
            wrong += 1
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
