"""Runs the benchmarks on `dry_cuda`'s device: everything that surrounds the numbers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from infimm_fast.benchmarks import harness, registry, timing
from infimm_fast.benchmarks.registry import BenchCase, Implementation, Prepared, Stage
from infimm_fast.benchmarks.suites import end_to_end, interval_attention, language, model
from infimm_fast.kernels.common.cases import Inputs
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.image_processing_infimm_hd import InfiMMHDImageProcessor
from infimm_fast.models.infimm_hd.presets import preset
from interpreter import load_file

DRY = load_file(Path(__file__).with_name("dry_cuda.py"))
_CACHES = (model.load_model, model._slice_model, model._slice_references, model._check_ops, model._check_slice)


# Layers of tower and language model: every layer is the same work for the host.
_VISION_LAYERS, _TEXT_LAYERS = 1, 2


def _shallow_preset(name: str) -> InfiMMHDConfig:
    """Return a preset with few layers and one gated block."""
    config = preset(name)
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = _VISION_LAYERS, _TEXT_LAYERS
    config.cross_attention_every_n_layers, config.vision_feature_layer = _TEXT_LAYERS, -1
    return config


def _remember(process: Callable) -> Callable:
    """Return `process` with its results kept by the number of pictures: they take seconds, and their values no part."""
    known: dict[int, Any] = {}

    def remembered(processor: Any, pictures: list[Any], *args: Any, **kwargs: Any) -> Any:
        if len(pictures) not in known:
            known[len(pictures)] = process(processor, pictures, *args, **kwargs)
        return known[len(pictures)]

    return remembered


@contextlib.contextmanager
def dry_benchmarks(**options: Any) -> Iterator[Any]:
    """Pretend that there is a GPU, and let the benchmarks compare shapes in place of numbers.

    Models have few layers, batches two rows at most, and prompts one of two lengths.

    Args:
        **options: see `dry_cuda`.
    """
    registry.load_suites()
    with DRY.dry_cuda(**options) as dry, contextlib.ExitStack() as stack:
        changes = [
            (registry, "assert_error_budget", DRY.compare_shapes),
            (model, "assert_error_budget", DRY.compare_shapes),
            # Unknown scalars read as 1.
            (model, "DEVIATIONS", dict.fromkeys(model.DEVIATIONS, 1.0)),
            (timing, "WARM_UPS", 0),
            (timing, "MIN_SAMPLES", 1),
            (timing, "MAX_INPUT_SETS", 2),
            (InfiMMHDImageProcessor, "__call__", _remember(InfiMMHDImageProcessor.__call__)),
            (end_to_end, "load_image", functools.cache(end_to_end.load_image)),
            (harness, "prepare", _watched(dry)),
            (harness, "pinned_threads", contextlib.nullcontext),
            *((module, "preset", _shallow_preset) for module in (registry, model, end_to_end)),
            *((module, "_BATCHES", (1, 2)) for module in (end_to_end, language)),
            (interval_attention, "PREFILL_TOKENS", (128, 2048)),
        ]
        stack.enter_context(DRY.patched(changes))
        for cache in _CACHES:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        yield dry


def _watched(dry: Any) -> Callable[[Stage, BenchCase, Implementation, Inputs], Prepared]:
    """Return `prepare` whose runs note when they make the host wait."""

    def prepare(stage: Stage, case: BenchCase, implementation: Implementation, inputs: Inputs) -> Prepared:
        prepared = registry.prepare(stage, case, implementation, inputs)

        def run() -> Any:
            dry.timing = f"{stage.name}, {case.name}: {implementation.name}"
            try:
                return prepared.run()
            finally:
                dry.timing = None

        return replace(prepared, run=run)

    return prepare
