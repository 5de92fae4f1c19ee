"""The Triton kernels of gated cross-attention, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infimm_fast.kernels.subimage.config import HEAD_DIMS
from interpreter import InterpreterProcess

pytest.importorskip("triton", reason="needs triton")

CASES = Path(__file__).with_name("interval_attention_cases.py")
SMALL = {"block_m": 16, "block_n": 32}


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
@pytest.mark.parametrize("rows", [1, 3])
def test_decode_of_uneven_rows(interpreter: InterpreterProcess, rows: int, tokens: int) -> None:
    arguments = {"head_dim": 64, "keys": 280, "dtype": "float32", "heads": 1, "kv_heads": 1, "gradients": False}
    config = {"block_m": 16, "block_n": 16}  # two splits and more
    interpreter.call(CASES, "check_case", rows=rows, tokens=tokens, ranges="ragged", config=config, **arguments)


@pytest.mark.parametrize("ranges", ["grouped", "shared", "alone", "empty", "random"])
@pytest.mark.parametrize(("rows", "tokens", "heads"), [(20, 1, 1), (7, 2, 3), (2, 8, 4)], ids=str)
def test_decode_folds_rows(interpreter: InterpreterProcess, rows: int, tokens: int, heads: int, ranges: str) -> None:
    """More equal rows than a tile holds; tiles that end within a row; rows that need more than one tile."""
    arguments = {"head_dim": 64, "keys": 300, "dtype": "float16", "kv_heads": 1, "gradients": False}
    shapes = {"rows": rows, "tokens": tokens, "heads": heads}
    interpreter.call(CASES, "check_case", ranges=ranges, config={"block_m": 16, "block_n": 16}, **shapes, **arguments)


@pytest.mark.parametrize("layout", ["blocks", "offset", "columns"])
def test_decode_reads_views_in_place(interpreter: InterpreterProcess, layout: str) -> None:
    arguments = {"head_dim": 72, "keys": 300, "dtype": "float16", "rows": 5, "heads": 4, "gradients": False}
    config = {"block_m": 16, "block_n": 16}
    interpreter.call(CASES, "check_case", tokens=2, ranges="grouped", layout=layout, config=config, **arguments)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.slow)])
def test_decode_of_one_image_shared_by_64_rows(interpreter: InterpreterProcess, dtype: str) -> None:
    arguments = {"head_dim": 64, "keys": 1100, "rows": 64, "heads": 1, "kv_heads": 1, "gradients": False}
    interpreter.call(CASES, "check_case", tokens=1, ranges="shared", dtype=dtype, **arguments)


@pytest.mark.slow
def test_decode_plans_large_batches_in_chunks(interpreter: InterpreterProcess) -> None:
    arguments = {"head_dim": 64, "keys": 260, "dtype": "float16", "heads": 1, "kv_heads": 1, "gradients": False}
    config = {"block_m": 16, "block_n": 16}
    interpreter.call(CASES, "check_case", rows=260, tokens=1, ranges="grouped", config=config, **arguments)


@pytest.mark.parametrize("ranges", ["grouped", "shared", "alone", "empty", "random", "ragged"])
@pytest.mark.parametrize(("rows", "tokens", "group"), [(64, 1, 1), (64, 2, 3), (5, 8, 8)])
def test_plan(interpreter: InterpreterProcess, rows: int, tokens: int, group: int, ranges: str) -> None:
    interpreter.call(CASES, "check_plan", rows=rows, tokens=tokens, group=group, ranges=ranges)


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


GROUPING = """        same = (high[:, None] == other_high[None, :]) & same_low
        less = (other_high[None, :] < high[:, None]) & same_low | (other_low[None, :] < low[:, None])
"""
# Both keep the order and the groups consistent: else tiles read rows that do not exist.
BY_START = """        same = same_low
        less = other_low[None, :] < low[:, None]
"""
BY_END = """        same = high[:, None] == other_high[None, :]
        less = other_high[None, :] < high[:, None]
