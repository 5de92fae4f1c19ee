"""What is tuned: kernels on the shapes of real models, with their inputs, their launch, and what a correct result is.

Inputs and references are those of the benchmark suites. The same `launch` is recorded offline, on tensors without memory,
and runs on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infimm_fast.benchmarks.cases import TOWERS, TowerShape, item_size, self_attention_flops
from infimm_fast.benchmarks.registry import OPS, Case, Inputs, Op, load_suites
from infimm_fast.benchmarks.suites.interval_attention import visible_pairs, visual_tokens
from infimm_fast.kernels.common.launch import LaunchConfig
from infimm_fast.kernels.interval import config as cross_config
from infimm_fast.kernels.interval.options import Options as CrossOptions
from infimm_fast.kernels.residual import config as residual_config
from infimm_fast.kernels.residual.options import Gradients
from infimm_fast.kernels.residual.options import Options as ResidualOptions
from infimm_fast.kernels.subimage import config as subimage_config
from infimm_fast.kernels.subimage.options import Options as SubimageOptions
from infimm_fast.models.infimm_hd.costs import attention_flops

SUBIMAGE, CROSS, RESIDUAL = "subimage_attention", "interval_attention", "gated_residual"
# Products of matrices that a kernel computes; the forward's two are what `attention_flops` counts.
_PRODUCTS = {"forward": 2, "decode": 2, "backward_kv": 4, "backward_q": 3}
Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Job:
    """One kernel on one shape.

    Attributes:
        op: name of the op, and of its benchmark suite.
        kernel: key of the op's configuration table.
        name: unique; says the shape.
        sizes: of the suite's case.
        importance: 0 is tuned first.
        dtype: of the tensors.
    """

    op: str
    kernel: str
    name: str
    sizes: dict[str, int]
    importance: int = 2
    dtype: str = "bf16"

    @property
    def width(self) -> int:
        """Head dim, or channels of an op without heads."""
        return self.sizes["width"] if self.op == RESIDUAL else self.sizes["head_dim"]

    @property
    def backward(self) -> bool:
        """Whether it is a kernel of the backward pass."""
        return self.kernel.startswith("backward")

    @property
    def case(self) -> Case:
        """The suite's case, with the operations and the fewest bytes of this one kernel."""
        operations, moved = _COSTS[self.op](self)
        return Case(self.name, self.sizes, self.dtype, operations, moved, self.importance, backward=self.backward)


def _subimage_costs(job: Job) -> tuple[int, int]:
    shape = TowerShape(**job.sizes)
    tensor = shape.tiles * shape.tokens * shape.heads * shape.head_dim * item_size(job.dtype)
    # q, k, v and out; or q, k, v, the output's gradient and one or two gradients.
    tensors = {"forward": 4, "backward_kv": 6, "backward_q": 5}[job.kernel]
    return self_attention_flops(shape) * _PRODUCTS[job.kernel] // 2, tensors * tensor


def _cross_costs(job: Job) -> tuple[int, int]:
    sizes = job.sizes
    width = sizes["heads"] * sizes["head_dim"]
    text = sizes["rows"] * sizes["tokens"] * width
    visual = 2 * visual_tokens(sizes) * sizes.get("kv_heads", sizes["heads"]) * sizes["head_dim"]
    texts, visuals = {"backward_kv": (2, 2), "backward_q": (3, 1)}.get(job.kernel, (2, 1))
    operations = attention_flops(1, visible_pairs(sizes), width) * _PRODUCTS[job.kernel] // 2
    return operations, (texts * text + visuals * visual) * item_size(job.dtype)


def _residual_costs(job: Job) -> tuple[int, int]:
    values = job.sizes["tokens"] * job.sizes["width"]
    # x, y, out, normed; or two gradients in, out and y, two gradients out.
    return (20 if job.backward else 10) * values, (6 if job.backward else 4) * values * item_size(job.dtype)


_COSTS: dict[str, Callable[[Job], tuple[int, int]]] = {
    SUBIMAGE: _subimage_costs,
    CROSS: _cross_costs,
    RESIDUAL: _residual_costs,
}


def all_jobs() -> list[Job]:
    """Return all jobs, the most important ones first."""
    return sorted((*_subimage_jobs(), *_cross_jobs(), *_residual_jobs()), key=lambda job: job.importance)


