"""The GPU benchmarks and GPU tests on a pretended GPU: everything but the numbers.

What fails here would fail on the first GPU: a tensor left on the CPU, a renamed input, shapes that do not fit, a captured
run that makes the host wait, more memory than there is.
"""

import contextlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from infimm_fast.benchmarks import SECTIONS, document, harness, registry, timing
from infimm_fast.benchmarks.ceilings import Ceilings
from infimm_fast.benchmarks.registry import IMPLEMENTATIONS, STAGES, Implementation
from infimm_fast.benchmarks.report import Report
from infimm_fast.benchmarks.run import GPU_PRESET, make_plan, run_and_store
from infimm_fast.benchmarks.suites import end_to_end, interval_attention, language, model
from infimm_fast.benchmarks.suites.attention import naive
from infimm_fast.models.infimm_hd.image_processing_infimm_hd import InfiMMHDImageProcessor
from infimm_fast.models.infimm_hd.presets import preset
from interpreter import load_file

HERE = Path(__file__).parent
DRY = load_file(HERE / "dry_cuda.py")
SHARES = (("ops",), ("cross",), ("vision", "prefill", "decode"), ("preprocess", "e2e"))
# Mistral's cache has a sliding window, and its tower RoPE and a resampler behind it.
ZEPHYR = "infimm-zephyr-7b"
# Why a peer may have no figure.
REASONS = ("on the main cases only", "has no mask", "not installed: No module named 'liger_kernel'")
CACHES = (model.load_model, model._slice_model, model._slice_references, model._check_ops, model._check_slice)


def from_the_host(case, inputs):
    return lambda: naive(*inputs["qkv"].unbind(2)) * torch.ones(112, dtype=case.torch_dtype).to("cuda")


# What an implementation makes of the case and its inputs, on the backward pass or not; the remark, and how often it waits.
MISTAKES = [
    (from_the_host, False, "CaptureError: aten._to_copy.default while a graph is captured, at test_dry_run.py", 4),
    (lambda case, inputs: lambda: inputs["q"] * torch.ones(112), False, "expected all tensors to be on the same device", 0),
    (lambda case, inputs: lambda: inputs["query"], False, "KeyError: 'query'", 0),
    (lambda case, inputs: lambda: inputs["q"].transpose(1, 2), False, "FAILED the check: out: ", 0),
    # Views that were made before the capture.
    (lambda case, inputs: partial(math.prod, inputs["qkv"].unbind(2)), True, "CaptureError: the backward pass of", 0),
]


def shallow_preset(name):
    """Return a preset with few layers and one gated block."""
    config = preset(name)
    # Every layer is the same work for the host.
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = 1, 2
    config.cross_attention_every_n_layers, config.vision_feature_layer = 2, -1
    return config