"""
# (file, text, replacement), and where it is seen: in a prompt of 20 tokens, or in decode.
MUTATIONS: dict[str, tuple[str, str, str, str]] = {
    "wrong scale": ("prompt", "tiles", "scale_log2 = scale * LOG2_E", "scale_log2 = scale * LOG2_E * 1.02"),
    "interval dropped": ("prompt", "tiles", "(key - start).to(tl.uint32) < count.to(tl.uint32)",
                         "(key == key) & (count == count)"),
    "start one early": ("prompt", "tiles", "start = tl.load(p_start, mask=inside, other=0)",
                        "start = tl.load(p_start, mask=inside, other=0) - 1"),
    "start one late": ("prompt", "tiles", "start = tl.load(p_start, mask=inside, other=0)",
                       "start = tl.load(p_start, mask=inside, other=0) + 1"),
    "end one early": ("prompt", "tiles", "end = tl.load(p_start + stride_re, mask=inside, other=0)",
                      "end = tl.load(p_start + stride_re, mask=inside, other=0) - 1"),
    "end one late": ("prompt", "tiles", "end = tl.load(p_start + stride_re, mask=inside, other=0)",
                     "end = tl.load(p_start + stride_re, mask=inside, other=0) + 1"),
    "hull ends early": ("prompt", "tiles", "tl.where(count > 0, start + count, 0)",
                        "tl.where(count > 0, start + count - 1, 0)"),
    "kv heads swapped": ("prompt", "forward", "k_ptr, v_ptr, batch * 0, kv_head,",
                         "k_ptr, v_ptr, batch * 0, num_kv_heads - 1 - kv_head,"),
    "heads of a group swapped": ("prompt", "forward", "store_rows(out_ptr, out, query_offsets(token, member,",
                                 "store_rows(out_ptr, out, query_offsets(token, (member + 1) % T.GROUP,"),
    "accumulator not rescaled": ("prompt", "common/tiles", "scale_tile(acc, alpha[:, None])", "acc"),
    "log-sum-exp in base 2": ("prompt", "tiles", "(m + tl.log2(total)) * LN_2", "m + tl.log2(total)"),
    "split dropped": ("decode", "decode", "last_key = tl.minimum(first_key + share, high)",
                      "last_key = tl.minimum(first_key + share * (split > 0), high)"),
    "splits overlap": ("decode", "decode", "first_key = low + split * share", "first_key = low + split * (share - 1)"),
    "splits weighed alike": ("decode", "decode", "    total = tl.sum(weights, axis=0)\n",
                             "    weights = weights * 0 + 1\n    total = tl.sum(weights, axis=0)\n"),
    "splits nobody wrote": ("decode", "decode", "written = split < splits", "written = split < MAX_SPLITS"),
    "grouped by start only": ("decode", "decode", GROUPING, BY_START),
    "grouped by end only": ("decode", "decode", GROUPING, BY_END),
    "hull of the first token only": ("decode", "decode", "exists[None, :] & (token < num_tokens)",
                                     "exists[None, :] & (token < 1)"),
    "wrong member": ("decode", "decode", "first + row // rows_per_batch", "first + row // rows_per_batch // 2"),
    "wrong row of the batch": ("decode", "decode", "token = row % rows_per_batch // T.GROUP", "token = row // T.GROUP % 2"),
    "wrong head of the group": ("decode", "decode", "+ head.to(tl.int64) * stride_qh",
                                "+ (head ^ 1).to(tl.int64) * stride_qh"),
    "tiles counted by batch rows": ("decode", "decode", "tl.cdiv(size * num_tokens * group_size, BLOCK_M)",
                                    "tl.cdiv(size, BLOCK_M)"),
    "delta left out of dk": ("prompt", "backward", " - delta[None, :]", ""),
    "delta left out of dq": ("prompt", "backward", " - delta[:, None]", ""),
    "dk not scaled": ("prompt", "backward", "scale_tile(dk, scale)", "dk"),
    "dq not scaled": ("prompt", "backward", "    dq = scale_tile(dq, scale)\n", ""),
    "last row not added": ("prompt", "backward", "in range(0, num_batches)", "in range(0, num_batches - 1)"),
    "first touching token dropped": ("prompt", "backward", "tl.where(touches, token, num_tokens)",
                                     "tl.where(touches, token + 1, num_tokens)"),
    "last touching tokens dropped": ("prompt", "backward", "tl.where(touches, token + 1, 0)",
                                     "tl.where(touches, token // 2, 0)"),
    "gradients swapped": ("prompt", "backward", "return add_product(dk, ds, q), dv",
                          "return dv, add_product(dk, ds, q)"),
}  # fmt: skip
MUTABLE: dict[str, dict[str, Any]] = {
    "prompt": {"tokens": 13, "keys": 45, "rows": 2, "config": {"block_m": 16, "block_n": 32}},
    "decode": {"tokens": 3, "keys": 270, "rows": 11, "ranges": "grouped", "config": {"block_m": 16, "block_n": 16}},
}


def _mutable(where: str, gradients: bool, kv_heads: int = 1) -> dict[str, Any]:
    shapes = {"head_dim": 64, "dtype": "float16", "heads": 2 * kv_heads, "kv_heads": kv_heads}
    return {**shapes, **MUTABLE[where], "gradients": gradients}


@pytest.mark.parametrize(
    ("where", "gradients", "kv_heads"), [("prompt", True, 1), ("prompt", False, 2), ("decode", False, 1)]
)
def test_unmutated_kernels_pass(interpreter: InterpreterProcess, where: str, gradients: bool, kv_heads: int) -> None:
    interpreter.call(CASES, "check_case", **_mutable(where, gradients, kv_heads))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(interpreter: InterpreterProcess, name: str) -> None:
    where, *mutation = MUTATIONS[name]
    arguments = _mutable(where, mutation[0] == "backward", 2 if name == "kv heads swapped" else 1)
    with pytest.raises(AssertionError, match=r"^(out|lse|dq|dk|dv): "):
        interpreter.call(CASES, "check_case", **arguments, mutation=tuple(mutation))


@pytest.mark.parametrize(
    "name",
    [
        "opcheck",
        "compile",
        "checkpoint",
        "deterministic",
        "decode_deterministic",
        "nothing_to_see",
        "explicit_never_falls_back",
    ],
)
def test_operator_over_the_kernels(interpreter: InterpreterProcess, name: str) -> None:
    interpreter.call(CASES, f"check_{name}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [*((head_dim, "float16") for head_dim in HEAD_DIMS), (72, "float32"), (112, "float32")]
)
def test_every_head_dim_over_several_tiles(interpreter: InterpreterProcess, head_dim: int, dtype: str) -> None:
    arguments = {"head_dim": head_dim, "tokens": 131, "keys": 203, "dtype": dtype, "kv_heads": 1}
    interpreter.call(CASES, "check_case", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "gradients"), [(1, False), (300, True)])
def test_real_picture(interpreter: InterpreterProcess, tokens: int, gradients: bool) -> None:
    arguments = {"head_dim": 64, "tokens": tokens, "keys": 2050, "dtype": "float16", "heads": 1, "kv_heads": 1}
    interpreter.call(CASES, "check_case", **arguments, ranges="ragged", gradients=gradients)