def _subimage_jobs() -> Iterator[Job]:
    shapes = {dim: TowerShape(10, 1025, 16, dim) for dim in subimage_config.HEAD_DIMS}
    shapes |= {TOWERS[name].head_dim: TOWERS[name] for name in ("InfiMM-HD", "SigLIP", "Mllama", "InternViT")}
    for dim, shape in shapes.items():
        name = f"D {dim}, {shape.tiles} x {shape.tokens} x {shape.heads}"
        forward, backward = {112: (0, 1), 64: (1, 2), 72: (1, 2), 80: (1, 2)}.get(dim, (2, 3))
        yield Job(SUBIMAGE, "forward", name, vars(shape), forward)
        for kernel in ("backward_kv", "backward_q"):
            yield Job(SUBIMAGE, kernel, name, vars(shape), backward)


def _cross_jobs() -> Iterator[Job]:
    def make(kernel: str, rows: int, tokens: int, heads: tuple[int, int], dim: int, importance: int) -> Job:
        # Ten blocks' keys and values come out of one product, unless they would not fit.
        sizes = {"rows": rows, "tokens": tokens, "tiles": 10, "images": 1, "shared": 0, "tokens_per_tile": 1025}
        sizes |= {"heads": heads[0], "kv_heads": heads[1], "head_dim": dim, "kv_blocks": 10 if rows == 1 else 1}
        name = f"D {dim}, batch {rows}, {tokens} x 10250 x {heads[0]}/{heads[1]}"
        return Job(CROSS, kernel, name, sizes, importance)

    for heads, dim, importance in (((12, 12), 64, 0), ((32, 8), 128, 1), ((16, 16), 80, 2)):
        yield make("forward", 1, 2048, heads, dim, importance)
        for kernel in ("backward_kv", "backward_q"):
            yield make(kernel, 1, 512, heads, dim, importance + 1)
    for rows, importance in ((1, 0), (8, 1), (64, 0)):
        yield make("decode", rows, 1, (12, 12), 64, importance)


def _residual_jobs() -> Iterator[Job]:
    for kernel in ("forward", "backward"):
        yield Job(RESIDUAL, kernel, "5120 channels, 2048 rows", {"tokens": 2048, "width": 5120}, 2)


def shipped_config(job: Job, arch: int) -> LaunchConfig:
    """Return the configuration that the kernel would run with on compute capability `arch` (90 for a Hopper)."""
    return _config(job, job.kernel, arch)


def _config(job: Job, kernel: str, arch: int) -> LaunchConfig:
    sizes, dtype = job.sizes, job.case.torch_dtype
    if job.op == SUBIMAGE:
        return subimage_config.choose_config(kernel, job.width, dtype, sizes["tokens"], arch)
    if job.op == CROSS:
        rows = sizes["tokens"] * sizes["heads"] // sizes["kv_heads"]
        return cross_config.choose_config(kernel, job.width, dtype, rows, arch, batch=sizes["rows"])
    return residual_config.choose_config(job.width)


def suite_of(job: Job) -> Op:
    """Return the benchmark suite's op."""
    load_suites()
    return OPS[job.op]


def make_inputs(job: Job, device: torch.device, seed: int, arch: int) -> Inputs:
    """Return the suite's inputs, and before a backward pass the forward's results."""
    inputs = suite_of(job).make_inputs(job.case, device, seed)
    inputs = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    if job.backward:
        inputs["forward"] = _LAUNCHERS[job.op, "forward"](job, inputs, _config(job, "forward", arch), arch)
    return inputs


def launch(job: Job, inputs: Inputs, config: LaunchConfig, arch: int) -> Outputs:
    """Run the op's launcher with one configuration for the job's kernel, and the shipped one for its others.

    Returns:
        What the suite's op would return, gradients included.
    """
    kernel = "backward" if job.backward else "forward"
    return _LAUNCHERS[job.op, kernel](job, inputs, config, arch)


def _launch_subimage(job: Job, inputs: Inputs, config: LaunchConfig, arch: int) -> Outputs:
    from infimm_fast.kernels.subimage.forward import launch_forward

    return launch_forward(inputs["q"], inputs["k"], inputs["v"], SubimageOptions(job.width**-0.5), config=config)


