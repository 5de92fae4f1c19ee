"""The section of exported models, on a stand-in for a runtime: what is timed, and what gets no figure."""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest

import infimm_fast.export
from infimm_fast.benchmarks.registry import register_implementation
from infimm_fast.benchmarks.suites import exported
from infimm_fast.errors import ConfigurationError
from infimm_fast.export.common.errors import ArtifactError
from infimm_fast.models.infimm_hd.presets import preset


def stand_in(error=0.0, verified=True):
    """What `infimm_fast.export.load` returns, as far as the benchmark uses it."""

    def encode_tiles(pixels, grids, counts):
        assert (tuple(pixels.shape), grids.tolist(), counts.tolist()) == ((5, 3, 112, 112), [[2, 2]], [1])
        return SimpleNamespace(features=pixels.flatten(1) * (1 + error))

    def generate_tokens(ids, mask, encoded, max_new_tokens):
        assert ids.shape == mask.shape == (1, 32) and max_new_tokens == 1
        return ids[:, :1]

    manifest, backend = SimpleNamespace(dtype="float32", verified=verified), SimpleNamespace(to_tensor=lambda value: value)
    kept = {"config": preset("tiny"), "manifest": manifest, "backend": backend}
    return SimpleNamespace(encode_tiles=encode_tiles, generate_tokens=generate_tokens, **kept)


@pytest.mark.parametrize(
    ("cpu", "other", "remarks"),
    [
        ({}, {"error": 1e-6}, ("", "")),
        ({}, {"error": 1e-2}, ("", "RMS deviation")),
        ({"verified": False}, {}, ("never verified", "never verified")),
    ],
    ids=("right", "another result", "never verified"),
)
def test_a_provider_is_timed_by_stages_and_compared_with_the_cpus(run, monkeypatch, cpu, other, remarks):
    loaded = {"cpu": stand_in(**cpu), "other": stand_in(**other)}
    monkeypatch.setattr(infimm_fast.export, "load", lambda folder, provider="cpu": loaded[provider])
    register_implementation("exported_model", "other", graph=False)(partial(exported._prepare, "other"))
    (case,) = run("export", artifacts=("a folder",)).cases
    rows = {row.implementation: row for row in case.rows}
    assert rows["onnxruntime cuda"].remark == "needs a CUDA GPU"
    for name, remark in zip(("onnxruntime cpu", "other"), remarks, strict=True):
        row = rows[name]
        if remark:
            assert row.failed and row.median_ms is None and remark in row.remark
        else:
            assert row.median_ms > 0 and set(row.stages) == {"encode", "first token"}


def test_what_is_no_artifact_is_one_line(run, monkeypatch):
    monkeypatch.setattr(infimm_fast.export, "load", mock.Mock(side_effect=ArtifactError("a folder is no artifact")))
    with pytest.raises(ConfigurationError, match="a folder is no artifact"):
        run("export", artifacts=("a folder",))