@pytest.fixture
def dry(monkeypatch):
    """Pretend that there is a GPU, and let the benchmarks compare shapes in place of numbers.

    Models have few layers, batches two rows at most, and prompts one of two lengths.
    """
    process, processed = InfiMMHDImageProcessor.__call__, {}

    def process_once(processor, pictures, *args, **kwargs):
        """Pictures take seconds, and their values no part."""
        if len(pictures) not in processed:
            processed[len(pictures)] = process(processor, pictures, *args, **kwargs)
        return processed[len(pictures)]

    def prepare(stage, case, implementation, inputs):
        """The run notes when it makes the host wait."""
        prepared = registry.prepare(stage, case, implementation, inputs)
        timed = mock.patch.object(device, "timing", f"{stage.name}, {case.name}: {implementation.name}")
        return replace(prepared, run=timed(prepared.run))

    registry.load_suites()
    changes = [
        *((module, "assert_error_budget", DRY.compare_shapes) for module in (registry, model)),
        # Unknown scalars read as 1.
        (model, "DEVIATIONS", dict.fromkeys(model.DEVIATIONS, 1.0)),
        *((timing, name, value) for name, value in (("WARM_UPS", 0), ("MIN_SAMPLES", 1), ("MAX_INPUT_SETS", 2))),
        (InfiMMHDImageProcessor, "__call__", process_once),
        (end_to_end, "load_image", cache(end_to_end.load_image)),
        (harness, "prepare", prepare),
        *((module, "preset", shallow_preset) for module in (registry, model, end_to_end)),
        *((module, "_BATCHES", (1, 2)) for module in (end_to_end, language)),
        (interval_attention, "PREFILL_TOKENS", (128, 2048)),
    ]
    for change in changes:
        monkeypatch.setattr(*change)
    with DRY.dry_cuda() as device, contextlib.ExitStack() as stack:
        for cached in CACHES:
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield device


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sections"),
    [*((GPU_PRESET, sections) for sections in SHARES), (ZEPHYR, ("prefill",))],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_plan_of_a_gpu(dry, tmp_path, name, sections):
    """The real plan, at the real widths: inputs, references, runs, stages, graphs, report, tables, pictures and page."""
    pytest.importorskip("matplotlib")
    plan, against = make_plan(name), ("sdpa",) if name == ZEPHYR else None
    assert run_and_store(harness.Settings(sections, plan, 0.0, against=against), tmp_path, plot=True) == 0
    (file,) = tmp_path.glob("*.json")
    report = Report.load(file)
    expected = {(op.name, case.name) for op in STAGES.values() if op.section in sections for case in op.cases(plan)}
    assert {(case.op, case.case) for case in report.cases} == expected and not report.left_out
    # Every implementation ran, and every one that can be captured was.
    for case in report.cases:
        for row in case.rows:
            where = f"{case.op}, {case.case}, {row.implementation}, {row.mode}: {row.remark}"
            assert not row.failed and not (row.ours and row.remark), where
            assert row.median_ms is not None or any(reason in row.remark for reason in REASONS), where
        timed = {row.implementation for row in case.rows if row.median_ms is not None}
        captured = {row.implementation for row in case.rows if row.mode == "graph"}
        capturable = {one for one in timed if IMPLEMENTATIONS[case.op][one].graph and not STAGES[case.op].wall_clock}
        assert captured == capturable, f"{case.op}, {case.case}"
    # The host's clock times what the host does; the plain statement of cross-attention reads its intervals.
    waits = [wait for wait in dry.waits if not wait[0].startswith(("preprocess", "end_to_end"))]
    assert not [wait for wait in waits if ": naive" not in wait[0]]
    assert len(dry.launches) > 10 * ("preprocess" not in sections)
    assert list(tmp_path.glob("*.png")) and DRY.NAME in document.render({"dry": report})


def test_every_section_is_run():
    # Exported models run on runtimes of their own.
    assert {section for share in SHARES for section in share} == set(SECTIONS) - {"export"}


def test_a_step_from_a_cache_with_a_window_is_the_same_every_time():
    registry.load_suites()
    op, plan = STAGES["decode_step"], make_plan("tiny-zephyr", device="cpu")
    case = op.cases(plan)[0]
    inputs = op.make_inputs(case, plan.device, seed=0)
    run = registry.prepare(op, case, IMPLEMENTATIONS[op.name]["sdpa"], inputs).run
    assert inputs["model"].config.text_config.sliding_window and torch.equal(run(), run())


def remarks(backward, *ones, **settings):
    """Return what is said of implementations of attention on its first case."""
    op, plan = STAGES["subimage_attention"], make_plan(**settings)
    case = next(case for case in op.cases(plan) if case.backward == backward)
    return [row.remark for row in harness.run_case(op, case, ones, timing.Timer(plan.device, 0.0), Ceilings(1.0, 1.0)).rows]


@pytest.mark.parametrize(("prepare", "backward", "remark", "waits"), MISTAKES)
def test_mistakes_are_found(dry, prepare, backward, remark, waits):
    assert remark in remarks(backward, Implementation("one", prepare, ours=True), tiles=(1,))[-1]
    assert len(dry.waits) == waits


def test_memory_that_is_not_there_is_found(dry):
    dry.memory, known = 2**30, IMPLEMENTATIONS["subimage_attention"]
    expected = {"does not run: out of memory for inputs and reference"}
    assert set(remarks(True, known["naive"], known["infimm_fast"])) == expected


@pytest.mark.slow
def test_the_tests_that_need_a_gpu():
    """They run up to their comparisons; which of them do is the choice below, of every kind some."""
    files = [f"ops/test_{op}_gpu.py" for op in ("interval_attention", "gated_residual", "subimage_attention")]
    files += ["model/test_perceiver.py", "integrations/test_cross_attention.py", "export/test_kernels.py"]
    chosen = "graph or beyond or real_sizes or entries or flags or packed or (views and 100) or nothing_to_see"
    command = [sys.executable, "-m", "pytest", "-p", "dry_cuda", "-q", "-m", "gpu", "-k", chosen]
    command += [str(HERE.parent / file) for file in files]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " skipped" not in done.stdout and int(done.stdout.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1]) > 40
