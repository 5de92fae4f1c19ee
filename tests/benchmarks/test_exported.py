"""The section of exported models, on a stand-in for a runtime: what is timed, and what gets no figure."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import infimm_fast.export
from infimm_fast.benchmarks.harness import Settings, run_benchmarks
from infimm_fast.benchmarks.registry import IMPLEMENTATIONS, Plan, load_suites, register_implementation
from infimm_fast.benchmarks.suites import exported
from infimm_fast.errors import ConfigurationError
from infimm_fast.export.common.errors import ArtifactError
from infimm_fast.models.infimm_hd.presets import preset

load_suites()


@dataclass
class StandIn:
    """What `infimm_fast.export.load` returns, as far as the benchmark uses it."""

    error: float = 0.0
    verified: bool = True

    config = preset("tiny")
    backend = SimpleNamespace(to_tensor=lambda value: value)

    @property
    def manifest(self):
        return SimpleNamespace(dtype="float32", verified=self.verified)

    def encode_tiles(self, pixels, grids, counts):
        assert (tuple(pixels.shape), grids.tolist(), counts.tolist()) == ((5, 3, 112, 112), [[2, 2]], [1])
        return SimpleNamespace(features=pixels.flatten(1) * (1 + self.error))

    def generate_tokens(self, ids, mask, encoded, max_new_tokens):
        assert ids.shape == mask.shape == (1, 32) and max_new_tokens == 1
        return ids[:, :1]


def run(monkeypatch, by_provider):
    monkeypatch.setattr(infimm_fast.export, "load", lambda folder, provider="cpu": by_provider[provider])
    monkeypatch.setitem(IMPLEMENTATIONS, "exported_model", dict(IMPLEMENTATIONS["exported_model"]))
    register_implementation("exported_model", "other", graph=False)(partial(exported._prepare, "other"))
    plan = Plan("tiny", "float32", torch.device("cpu"), artifacts=("a folder",))
    report = run_benchmarks(Settings(("export",), plan, 0.0))
    (case,) = report.cases
    return {row.implementation: row for row in case.rows}


def test_a_provider_is_timed_by_stages_and_compared_with_the_cpus(monkeypatch):
    rows = run(monkeypatch, {"cpu": StandIn(), "other": StandIn(error=1e-6)})
    for name in ("onnxruntime cpu", "other"):
        assert rows[name].median_ms > 0 and set(rows[name].stages) == {"encode", "first token"}
    assert rows["onnxruntime cuda"].remark == "needs a CUDA GPU"


def test_a_provider_that_errs_gets_no_figure(monkeypatch):
    rows = run(monkeypatch, {"cpu": StandIn(), "other": StandIn(error=1e-2)})
    assert rows["other"].failed and rows["other"].median_ms is None and "RMS deviation" in rows["other"].remark
    assert rows["onnxruntime cpu"].median_ms > 0


def test_an_artifact_that_was_never_verified_gets_no_figure(monkeypatch):
    rows = run(monkeypatch, {"cpu": StandIn(verified=False), "other": StandIn()})
    assert rows["onnxruntime cpu"].failed and "never verified" in rows["onnxruntime cpu"].remark


def test_what_is_no_artifact_is_one_line(monkeypatch):
    def refuse(folder, provider="cpu"):
        raise ArtifactError("a folder is no artifact")

    monkeypatch.setattr(infimm_fast.export, "load", refuse)
    plan = Plan("tiny", "float32", torch.device("cpu"), artifacts=("a folder",))
    with pytest.raises(ConfigurationError, match="a folder is no artifact"):
        run_benchmarks(Settings(("export",), plan, 0.0))
