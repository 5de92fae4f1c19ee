"""The benchmark of sub-image attention: FLOPs, the gate in front of every figure, and a small run."""

import json

import pytest
import torch

from infimm_fast.benchmarks.subimage_attention import Case, main, naive, time_one

CPU = torch.device("cpu")


def test_flops_of_infimm_hd():
    case = Case(tiles=10, tokens=1025, heads=16, head_dim=112, dtype="bf16")
    assert 64 * case.forward_flops == pytest.approx(4.8e12, rel=0.01)


@pytest.mark.parametrize("backward", (False, True))
def test_a_wrong_implementation_gets_no_figure(backward):
    case = Case(1, 33, 2, 24, "fp32")
    good = time_one("naive", naive, case, CPU, backward, 0.01)
    assert good.median_ms > 0 and good.tflops > 0 and not good.remark
    wrong = time_one("wrong", lambda q, k, v: naive(q * 1.01, k, v), case, CPU, backward, 0.01)
    assert wrong.median_ms is None and wrong.tflops is None and "FAILED the check: out" in wrong.remark


def test_a_wrong_gradient_gets_no_figure():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    wrong = time_one("wrong", lambda q, k, v: naive(q, Wrong.apply(k), v), Case(1, 33, 2, 24, "fp32"), CPU, True, 0.01)
    assert wrong.median_ms is None and "FAILED the check: dk" in wrong.remark


def test_a_refusal_is_shown_as_one():
    def refuses(q, k, v):
        raise RuntimeError("no kernel\nfor this")

    assert time_one("x", refuses, Case(1, 5, 1, 8, "fp32"), CPU, False, 0.01).remark == "does not run: no kernel"


def test_small_run(tmp_path, capsys):
    out = tmp_path / "deep" / "result.json"
    sizes = ["--tiles", "1", "--tokens", "17", "--heads", "1", "--head-dims", "16", "--dtype", "fp32", "--seconds", "0.01"]
    assert main([*sizes, "--implementations", "naive", "sdpa", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["implementation"] for row in report["results"][0]["timings"]] == ["naive", "sdpa"] * 2
    assert report["matmul_tflops"] > 0 and "sdpa" in capsys.readouterr().out
    assert [file.name for file in out.parent.iterdir()] == ["result.json"]
