"""The Triton kernels of the gated residual, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from interpreter import InterpreterProcess

pytest.importorskip("triton", reason="needs triton")

CASES = Path(__file__).with_name("gated_residual_cases.py")


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 24, 128, 130, 600, 1280])
def test_widths(interpreter: InterpreterProcess, channels: int, dtype: str, norm: bool) -> None:
    # The LayerNorm of very few channels divides by a small spread: no budget holds there.
    interpreter.call(CASES, "check_case", channels=channels, tokens=5, dtype=dtype, norm=norm and channels > 3)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_real_width(interpreter: InterpreterProcess, dtype: str, norm: bool) -> None:
    interpreter.call(CASES, "check_case", channels=5120, tokens=3, dtype=dtype, norm=norm)


@pytest.mark.parametrize("gate_dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_gates(interpreter: InterpreterProcess, gate: str, gate_dtype: str) -> None:
    interpreter.call(CASES, "check_case", channels=72, tokens=7, dtype="float16", gate=gate, gate_dtype=gate_dtype)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("keep", ["none", "bool", "int64", "float32", "nothing"])
def test_kept_rows(interpreter: InterpreterProcess, keep: str, norm: bool) -> None:
    interpreter.call(CASES, "check_case", channels=72, tokens=7, dtype="float32", keep=keep, norm=norm)


@pytest.mark.parametrize("layout", ["swapped", "wide", "offset", "columns"])
def test_views(interpreter: InterpreterProcess, layout: str) -> None:
    interpreter.call(CASES, "check_case", channels=72, tokens=7, dtype="float16", layout=layout)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("channels", "tokens"), [(8, 1), (8, 15), (1024, 5)])
def test_programs_with_many_steps(interpreter: InterpreterProcess, channels: int, tokens: int, norm: bool) -> None:
    interpreter.call(CASES, "check_case", channels=channels, tokens=tokens, dtype="float32", norm=norm, max_programs=2)


# (text, replacement) by file and name.
MUTATIONS: dict[str, tuple[str, str, str]] = {
    "gate dropped": ("tiles", "keep[:, None] * slope[i] * y[i]", "keep[:, None] * y[i]"),
    "gate without tanh": ("tiles", "slope += (tanh(gate[i]),)", "slope += (gate[i],)"),
    "wrong branch of tanh": ("tiles", "tl.where(x < 0, -tail, tail)", "tail"),
    "one gate for all": ("tiles", "load_channels(gate_ptr, T, T.GATE_STRIDE)", "load_channels(gate_ptr, T, 0)"),
    "keep ignored": ("tiles", "tl.where(keep[:, None] != 0, moved, wide)", "wide + slope[i] * y[i].to(tl.float32)"),
    "keep of another row": ("tiles", "keep_ptr + row // rows_per_batch", "keep_ptr + row % 3"),
    "batch stride dropped": ("tiles", "batch * stride_b + token * stride_n", "token * stride_n"),
    "norm of x": ("forward", "normalise(out, eps, T)", "normalise(x, eps, T)"),
    "wrong eps": ("tiles", "tl.sqrt(square / T.D + eps)", "tl.sqrt(square / T.D + eps * 0.5)"),
    "channels beyond the width counted": ("tiles", "block = tl.where(o_c < T.D, block, 0.0)", "block = block + 0.0"),
    "bias dropped": ("tiles", "normal[i] * weight[i] + bias[i]", "normal[i] * weight[i]"),
    "last step of a program dropped": ("forward", "for start in range(first, last, T.BLOCK_M):",
                                       "for start in range(first, last - T.BLOCK_M, T.BLOCK_M):"),
    "last step of a gradient dropped": ("backward", "for start in range(first, last, T.BLOCK_M):",
                                        "for start in range(first, last - T.BLOCK_M, T.BLOCK_M):"),
    "steps not added": ("tiles", "result += (acc[i] + a[i].to(tl.float32) * b[i].to(tl.float32),)",
                        "result += (a[i].to(tl.float32) * b[i].to(tl.float32),)"),
    "derivative of tanh dropped": ("tiles", "dgate[i] * (1.0 - slope[i] * slope[i])", "dgate[i]"),
    "keep left out of the gradient": ("tiles", "keep[:, None] * grad[i].to(tl.float32), 0.0)",
                                      "grad[i].to(tl.float32), 0.0)"),
    "gate left out of dy": ("backward", "multiply(grad, slope)", "grad"),
    "norm's gradient left out of dx": ("tiles", "grad[i].to(tl.float32) + through * rstd[:, None]",
                                       "grad[i].to(tl.float32)"),
    "mean left out of the norm's gradient": ("tiles", " - mean_grad[:, None]", ""),
    "product left out of the norm's gradient": ("tiles", " - normal[i] * mean_product[:, None]", ""),
    "weight and bias swapped": ("backward", "store_partial(partial_ptr, 1, dweight", "store_partial(partial_ptr, 1, dbias"),
    "gate's gradient without the norm's": ("backward", "            grad = add_norm_gradient(",
                                           "            _ = add_norm_gradient("),
}  # fmt: skip
MUTABLE: dict[str, Any] = {"channels": 130, "tokens": 5, "dtype": "float32", "keep": "float32", "max_programs": 2}


def test_unmutated_kernels_pass(interpreter: InterpreterProcess) -> None:
    interpreter.call(CASES, "check_case", **MUTABLE)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(interpreter: InterpreterProcess, name: str) -> None:
    with pytest.raises(AssertionError, match=r"^(out|normed|dx|dy|dgate|dweight|dbias): "):
        interpreter.call(CASES, "check_case", **MUTABLE, mutation=MUTATIONS[name])


@pytest.mark.parametrize(
    "name",
    [
        "opcheck",
        "compile",
        "checkpoint",
        "deterministic",
        "other_shapes",
        "only_one_result_is_used",
        "explicit_never_falls_back",
    ],
)
def test_operator_over_the_kernels(interpreter: InterpreterProcess, name: str) -> None:
    interpreter.call(CASES, f"check_{name}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("channels", [2048, 4096, 7168, 8192])
def test_wide_rows(interpreter: InterpreterProcess, channels: int, dtype: str) -> None:
    interpreter.call(CASES, "check_case", channels=channels, tokens=7, dtype=dtype, gate_dtype="float32")
