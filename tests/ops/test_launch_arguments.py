"""Long lists of positional arguments keep their order: operators against their options, launches against the kernels."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import infimm_fast.kernels  # noqa: F401  defines the operators
from infimm_fast.kernels.common.launch import head_strides

OPERATORS = {
    "subimage": ("subimage_attention", "subimage_attention_packed"),
    "interval": ("interval_attention",),
    "residual": ("gated_residual",),
}


@pytest.mark.parametrize(
    ("folder", "name"),
    [(folder, name + end) for folder, names in OPERATORS.items() for name in names for end in ("", "_backward")],
)
def test_options_are_the_end_of_the_schema(folder: str, name: str) -> None:
    options = importlib.import_module(f"infimm_fast.kernels.{folder}.options")
    arguments = [argument.name for argument in getattr(torch.ops.infimm_fast, name).default._schema.arguments]
    fields = options.Options._fields
    assert tuple(arguments[-len(fields) :]) == fields
    tensors = arguments[: -len(fields)]
    if name == "gated_residual":
        assert tuple(tensors) == options.Tensors._fields
    elif name.endswith("_backward") and "packed" not in name:
        assert tuple(tensors[-len(options.Saved._fields) :]) == options.Saved._fields


def _strided(*shape: int, gap: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a tensor without memory whose strides are multiples of 8 and differ, `gap` apart from those of others."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size + 8 * gap)
    return torch.empty_strided(shape, strides[::-1], dtype=dtype, device="meta")


def _like(value: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return isinstance(value, torch.Tensor) and value.dtype == expected.dtype and _layout(value) == _layout(expected)
    return value == expected and not isinstance(value, torch.Tensor)


def _layout(tensor: torch.Tensor) -> list[tuple[int, int]]:
    return [pair for pair in zip(tensor.shape, tensor.stride(), strict=True) if pair[0] > 1]


def _mismatches(launch: Any, known: dict[str, Any], letters: dict[str, torch.Tensor]) -> Iterator[str]:
    """Yield parameters whose value is not the known one; strides belong to the tensor of their letter."""
    for name, value in launch.values.items():
        if name.startswith("stride_"):
            letter, axis = name[len("stride_")], name[-1]
            expected: Any = letters[letter].stride("bte".index(axis)) if letter == "r" else None
            if expected is None:
                expected = head_strides(letters[letter])["bnh".index(axis)] // launch.values["ALIGN"]
        elif name.isupper():
            continue  # given by name
        else:
            expected = known[name]
        if not _like(value, expected):
            yield f"{launch.kernel.__name__}: {name} is {value}, not {expected}"


def test_launches_of_subimage_attention() -> None:
    pytest.importorskip("triton", reason="needs triton")
    from infimm_fast.kernels.common.offline import recorded_launches
    from infimm_fast.kernels.subimage.backward import launch_backward
    from infimm_fast.kernels.subimage.forward import launch_forward
    from infimm_fast.kernels.subimage.options import Options, Saved

    batch, tokens, heads, head_dim = 3, 33, 5, 64
    q, k, v, grad, out, dq, dk, dv = (_strided(batch, tokens, heads, head_dim, gap=gap) for gap in range(1, 9))
    cos = torch.empty(tokens - 1, head_dim, device="meta")
    sin = torch.empty(tokens - 1, head_dim, device="meta", dtype=torch.float64)
    lengths = torch.empty(batch, dtype=torch.int32, device="meta")
    lse, fresh = torch.empty(batch, heads, tokens, device="meta"), torch.empty(q.shape, dtype=q.dtype, device="meta")
    options = Options(0.3, cos, sin, rope_prefix=1, seqlens=lengths, max_seqlen=tokens - 2)
    with recorded_launches() as forward:
        launch_forward(q, k, v, options)
    with recorded_launches() as backward:
        launch_backward(grad, Saved(q, k, v, out, lse), options, (dq, dk, dv))
    sizes = {"num_tokens": tokens, "max_tokens": tokens - 2, "num_heads": heads, "prefix": 1, "rope_prefix": 1}
    known = sizes | {"scale": 0.3, "cos_ptr": cos, "sin_ptr": sin, "lengths_ptr": lengths, "lse_ptr": lse, "delta_ptr": lse}
    # Keys are rotated into a fresh tensor, and in the backward queries too; then the gradients in place.
    rotations = [(k, fresh), (q, fresh), (k, fresh), (dq, dq), (dk, dk)]
    launches = forward + backward
    names = ["rotate_kernel", "forward_kernel", "rotate_kernel", "rotate_kernel", "delta_kernel", "key_value_kernel"]
    assert [one.kernel.__name__ for one in launches] == [*names, "query_kernel", "rotate_kernel", "rotate_kernel"]
    for launch in launches:
        name = launch.kernel.__name__
        if name == "rotate_kernel":
            x, target = rotations.pop(0)
            pointers, letters = {"x_ptr": x, "out_ptr": target}, {"x": x, "o": target}
        elif name == "forward_kernel":
            pointers, letters = {"q_ptr": q, "k_ptr": fresh, "v_ptr": v, "out_ptr": fresh}, {"q": q, "k": fresh, "v": v}
        elif name == "delta_kernel":
            pointers, letters = {"out_ptr": out, "grad_ptr": grad}, {"o": out, "g": grad}
        else:
            pointers = {"q_ptr": fresh, "k_ptr": fresh, "v_ptr": v, "grad_ptr": grad}
            pointers |= {"dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv}
            letters = {"q": fresh, "k": fresh, "v": v, "g": grad, "x": dq if name == "query_kernel" else dk, "y": dv}
        assert not list(_mismatches(launch, known | pointers, letters))


@pytest.mark.parametrize(("batch", "tokens"), [(3, 33), (3, 2)])
def test_launches_of_interval_attention(batch: int, tokens: int) -> None:
    pytest.importorskip("triton", reason="needs triton")
    from infimm_fast.kernels.common.offline import recorded_launches
    from infimm_fast.kernels.interval.backward import launch_backward
    from infimm_fast.kernels.interval.config import choose_config, choose_split
    from infimm_fast.kernels.interval.forward import launch_forward
    from infimm_fast.kernels.interval.options import Options, Saved

    keys, heads, kv_heads, head_dim = 10250, 10, 5, 64
    q, grad, out = (_strided(batch, tokens, heads, head_dim, gap=gap) for gap in (1, 2, 3))
    k, v = (_strided(1, keys, kv_heads, head_dim, gap=gap) for gap in (4, 5))
    kv_range = _strided(batch, tokens, 2, 2, gap=6, dtype=torch.int64)[..., 0]
    lse, fresh = torch.empty(batch, heads, tokens, device="meta"), torch.empty(q.shape, dtype=q.dtype, device="meta")
    dk = torch.empty(keys, kv_heads, head_dim, dtype=k.dtype, device="meta")
    split = choose_split(batch, tokens, 2, kv_heads, keys, choose_config("decode", 64, q.dtype, tokens * 2, 80, batch=batch))
    known = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "range_ptr": kv_range, "grad_ptr": grad, "lse_ptr": lse, "delta_ptr": lse,
        "out_ptr": fresh, "dq_ptr": fresh, "dk_ptr": dk, "dv_ptr": dk, "scale": 0.3, "num_batches": batch,
        "num_tokens": tokens, "num_kv_heads": kv_heads, "num_keys": keys, "group_size": 2, "num_rows": lse.numel(),
        "num_heads": heads, "max_tokens": tokens, "lengths_ptr": None,
    }  # fmt: skip
    if split is not None:
        part = torch.empty(split.splits, *fresh.shape, device="meta")
        plan = torch.empty(1, 7, 256, dtype=torch.int32, device="meta")
        known |= {"part_ptr": part, "part_lse_ptr": part[..., 0].clone(), "plan_ptr": plan, "pool": split.pool}
        known |= {"num_units": split.units, "num_splits": split.splits, "max_splits": split.splits}
    options = Options(0.3)
    with recorded_launches() as launches:
        launch_forward(q, k[0], v[0], kv_range, options)
        launch_backward(grad, Saved(q, k[0], v[0], kv_range, out, lse), options, (fresh, dk, dk))
    names = ["forward_kernel"] if split is None else ["plan_kernel", "decode_kernel", "combine_kernel"]
    names += ["delta_kernel", "query_kernel", "key_value_kernel"]
    assert [one.kernel.__name__ for one in launches] == names
    for launch in launches:
        letters = {"q": q, "k": k, "v": v, "g": grad, "r": kv_range, "o": out}
        of_launch = known | {"out_ptr": out} if launch.kernel.__name__ == "delta_kernel" else known
        assert not list(_mismatches(launch, of_launch, letters))


def test_launches_of_gated_residual() -> None:
    pytest.importorskip("triton", reason="needs triton")
    from infimm_fast.kernels.common.offline import recorded_launches
    from infimm_fast.kernels.residual.backward import launch_backward
    from infimm_fast.kernels.residual.config import choose_config, rows_of_programs
    from infimm_fast.kernels.residual.forward import launch_forward
    from infimm_fast.kernels.residual.options import Gradients, Options, Saved, Tensors

    batch, tokens, channels = 3, 3001, 512
    x, y, grad, grad_normed = (_strided(batch, tokens, channels, gap=gap) for gap in (1, 2, 3, 4))
    dtypes = (torch.float16, torch.float32, torch.float64)
    gate, weight, bias = (torch.empty(channels, dtype=dtype, device="meta") for dtype in dtypes)
    keep = torch.empty(batch, dtype=torch.bool, device="meta")
    out = torch.empty(x.shape, dtype=x.dtype, device="meta")
    block_m = choose_config(channels).block_m
    rows = batch * tokens
    known = {
        "gate_ptr": gate, "keep_ptr": keep, "weight_ptr": weight, "bias_ptr": bias, "out_ptr": out, "normed_ptr": out,
        "eps": 0.5, "num_rows": rows, "rows_per_batch": tokens, "dx_ptr": out, "dy_ptr": out,
    }  # fmt: skip
    with recorded_launches() as launches:
        launch_forward(Tensors(x, y, gate, keep, weight, bias), Options(0.5))
        gradients = Gradients(out, out, torch.empty_like(gate), torch.empty_like(weight), torch.empty_like(bias))
        saved = Saved(y, gate, keep, weight, out)
        launch_backward(grad, grad_normed, saved, Options(0.5), gradients=gradients)
    letters = {name: tensor.unsqueeze(2) for name, tensor in {"x": x, "y": y, "g": grad, "n": grad_normed}.items()}
    inputs = {"x_ptr": letters["x"], "y_ptr": letters["y"], "grad_ptr": letters["g"], "grad_normed_ptr": letters["n"]}
    assert [one.kernel.__name__ for one in launches] == ["forward_kernel", "backward_kernel"]
    for launch, kernel in zip(launches, ("forward", "backward"), strict=True):
        programs, share = rows_of_programs(kernel, rows, block_m)
        partials = torch.empty(3, programs, channels, device="meta")
        of_launch = known | inputs | {"rows_per_program": share, "partial_ptr": partials}
        assert not list(_mismatches(launch, of_launch, letters))
