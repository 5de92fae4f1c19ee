"""FLOPs and bytes against values worked out by hand, and the cases of real models."""

import pytest
import torch

from infimm_fast.benchmarks import cases
from infimm_fast.benchmarks.ceilings import Ceilings
from infimm_fast.benchmarks.registry import IMPLEMENTATIONS, STAGES, Plan, load_suites
from infimm_fast.benchmarks.suites.interval_attention import all_visible
from infimm_fast.kernels.common.cases import spread
from infimm_fast.kernels.common.numerics import outlier_normal
from infimm_fast.kernels.interval.cases import make_kv_range, row_ranges
from infimm_fast.models.infimm_hd.presets import preset

load_suites()
CPU = torch.device("cpu")
PLAN = Plan("infimm-hd-vicuna-13b", "bfloat16", CPU)


def find(op, name):
    (case,) = [case for case in STAGES[op].cases(PLAN) if case.name == name]
    return case


def test_the_tower_of_infimm_hd_on_ten_tiles():
    # 64 layers, 1025 tokens, width 1792: 4 C^2 + 2 C 15360 weights.
    linear = 2 * 64 * 10250 * (4 * 1792**2 + 2 * 1792 * 15360)
    assert linear == pytest.approx(89.1e12, rel=1e-3)
    # Two products of 1025 x 1025 x 112 in 16 heads.
    attention = 64 * 10 * 16 * 4 * 1025**2 * 112
    assert attention == pytest.approx(4.82e12, rel=1e-3)
    patches = 2 * 10 * 1024 * 3 * 14 * 14 * 1792
    config = preset("infimm-hd-vicuna-13b")
    config.vision_feature_layer = -1
    assert cases.vision_flops(config, 10) == patches + linear + attention
    one_layer = find("subimage_attention", "infimm-hd-vicuna-13b, 10 tiles")
    assert 64 * one_layer.flops == attention


def test_the_paper_sees_the_penultimate_layer():
    config = preset("infimm-hd-vicuna-13b")
    embedding = 2 * 10 * 1024 * 3 * 14 * 14 * 1792
    expected = embedding + (89.08e12 + 4.82e12) * 63 / 64
    assert cases.vision_flops(config, 10) == pytest.approx(expected, rel=1e-3)
    assert cases.vision_bytes(config, "bfloat16", 10) == pytest.approx(63 * 67.9e6 * 2 + 6.0e6 * 2 + 18.4e6 * 2, rel=1e-3)


def test_the_whole_model_is_its_parts():
    config = preset("infimm-hd-vicuna-13b")
    (case,) = [case for case in STAGES["end_to_end"].cases(PLAN) if case.sizes["rows"] == 4]
    # K/V: 1792 -> 2 x 768 for 10 blocks, 0.56 TFLOP for ten tiles.
    key_values = 2 * 40 * 1025 * 1792 * 1536 * 10
    assert key_values == pytest.approx(4 * 0.56e12, rel=0.01)
    parts = cases.vision_flops(config, 40) + cases.language_flops(config, 4, 128, 0, 10250)
    assert case.sizes["tiles"] == 40 and case.flops == parts + key_values


def test_one_decoding_step_reads_the_weights_the_cache_and_the_pictures():
    config = preset("infimm-hd-vicuna-13b")
    # Without the embedding table: 40 layers of 317 million, the head, 10 gated blocks of 60 million.
    layers = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    gated = 10 * (2 * 5120 * 768 + 2 * 5120**2)
    visual = 10 * 2 * 768 * 10250
    cache = 40 * 2 * 5120 * 129
    expected = 2 * (layers + 5120 * 32002 + gated + visual + cache)
    assert cases.language_bytes(config, "bfloat16", 1, 1, 128, 10250) == expected
    assert 2 * layers == pytest.approx(25.4e9, rel=0.01) and 2 * gated == pytest.approx(1.2e9, rel=0.01)
    assert 2 * visual == pytest.approx(315e6, rel=0.01)
    linear = 2 * (layers + gated + 5120 * 32002)
    attention = 40 * 4 * 5120 * 129 + 10 * 4 * 768 * 10250
    assert cases.language_flops(config, 1, 1, 128, 10250) == linear + attention


def test_a_prompt_counts_causal_pairs_and_one_head():
    config = preset("infimm-hd-vicuna-13b")
    layers = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    gated = 10 * (2 * 5120 * 768 + 2 * 5120**2)
    pairs = 3 * 128 * 129 // 2
    expected = 2 * 3 * 128 * (layers + gated) + 40 * 4 * 5120 * pairs + 10 * 4 * 768 * 3 * 128 * 1025 + 2 * 3 * 5120 * 32002
    assert cases.language_flops(config, 3, 128, 0, 1025) == expected


