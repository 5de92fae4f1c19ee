"""FLOPs and bytes against values worked out by hand, and the cases of real models."""

import pytest
import torch

from infimm_fast.benchmarks.ceilings import Ceilings
from infimm_fast.benchmarks.registry import IMPLEMENTATIONS, STAGES, Plan, load_suites
from infimm_fast.benchmarks.suites.interval_attention import all_visible
from infimm_fast.kernels.common.cases import spread
from infimm_fast.kernels.common.numerics import outlier_normal
from infimm_fast.kernels.interval.cases import make_kv_range, row_ranges
from infimm_fast.models.infimm_hd import costs

load_suites()
CPU = torch.device("cpu")
PLAN, CROSS = Plan("infimm-hd-vicuna-13b", "bfloat16", CPU), "interval_attention"
# Scores and their product with V, in 12 heads of 64; ten tiles of 1025 tokens, K and V in two bytes each.
PAIR, KV = 4 * 12 * 64, 2 * 2 * 10250 * 768
BLOCK = 2 * (2 * 5120 * 768 + 2 * 5120**2)


def find(op, name):
    (case,) = [case for case in STAGES[op].cases(PLAN) if case.name == name]
    return case


@pytest.mark.parametrize(
    ("op", "name", "flops", "moved"),
    [
        # Two products of 1025 x 1025 x 112 in 16 heads.
        ("subimage_attention", "infimm-hd-vicuna-13b, 10 tiles", 10 * 16 * 4 * 1025**2 * 112, None),
        (CROSS, "prefill 2048 tokens, 10 tiles, one picture", PAIR * 2048 * 10250, 4 * 2048 * 768 + KV),
        # Pictures of 3, 3, 2 and 2 tiles, seen by 512 tokens each.
        (CROSS, "prefill 2048 tokens, 10 tiles, 4 interleaved pictures", PAIR * 512 * 10 * 1025, 4 * 2048 * 768 + KV),
        (CROSS, "decode batch 64, 10 tiles, a picture for each", PAIR * 64 * 10250, 4 * 64 * 768 + 64 * KV),
        (CROSS, "decode batch 64, 10 tiles, one picture for all", PAIR * 64 * 10250, 4 * 64 * 768 + KV),
        # The block adds its matrices.
        ("gated_block", "decode batch 1, 10 tiles, a picture for each", BLOCK + PAIR * 10250, BLOCK + 2 * 2 * 5120 + KV),
    ],
)
def test_flops_and_bytes(op, name, flops, moved):
    case = find(op, name)
    assert case.flops == flops and moved in (None, case.bytes)


def test_the_whole_model_is_its_parts():
    (case,) = [case for case in STAGES["end_to_end"].cases(PLAN) if case.sizes["rows"] == 4]
    # K/V: 1792 -> 2 x 768 for 10 blocks, 0.56 TFLOP for ten tiles.
    key_values = 2 * 40 * 1025 * 1792 * 1536 * 10
    assert key_values == pytest.approx(4 * 0.56e12, rel=0.01)
    parts = costs.vision_flops(PLAN.config, 40) + costs.language_flops(PLAN.config, 4, 128, 0, 10250)
    assert case.sizes["tiles"] == 40 and case.flops == parts + key_values


def test_intervals_of_interleaved_pictures():
    sizes = {"rows": 2, "tokens": 8, "tiles": 5, "images": 4, "shared": 0, "tokens_per_tile": 10}
    assert row_ranges(sizes) == [(0, 20)] * 2 + [(20, 30)] * 2 + [(30, 40)] * 2 + [(40, 50)] * 2
    case = find(CROSS, "decode batch 8, 10 tiles, one picture for all")
    assert make_kv_range(case.sizes, CPU).tolist() == [[[0, 10250]]] * 8 and all_visible(case)
    case = find(CROSS, "decode batch 8, 10 tiles, a picture for each")
    assert make_kv_range(case.sizes, CPU)[:, 0, 0].tolist() == [row * 10250 for row in range(8)]


def test_the_required_cases_are_there():
    names = {case.name for case in STAGES["gated_block"].cases(PLAN)}
    assert names == {case.name for case in STAGES["interval_attention"].cases(PLAN) if not case.backward}
    kinds = [f"{tiles} tiles, {kind}" for tiles in (4, 10, 40) for kind in ("one picture", "4 interleaved pictures")]
    kinds.append("1 tile, one picture")
    assert {f"prefill {tokens} tokens, {kind}" for tokens in (128, 512, 2048) for kind in kinds} <= names
    assert {f"decode batch {rows}, 10 tiles, a picture for each" for rows in (1, 8, 64)} <= names
    assert [case.pictures for case in STAGES["end_to_end"].cases(PLAN)] == [1, 4, 16]
    assert {case.sizes["head_dim"] for case in STAGES["subimage_attention"].cases(PLAN)} == {112, 64, 72, 80}
    assert {"naive", "flex", "flex max-autotune", "sdpa cudnn", "infimm_fast"} <= set(IMPLEMENTATIONS["subimage_attention"])
    assert {"naive", "naive, K/V cached", "fused", "fused folded"} <= set(IMPLEMENTATIONS["gated_block"])


def test_names_are_unique_and_every_op_has_a_main_case():
    for op in STAGES.values():
        for plan in (PLAN, Plan("tiny", "float32", CPU), Plan("infimm-zephyr-7b", "bfloat16", CPU)):
            names = [case.name for case in op.cases(plan)]
            assert len(set(names)) == len(names), op.name
    assert {op.section for op in STAGES.values() if any(case.importance == 0 for case in op.cases(PLAN))} >= {"ops", "e2e"}


@pytest.mark.parametrize(("tiles", "counts"), [(None, [1, 2, 4, 6, 10]), ((3, 1), [1, 3])])
def test_numbers_of_tiles(tiles, counts):
    plan = Plan("infimm-hd-vicuna-13b", "bfloat16", CPU, tiles=tiles)
    assert [case.sizes["tiles"] for case in STAGES["vision_tower"].cases(plan)] == counts
    if tiles:
        assert {case.sizes["tiles"] for case in STAGES["subimage_attention"].cases(plan)} == set(counts)


def test_the_ceiling_that_binds():
    ceilings = Ceilings(matmul_tflops=800.0, copy_gb_s=3000.0)
    assert ceilings.least_ms(800 * 10**9, 1) == (pytest.approx(1.0), "matmul")
    assert ceilings.least_ms(1, 3 * 10**9) == (pytest.approx(1.0), "copy")


def test_inputs_differ_by_seed_and_have_outliers():
    one, again, other = (outlier_normal(10000, dtype=torch.float32, device=CPU, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.abs().max() > 5 and 0.9 < one.std() < 1.2
    assert spread(3, 5) == [0, 1, 2] and spread(100, 3) == [0, 49, 99]
