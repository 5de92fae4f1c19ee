"""What the stages of the model share: one model in memory, its ways to run, and the checks in front of their figures."""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from infimm_fast.benchmarks import registry
from infimm_fast.benchmarks.registry import BenchCase, Plan, Prepared, Run, Stage
from infimm_fast.dtypes import DTYPES
from infimm_fast.integrations.optimization import optimize, restore
from infimm_fast.kernels.common.cases import Inputs
from infimm_fast.kernels.common.numerics import Errors, assert_error_budget, outlier_normal
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.modeling_gated_cross_attention import project_visual_at_once
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.presets import preset
from infimm_fast.models.infimm_hd.visual_context import VisualContext

# Largest RMS deviation from the SDPA model in the same precision, over its RMS. Roundings of all layers add up (the naive
# tiny model comes to 5e-2 in bfloat16), so this finds gross errors; the two other checks are the strict ones.
DEVIATIONS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_SLICE_LAYERS, _SLICE_TOKENS = 2, 16
# Fused ops that a way to run the model stands on.
_ATTENTION = ("subimage_attention", "infimm_fast"), ("interval_attention", "infimm_fast")
_OPS: dict[str, tuple[tuple[str, str], ...]] = {
    "infimm_fast": _ATTENTION,
    "fused": (*_ATTENTION, ("gated_block", "fused")),
    "fused folded": (*_ATTENTION, ("gated_block", "fused folded")),
}


def make_model(config: InfiMMHDConfig, dtype: torch.dtype, device: torch.device) -> InfiMMHDForConditionalGeneration:
    """Return a model with random weights made on the device; its gates are open, or errors behind them would not show."""
    config.gate_initializer_range = config.gate_initializer_range or 0.5
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = InfiMMHDForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(previous)
    return model.eval().requires_grad_(False)


@functools.lru_cache(maxsize=1)
def load_model(name: str, dtype: str, device: torch.device) -> InfiMMHDForConditionalGeneration:
    """Return the model of a preset; one is kept, and all implementations run it."""
    return make_model(preset(name), DTYPES[dtype], device)


def _compile(model: InfiMMHDForConditionalGeneration) -> None:
    model.set_backend("sdpa")
    # One compiled block serves all layers of the tower; the decoder is a graph of its own.
    for block in model.vision_tower.blocks:
        block.compile(dynamic=False)
    model.language_model.get_decoder().compile(dynamic=False)


def _reset(model: InfiMMHDForConditionalGeneration) -> None:
    """Bring the model back to plain SDPA, whatever was done to it."""
    restore(model)
    model.set_backend("sdpa")
    for module in (*model.vision_tower.blocks, model.language_model.get_decoder()):
        module._compiled_call_impl = None


_ENTER: dict[str, Callable[[InfiMMHDForConditionalGeneration], Any]] = {
    "naive": lambda model: model.set_backend("reference"),
    "sdpa": lambda model: model.set_backend("sdpa"),
    "sdpa compiled": _compile,
    "infimm_fast": lambda model: model.set_backend("triton"),
    "fused": lambda model: optimize(model, fold=False),
    "fused folded": lambda model: optimize(model, fold=True),
}


class ModelStage(Stage):
    """A stage of the model.

    No float64 reference of a whole model fits, so that three checks stand in front of its figures: the fused ops that an
    implementation stands on pass; a model of full width and two layers keeps the error budget; and the result agrees with
    that of the SDPA model in the same precision.
    """

    @abstractmethod
    def make_run(self, case: BenchCase, inputs: Inputs) -> Run | Prepared:
        """Return what to time, on the model as it is switched now."""

    def expected(self, case: BenchCase, inputs: Inputs) -> torch.Tensor:
        """Return the result of the SDPA model in the precision of the case."""
        prepared = _prepare(self, "sdpa", case, inputs)
        try:
            return prepared.run()
        finally:
            prepared.close()

    def check(self, case: BenchCase, inputs: Inputs, expected: Any, implementation: str, run: Run) -> dict[str, Errors]:
        """Return the errors of the slice and the deviation from the SDPA model; see `Stage.check`."""
        device = inputs["model"].device
        _check_ops(implementation, case.preset, case.dtype, device)
        errors = {"two layers": _check_slice(implementation, case.preset, case.dtype, device)}
        return errors | check_deviation("sdpa", run(), expected, case.dtype)


def check_deviation(other: str, actual: torch.Tensor, expected: torch.Tensor, dtype: str) -> dict[str, Errors]:
    """Return the RMS deviation from another implementation in the same precision, over the RMS of its result.

    Raises:
        AssertionError: it is above that of `DEVIATIONS`.
    """
    size = expected.float().square().mean()
    deviation, allowed = ((actual.float() - expected.float()).square().mean() / size).sqrt().item(), DEVIATIONS[dtype]
    assert deviation <= allowed, f"RMS deviation from {other} is {deviation:.1e} of the RMS, above {allowed}"
    return {f"against {other}": Errors(deviation, deviation, allowed, allowed)}