def test_cross_attention_counts_what_is_visible():
    one = find("interval_attention", "prefill 2048 tokens, 10 tiles, one picture")
    assert one.flops == 4 * 12 * 64 * 2048 * 10250
    assert one.bytes == 2 * (2 * 2048 * 768 + 2 * 10250 * 768)
    many = find("interval_attention", "prefill 2048 tokens, 10 tiles, 4 interleaved pictures")
    # Pictures of 3, 3, 2 and 2 tiles, seen by 512 tokens each.
    assert many.flops == 4 * 12 * 64 * 512 * (3 + 3 + 2 + 2) * 1025 and many.bytes == one.bytes
    own = find("interval_attention", "decode batch 64, 10 tiles, a picture for each")
    shared = find("interval_attention", "decode batch 64, 10 tiles, one picture for all")
    assert own.flops == shared.flops == 4 * 12 * 64 * 64 * 10250
    assert own.bytes == 2 * (2 * 64 * 768 + 64 * 2 * 10250 * 768)
    assert shared.bytes == 2 * (2 * 64 * 768 + 2 * 10250 * 768)


def test_the_gated_block_adds_its_matrices():
    case = find("gated_block", "decode batch 1, 10 tiles, a picture for each")
    weights = 2 * 5120 * 768 + 2 * 5120**2
    assert case.flops == 2 * weights + 4 * 12 * 64 * 10250
    assert case.bytes == 2 * (weights + 2 * 5120 + 2 * 10250 * 768)


def test_intervals_of_interleaved_pictures():
    sizes = {"rows": 2, "tokens": 8, "tiles": 5, "images": 4, "shared": 0, "tokens_per_tile": 10}
    assert row_ranges(sizes) == [(0, 20)] * 2 + [(20, 30)] * 2 + [(30, 40)] * 2 + [(40, 50)] * 2
    case = find("interval_attention", "decode batch 8, 10 tiles, one picture for all")
    assert make_kv_range(case.sizes, CPU).tolist() == [[[0, 10250]]] * 8 and all_visible(case)
    case = find("interval_attention", "decode batch 8, 10 tiles, a picture for each")
    assert make_kv_range(case.sizes, CPU)[:, 0, 0].tolist() == [row * 10250 for row in range(8)]


def test_the_required_cases_are_there():
    names = {case.name for case in STAGES["gated_block"].cases(PLAN)}
    assert names == {case.name for case in STAGES["interval_attention"].cases(PLAN) if not case.backward}
    for tokens in (128, 512, 2048):
        assert f"prefill {tokens} tokens, 1 tile, one picture" in names
        for tiles in (4, 10, 40):
            for kind in ("one picture", "4 interleaved pictures"):
                assert f"prefill {tokens} tokens, {tiles} tiles, {kind}" in names
    assert {f"decode batch {rows}, 10 tiles, a picture for each" for rows in (1, 8, 64)} <= names
    assert [case.sizes["tiles"] for case in STAGES["vision_tower"].cases(PLAN)] == [1, 2, 4, 6, 10]
    assert [case.pictures for case in STAGES["end_to_end"].cases(PLAN)] == [1, 4, 16]
    assert {case.sizes["head_dim"] for case in STAGES["subimage_attention"].cases(PLAN)} == {112, 64, 72, 80}


def test_names_are_unique_and_every_op_has_a_main_case():
    for op in STAGES.values():
        for plan in (PLAN, Plan("tiny", "float32", CPU), Plan("infimm-zephyr-7b", "bfloat16", CPU)):
            names = [case.name for case in op.cases(plan)]
            assert len(set(names)) == len(names), op.name
    assert {op.section for op in STAGES.values() if any(case.importance == 0 for case in op.cases(PLAN))} >= {"ops", "e2e"}
    assert {"naive", "flex", "flex max-autotune", "sdpa cudnn", "infimm_fast"} <= set(IMPLEMENTATIONS["subimage_attention"])
    assert {"naive", "naive, K/V cached", "fused", "fused folded"} <= set(IMPLEMENTATIONS["gated_block"])


def test_asked_for_tiles_alone():
    plan = Plan("infimm-hd-vicuna-13b", "bfloat16", CPU, tiles=(3, 1))
    assert [case.sizes["tiles"] for case in STAGES["vision_tower"].cases(plan)] == [1, 3]
    assert {case.sizes["tiles"] for case in STAGES["subimage_attention"].cases(plan)} == {1, 3}


def test_the_ceiling_that_binds():
    ceilings = Ceilings(matmul_tflops=800.0, copy_gb_s=3000.0)
    assert ceilings.least_ms(800 * 10**9, 1) == (pytest.approx(1.0), "matmul")
    assert ceilings.least_ms(1, 3 * 10**9) == (pytest.approx(1.0), "copy")


def test_inputs_differ_by_seed_and_have_outliers():
    one, again, other = (outlier_normal(10000, dtype=torch.float32, device=CPU, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.abs().max() > 5 and 0.9 < one.std() < 1.2
    assert spread(3, 5) == [0, 1, 2] and spread(100, 3) == [0, 49, 99]
