"""The Triton kernels of gated cross-attention, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infimm_fast.kernels.subimage_attention.config import HEAD_DIMS
from infimm_fast.testing import InterpreterProcess

pytest.importorskip("triton", reason="needs triton")

CASES = Path(__file__).with_name("gated_cross_attention_cases.py")
SMALL = {"block_m": 16, "block_n": 32}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[InterpreterProcess]:
    process = InterpreterProcess()
    yield process
    process.close()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 80, 112, 128])
def test_head_dims(interpreter: InterpreterProcess, head_dim: int, dtype: str) -> None:
    # The small tiles that fp32 ships with take long here; one head dim is enough for them.
    config = None if dtype == "float16" or head_dim == 64 else {"block_m": 32, "block_n": 64}
    interpreter.call(CASES, "check_case", head_dim=head_dim, tokens=15, keys=53, dtype=dtype, kv_heads=1, config=config)


@pytest.mark.parametrize("head_dim", [8, 24, 120])
def test_head_dims_between(interpreter: InterpreterProcess, head_dim: int) -> None:
    interpreter.call(CASES, "check_case", head_dim=head_dim, tokens=9, keys=33, dtype="float16", kv_heads=1)


@pytest.mark.parametrize("ranges", ["random", "cut", "empty", "full", "shared"])
@pytest.mark.parametrize("config", [pytest.param(None, marks=pytest.mark.slow), SMALL], ids=str)
def test_intervals(interpreter: InterpreterProcess, ranges: str, config: dict[str, int] | None) -> None:
    arguments = {"head_dim": 64, "tokens": 21, "keys": 101, "dtype": "float16", "heads": 1, "kv_heads": 1}
    interpreter.call(CASES, "check_case", **arguments, ranges=ranges, config=config)


@pytest.mark.parametrize("rows", [12, pytest.param(64, marks=pytest.mark.slow)])
def test_one_image_shared_by_many_rows(interpreter: InterpreterProcess, rows: int) -> None:
    arguments = {"head_dim": 64, "tokens": 9, "keys": 65, "dtype": "float16", "heads": 1, "kv_heads": 1}
    interpreter.call(CASES, "check_case", ranges="shared", rows=rows, **arguments)


def test_many_images_in_each_row(interpreter: InterpreterProcess) -> None:
    arguments = {"head_dim": 64, "tokens": 123, "keys": 401, "dtype": "float16", "heads": 1, "kv_heads": 1}
    interpreter.call(CASES, "check_case", ranges="images", config={"block_m": 32, "block_n": 32}, **arguments)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (8, 1), pytest.param(5, 1, marks=pytest.mark.slow)])
def test_grouped_heads(interpreter: InterpreterProcess, heads: int, kv_heads: int) -> None:
    arguments = {"head_dim": 24, "tokens": 9, "keys": 33, "dtype": "float16", "heads": heads, "kv_heads": kv_heads}
    interpreter.call(CASES, "check_case", **arguments, config={"block_m": 32, "block_n": 32})


@pytest.mark.parametrize(("tokens", "index"), [(3, "int64"), (17, "int32")])
@pytest.mark.parametrize("layout", ["blocks", "offset", "columns"])
def test_views_are_read_in_place(interpreter: InterpreterProcess, layout: str, tokens: int, index: str) -> None:
    arguments = {"head_dim": 72, "tokens": tokens, "keys": 30, "dtype": "float16", "layout": layout, "index": index}
    interpreter.call(CASES, "check_case", **arguments)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_decode_of_uneven_rows(interpreter: InterpreterProcess, tokens: int) -> None:
    arguments = {"head_dim": 64, "keys": 140, "dtype": "float32", "rows": 3, "gradients": False}
    config = {"block_m": 16, "block_n": 16}  # two splits
    interpreter.call(CASES, "check_case", tokens=tokens, ranges="ragged", config=config, heads=1, kv_heads=1, **arguments)


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(112, 3, 3), (80, 6, 2), (128, 16, 1)])
def test_decode_with_shipped_tiles(interpreter: InterpreterProcess, head_dim: int, heads: int, kv_heads: int) -> None:
    arguments = {"tokens": 2, "keys": 1100, "dtype": "float16", "rows": 2, "gradients": False}
    shapes = {"head_dim": head_dim, "heads": heads, "kv_heads": kv_heads}
    interpreter.call(CASES, "check_case", ranges="ragged", **shapes, **arguments)


def test_decode_gradients(interpreter: InterpreterProcess) -> None:
    arguments = {"head_dim": 64, "tokens": 3, "keys": 300, "dtype": "float16", "rows": 3, "heads": 2, "kv_heads": 1}
    interpreter.call(CASES, "check_case", ranges="ragged", **arguments, config={"block_m": 16, "block_n": 32})


def test_a_scale_of_its_own(interpreter: InterpreterProcess) -> None:
    interpreter.call(CASES, "check_case", head_dim=64, tokens=9, keys=33, dtype="float16", scale=0.3)


# (file, text, replacement), and whether it is seen in decode (4 tokens, splits) or in a prompt (20 tokens).
MUTATIONS: dict[str, tuple[bool, str, str, str]] = {
    "wrong scale": (False, "forward", "scale_log2 = scale * LOG2_E", "scale_log2 = scale * LOG2_E * 1.02"),
    "interval dropped": (False, "tiles", "(key - start).to(tl.uint32) < count.to(tl.uint32)",
                         "(key == key) & (count == count)"),
    "start one early": (False, "tiles", "start = tl.load(p_start, mask=inside, other=0)",
                        "start = tl.load(p_start, mask=inside, other=0) - 1"),
    "start one late": (False, "tiles", "start = tl.load(p_start, mask=inside, other=0)",
                       "start = tl.load(p_start, mask=inside, other=0) + 1"),
    "end one early": (False, "tiles", "end = tl.load(p_start + stride_re, mask=inside, other=0)",
                      "end = tl.load(p_start + stride_re, mask=inside, other=0) - 1"),
    "end one late": (False, "tiles", "end = tl.load(p_start + stride_re, mask=inside, other=0)",
                     "end = tl.load(p_start + stride_re, mask=inside, other=0) + 1"),
    "hull ends early": (False, "tiles", "tl.where(count > 0, start + count, 0)",
                        "tl.where(count > 0, start + count - 1, 0)"),
    "kv heads swapped": (False, "forward", "k_ptr = head_start(k_ptr, batch * 0, kv_head,",
                         "k_ptr = head_start(k_ptr, batch * 0, num_kv_heads - 1 - kv_head,"),
    "heads of a group swapped": (False, "forward", "store_rows(out_ptr, acc, query_offsets(token, member,",
                                 "store_rows(out_ptr, acc, query_offsets(token, (member + 1) % GROUP,"),
    "accumulator not rescaled": (False, "forward", "scale_tile(acc, alpha[:, None], COVER)", "acc"),
    "log-sum-exp in base 2": (False, "forward", "lse = (m + tl.log2(total)) * LN_2", "lse = m + tl.log2(total)"),
    "last split dropped": (True, "forward", "split_end = tl.minimum(split_start + share, high)",
                           "split_end = tl.minimum(split_start + share * (split < num_splits - 1), high)"),
    "splits overlap": (True, "forward", "split_start = low + split * share", "split_start = low + split * (share - 1)"),
    "splits weighed alike": (True, "forward", "    total = tl.sum(weights, axis=0)\n",
                             "    weights = weights * 0 + 1\n    total = tl.sum(weights, axis=0)\n"),
    "delta left out of dk": (False, "backward", " - delta[None, :]", ""),
    "delta left out of dq": (False, "backward", " - delta[:, None]", ""),
    "dk not scaled": (False, "backward", "scale_tile(dk, scale, COVER)", "dk"),
    "dq not scaled": (False, "backward", "    dq = scale_tile(dq, scale, COVER)\n", ""),
    "last row not added": (False, "backward", "in range(0, num_batches)", "in range(0, num_batches - 1)"),
    "first touching token dropped": (False, "backward", "tl.where(touches, token, num_tokens)",
                                     "tl.where(touches, token + 1, num_tokens)"),
    "last touching tokens dropped": (False, "backward", "tl.where(touches, token + 1, 0)",
                                     "tl.where(touches, token // 2, 0)"),
    "gradients swapped": (False, "backward", "return add_product(dk, ds, q, COVER), dv",
                          "return dv, add_product(dk, ds, q, COVER)"),
}  # fmt: skip
# By whether the keys are split.
MUTABLE: dict[bool, dict[str, Any]] = {
    False: {"tokens": 13, "keys": 45, "config": {"block_m": 16, "block_n": 32}},
    True: {"tokens": 4, "keys": 300, "config": {"block_n": 32}, "ranges": "full"},
}


def _mutable(decode: bool, gradients: bool, kv_heads: int = 1) -> dict[str, Any]:
    shapes = {"head_dim": 64, "dtype": "float16", "rows": 2, "heads": 2 * kv_heads, "kv_heads": kv_heads}
    return {**shapes, **MUTABLE[decode], "gradients": gradients}


@pytest.mark.parametrize(("decode", "gradients", "kv_heads"), [(False, True, 1), (False, False, 2), (True, False, 1)])
def test_unmutated_kernels_pass(interpreter: InterpreterProcess, decode: bool, gradients: bool, kv_heads: int) -> None:
    interpreter.call(CASES, "check_case", **_mutable(decode, gradients, kv_heads))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(interpreter: InterpreterProcess, name: str) -> None:
    decode, *mutation = MUTATIONS[name]
    arguments = _mutable(decode, mutation[0] == "backward", 2 if name == "kv heads swapped" else 1)
    with pytest.raises(AssertionError, match=r"^(out|lse|dq|dk|dv): "):
        interpreter.call(CASES, "check_case", **arguments, mutation=tuple(mutation))


@pytest.mark.parametrize(
    "name", ["opcheck", "compile", "checkpoint", "deterministic", "nothing_to_see", "explicit_never_falls_back"]
)
def test_operator_over_the_kernels(interpreter: InterpreterProcess, name: str) -> None:
    interpreter.call(CASES, f"check_{name}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_over_several_tiles(interpreter: InterpreterProcess, head_dim: int, dtype: str) -> None:
    arguments = {"head_dim": head_dim, "tokens": 131, "keys": 203, "dtype": dtype, "kv_heads": 1}
    interpreter.call(CASES, "check_case", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "gradients"), [(1, False), (300, True)])
def test_real_picture(interpreter: InterpreterProcess, tokens: int, gradients: bool) -> None:
    arguments = {"head_dim": 64, "tokens": tokens, "keys": 2050, "dtype": "float16", "heads": 1, "kv_heads": 1}
    interpreter.call(CASES, "check_case", **arguments, ranges="ragged", gradients=gradients)
