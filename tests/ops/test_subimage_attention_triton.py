"""The Triton kernels of sub-image attention, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infimm_fast.kernels.subimage.config import HEAD_DIMS
from interpreter import InterpreterProcess

pytest.importorskip("triton", reason="needs triton")

CASES = Path(__file__).with_name("subimage_attention_cases.py")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(interpreter: InterpreterProcess, head_dim: int, dtype: str) -> None:
    # 65 tokens: one full block of keys and the peeled class token.
    interpreter.call(CASES, "check_case", head_dim=head_dim, tokens=65, dtype=dtype, tiles=1)


@pytest.mark.parametrize("head_dim", [8, 24, 56, 120])
def test_head_dims_between(interpreter: InterpreterProcess, head_dim: int) -> None:
    interpreter.call(CASES, "check_case", head_dim=head_dim, tokens=20, dtype="float16", tiles=1)


@pytest.mark.parametrize("tokens", [1, 2, 17, 63, 64, 66])
def test_odd_lengths(interpreter: InterpreterProcess, tokens: int) -> None:
    interpreter.call(CASES, "check_case", head_dim=72, tokens=tokens, dtype="float16", tiles=1)


@pytest.mark.parametrize("cover", [(128,), (64, 32), (64, 16, 16)], ids=str)
@pytest.mark.parametrize("peel", [False, True])
@pytest.mark.parametrize("tokens", [1, 65, 83])
def test_cover_and_peel_are_free_choices(
    interpreter: InterpreterProcess, cover: tuple[int, ...], peel: bool, tokens: int
) -> None:
    config = {"cover": cover, "peel": peel, "block_m": 32, "block_n": 32}
    interpreter.call(CASES, "check_case", head_dim=88, tokens=tokens, dtype="float32", tiles=1, heads=1, config=config)


@pytest.mark.parametrize("layout", ["apart", "heads_first", "offset", "broad", "strided"])
def test_views_are_read_in_place(interpreter: InterpreterProcess, layout: str) -> None:
    interpreter.call(CASES, "check_case", head_dim=72, tokens=33, dtype="float16", layout=layout)


@pytest.mark.parametrize("head_dim", [72, 112])
@pytest.mark.parametrize("rope", ["interleaved", "halves"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rope(interpreter: InterpreterProcess, head_dim: int, rope: str, prefix: int) -> None:
    interpreter.call(CASES, "check_case", head_dim=head_dim, tokens=33, dtype="float16", tiles=1, rope=rope, prefix=prefix)


@pytest.mark.parametrize(
    "case",
    [
        {"lengths": [70, 33, 1, 0]},
        {"lengths": [64, 65], "config": {"peel": True}},
        {"lengths": [0, 70], "config": {"peel": True}, "rope": "interleaved"},
        {"lengths": [90, -3]},
        {"lengths": [70, 33], "causal": True},
        {"offsets": [0, 20, 20, 70]},
        {"offsets": [0, 1, 70], "config": {"peel": True}},
        {"offsets": [0, 40, 70], "max_seqlen": 40, "rope": "halves", "prefix": 0},
        {"offsets": [3, 30, 60], "causal": True},
        {"causal": True},
        {"causal": True, "config": {"peel": True, "block_m": 16, "block_n": 32}},
    ],
    ids=str,
)
def test_lengths_and_causality(interpreter: InterpreterProcess, case: dict[str, Any]) -> None:
    tiles = len(case["lengths"]) if "lengths" in case else 1
    interpreter.call(CASES, "check_case", head_dim=72, tokens=70, dtype="float16", heads=1, tiles=tiles, **case)


# Each entry breaks one kernel in one place; the same assertion as above must notice. 65 tokens are peeled, 70 have a
# tail.
MUTATIONS = {
    "wrong scale": (65, "forward", "scale_log2 = scale * LOG2_E", "scale_log2 = scale"),
    "scale of the padded head dim": (70, "forward", "scale_log2 = scale * LOG2_E",
                                     "scale_log2 = LOG2_E * 0.08838834764"),
    "swapped head": (65, "forward", "k_ptr, v_ptr, batch, head, first,", "k_ptr, v_ptr, batch, 1 - head, first,"),
    "dropped prefix key": (65, "forward", "total = tl.full([T.BLOCK_M], 1.0,", "total = tl.full([T.BLOCK_M], 0.0,"),
    "first query sees one key": (65, "forward", "if T.CAUSAL else length\n", "\n        end = tl.minimum(length, 1)\n"),
    "dropped tail": (70, "forward", "in range(T.PEEL, key_end, T.BLOCK_N)",
                     "in range(T.PEEL, key_end - T.BLOCK_N, T.BLOCK_N)"),
    "padding seen": (70, "forward", "visible = key_index < length", "visible = key_index < length + 1"),
    "accumulator not rescaled": (70, "common/tiles", "scale_tile(acc, alpha[:, None])", "acc"),
    "log-sum-exp in base 2": (70, "forward", "lse = tl.where(query_index < length, (m + tl.log2(total)) * LN_2",
                              "lse = tl.where(query_index < length, (m + tl.log2(total))"),
    "last rows not written": (70, "forward", "store_tile(out_ptr, acc, o_out, stored - row,",
                              "store_tile(out_ptr, acc, o_out, stored - row - 1,"),
    "delta left out of dk": (65, "backward_kernels", " - delta[None, :]", ""),
    "delta left out of dq": (65, "backward_kernels", " - delta[:, None]", ""),
    "dk not scaled": (70, "backward_kernels", "        dk = scale_tile(dk, scale)\n", ""),
    "dropped first query": (65, "backward_kernels", "dv = outer_product(p_first, grad_first)",
                            "dv = zero_tile(T.BLOCK_N, T)"),
    "dropped first key": (65, "backward_kernels", "dq = outer_product(ds_first, k_first)",
                          "dq = zero_tile(T.BLOCK_M, T)"),
    "dropped tail of queries": (70, "backward_kernels", "in range(query_start, query_end, T.BLOCK_M)",
                                "in range(query_start, query_end - T.BLOCK_M, T.BLOCK_M)"),
    "dropped tail of keys": (70, "backward_kernels", "in range(T.PEEL, key_end, T.BLOCK_N)",
                             "in range(T.PEEL, key_end - T.BLOCK_N, T.BLOCK_N)"),
    "gradients swapped": (65, "backward_kernels", "return add_product(dk, ds, q), dv",
                          "return dv, add_product(dk, ds, q)"),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [65, 70])
def test_unmutated_kernels_pass(interpreter: InterpreterProcess, tokens: int) -> None:
    interpreter.call(CASES, "check_case", head_dim=112, tokens=tokens, dtype="float16", tiles=1, heads=1)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(interpreter: InterpreterProcess, name: str) -> None:
    tokens, *mutation = MUTATIONS[name]
    heads = 2 if name == "swapped head" else 1
    arguments = {"head_dim": 112, "tokens": tokens, "dtype": "float16", "tiles": 1, "heads": heads}
    with pytest.raises(AssertionError, match=r"^(out|lse|dq|dk|dv): "):
        interpreter.call(CASES, "check_case", **arguments, mutation=tuple(mutation))


@pytest.mark.parametrize("name", ["opcheck", "compile", "checkpoint", "deterministic", "explicit_never_falls_back"])
def test_operators_over_the_kernels(interpreter: InterpreterProcess, name: str) -> None:
    interpreter.call(CASES, f"check_{name}")


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "tokens"), [(112, 257), (72, 729), (80, 577), (112, 1025)])
def test_real_lengths(interpreter: InterpreterProcess, head_dim: int, tokens: int) -> None:
    interpreter.call(CASES, "check_case", head_dim=head_dim, tokens=tokens, dtype="float16", tiles=1, heads=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_with_a_tail_and_rope(interpreter: InterpreterProcess, head_dim: int, dtype: str) -> None:
    rope = "interleaved" if head_dim % 16 else "halves"
    interpreter.call(CASES, "check_case", head_dim=head_dim, tokens=130, dtype=dtype, heads=1, rope=rope)