def _prepare(stage: ModelStage, name: str, case: BenchCase, inputs: Inputs) -> Prepared:
    model = inputs["model"]
    _ENTER[name](model)
    run = stage.make_run(case, inputs)
    prepared = run if isinstance(run, Prepared) else Prepared(run)
    return replace(prepared, close=lambda: _reset(model))


def register_model_stage(stage: ModelStage, graph: bool = True, gated_blocks: bool = True) -> None:
    """Make a stage known, with every way to run the model as an implementation.

    Args:
        stage: the stage.
        graph: whether it can be captured.
        gated_blocks: whether it runs them; the plain statement's wait for the device, so that it is never captured.
    """
    registry.register_stage(stage)
    for name in _ENTER:
        captured = graph and not (gated_blocks and name == "naive")
        properties: dict[str, Any] = {"graph": captured, "ours": name in _OPS}
        if name == "infimm_fast":
            properties["requires"] = registry.needs_cuda
        if name == "sdpa compiled":
            properties |= {"setup_seconds": 40.0, "main_only": True}
        registry.register_implementation(stage.name, name, **properties)(functools.partial(_prepare, stage, name))


@functools.cache
def _check_ops(implementation: str, preset_name: str, dtype: str, device: torch.device) -> None:
    """Raise AssertionError unless the ops below an implementation pass on their smallest case of the preset."""
    plan = Plan(preset_name, dtype, device)
    for op_name, one in _OPS.get(implementation, ()):
        stage, candidate = registry.STAGES[op_name], registry.IMPLEMENTATIONS[op_name][one]
        case = min((case for case in stage.cases(plan) if not case.backward), key=lambda case: case.flops)
        if candidate.obstacle(case, device) is None:
            inputs = stage.make_inputs(case, device, seed=0)
            run = registry.prepare(stage, case, candidate, inputs).run
            stage.check(case, inputs, stage.expected(case, inputs), one, run)


def _slice_logits(model: InfiMMHDForConditionalGeneration) -> torch.Tensor:
    """Run one tile and a few tokens through a model; logits ``[1, T, vocabulary]``."""
    config, device = model.config, model.device
    vision = config.vision_config
    shape = (1, vision.num_channels, vision.image_size, vision.image_size)
    pixels = outlier_normal(*shape, dtype=torch.float32, device=device, seed=0).to(model.dtype)
    ids = make_ids(config, 1, _SLICE_TOKENS, device)
    return model(input_ids=ids, pixel_values=pixels, use_cache=False).logits


@functools.cache
def _slice_references(preset_name: str, dtype: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slice's logits by the plain statement: in the model's precision, and in a wider one."""
    model = _slice_model(preset_name, dtype, device)
    model.set_backend("reference")
    plain = _slice_logits(model)
    # float64 fits, but the language model's norms and positions are float32 in any case.
    wide = torch.float64 if dtype == "float32" else torch.float32
    return plain, _slice_logits(copy.deepcopy(model).to(wide))


@functools.lru_cache(maxsize=1)
def _slice_model(preset_name: str, dtype: str, device: torch.device) -> InfiMMHDForConditionalGeneration:
    config = preset(preset_name)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = _SLICE_LAYERS
    config.cross_attention_every_n_layers, config.vision_feature_layer = 1, -1
    return make_model(config, DTYPES[dtype], device)


@functools.cache
def _check_slice(implementation: str, preset_name: str, dtype: str, device: torch.device) -> Errors:
    """Raise AssertionError unless an implementation keeps the error budget on a full-width model of two layers."""
    plain, exact = _slice_references(preset_name, dtype, device)
    model = _slice_model(preset_name, dtype, device)
    _ENTER[implementation](model)
    try:
        return assert_error_budget("logits of two layers", _slice_logits(model), plain, exact)
    finally:
        _reset(model)


def make_ids(config: InfiMMHDConfig, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Return random text int64 ``[rows, tokens]`` with one picture at its start."""
    generator = torch.Generator().manual_seed(1)
    # Special tokens, ``<image>`` among them, stand at either end of the vocabularies.
    ids = torch.randint(3, min(config.image_token_id, config.end_of_chunk_token_id), (rows, tokens), generator=generator)
    ids[:, 0] = config.image_token_id
    return ids.to(device)


def make_context(model: InfiMMHDForConditionalGeneration, features: torch.Tensor, rows: int) -> VisualContext:
    """Return one picture for each row out of visual tokens ``[rows * S_row, C]``, with K/V if the model keeps them."""
    device = features.device
    index = torch.arange(rows, device=device)
    offsets = torch.arange(rows + 1, device=device) * (len(features) // rows)
    return VisualContext(features, offsets, torch.stack((index, index + 1), dim=1), key_values_of(model, features))


def key_values_of(model: InfiMMHDForConditionalGeneration, features: torch.Tensor) -> tuple | None:
    """Return K/V of all gated blocks, or None where the implementation projects them in every step."""
    if model.config.backend == "reference":
        return None
    return project_visual_at_once([block.attn for block in model.gated_blocks], features)