def _launch_subimage_backward(job: Job, inputs: Inputs, config: LaunchConfig, arch: int) -> Outputs:
    from infimm_fast.kernels.subimage.backward import launch_backward

    packed = torch.empty_like(inputs["qkv"])
    (gradient,), (out, lse) = inputs["gradients"], inputs["forward"]
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    options, configs = SubimageOptions(job.width**-0.5), _backward_configs(job, config, arch)
    launch_backward(gradient, q, k, v, out, lse, options, gradients=packed.unbind(2), **configs)
    return out, packed


def _backward_configs(job: Job, config: LaunchConfig, arch: int) -> dict[str, Any]:
    configs: dict[str, Any] = {f"config_{kernel}": _config(job, f"backward_{kernel}", arch) for kernel in ("kv", "q")}
    return configs | {job.kernel.replace("backward", "config"): config}


def _launch_cross(job: Job, inputs: Inputs, config: LaunchConfig, arch: int) -> Outputs:
    from infimm_fast.kernels.interval.forward import launch_forward

    q, k, v, kv_range = (inputs[name] for name in ("q", "k", "v", "kv_range"))
    return launch_forward(q, k, v, kv_range, CrossOptions(job.width**-0.5), config=config)


def _launch_cross_backward(job: Job, inputs: Inputs, config: LaunchConfig, arch: int) -> Outputs:
    from infimm_fast.kernels.interval.backward import launch_backward

    q, k, v, kv_range = (inputs[name] for name in ("q", "k", "v", "kv_range"))
    (gradient,), (out, lse) = inputs["gradients"], inputs["forward"]
    dq, dkv = q.new_empty(q.shape), k.new_empty((2, *k.shape))
    configs = _backward_configs(job, config, arch)
    options, gradients = CrossOptions(job.width**-0.5), (dq, dkv[0], dkv[1])
    launch_backward(gradient, q, k, v, kv_range, out, lse, options, gradients=gradients, **configs)
    return out, dq, dkv.transpose(0, 1)


def _launch_residual(job: Job, inputs: Inputs, config: LaunchConfig, arch: int) -> Outputs:
    from infimm_fast.kernels.residual.forward import launch_forward

    x, y, gate, weight, bias = (inputs[name] for name in ("x", "y", "gate", "norm_weight", "norm_bias"))
    return launch_forward(x, y, gate, None, weight, bias, ResidualOptions(), config=config)


def _launch_residual_backward(job: Job, inputs: Inputs, config: LaunchConfig, arch: int) -> Outputs:
    from infimm_fast.kernels.residual.backward import launch_backward

    y, gate, weight = inputs["y"], inputs["gate"], inputs["norm_weight"]
    out, normed = inputs["forward"]
    grad, grad_normed = inputs["gradients"]
    gradients = Gradients(*(torch.empty_like(one) for one in (y, y, gate, weight, weight)))
    options = ResidualOptions()
    launch_backward(grad, grad_normed, y, gate, None, weight, out, options, gradients=gradients, config=config)
    return out, normed, *gradients


_LAUNCHERS: dict[tuple[str, str], Callable[[Job, Inputs, LaunchConfig, int], Outputs]] = {
    (SUBIMAGE, "forward"): _launch_subimage,
    (SUBIMAGE, "backward"): _launch_subimage_backward,
    (CROSS, "forward"): _launch_cross,
    (CROSS, "backward"): _launch_cross_backward,
    (RESIDUAL, "forward"): _launch_residual,
    (RESIDUAL, "backward"): _launch_residual_backward,
}
# What is timed: one of several kernels that a launcher runs. Any other launcher is timed as a whole.
TIMED_KERNELS: dict[str, str] = {"backward_kv": "key_value_kernel", "backward_q": "query_kernel"}
# The kernel whose code is judged.
_MAIN_KERNELS = {"forward": "forward_kernel", "decode": "decode_kernel", "backward": "backward_kernel"} | TIMED_KERNELS


def main_kernel(job: Job) -> str:
    """Return the name of the jitted function that a job is about."""
    return _MAIN_KERNELS[job.kernel]


def select_jobs(ops: Sequence[str] | None, kernels: Sequence[str] | None, widths: Sequence[int] | None) -> list[Job]:
    """Return the jobs of some ops, kernels and widths; None means all of them."""
    return [
        job
        for job in all_jobs()
        if (ops is None or job.op in ops)
        and (kernels is None or job.kernel in kernels)
        and (widths is None or job.width in widths)
    ]
