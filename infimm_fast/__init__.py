"""Fused kernels, exporters and benchmarks for high-resolution multimodal LLMs, around a model of InfiMM-HD.

Importing this package is light: public names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_PUBLIC = {
    "EvaVisionTower": "models.infimm_hd.modeling_eva_vision",
    "FusedGatedCrossAttentionBlock": "models.infimm_hd.fused_gated_cross_attention",
    "GatedCrossAttentionBlock": "models.infimm_hd.modeling_gated_cross_attention",
    "InfiMMHDConfig": "models.infimm_hd.configuration_infimm_hd",
    "InfiMMHDForConditionalGeneration": "models.infimm_hd.modeling_infimm_hd",
    "InfiMMHDImageProcessor": "models.infimm_hd.image_processing_infimm_hd",
    "InfiMMHDProcessor": "models.infimm_hd.processing_infimm_hd",
    "InfiMMHDVisionConfig": "models.infimm_hd.configuration_infimm_hd",
    "VisualContext": "models.infimm_hd.visual_context",
    "convert_checkpoint": "models.infimm_hd.checkpoint",
    "optimize": "integrations.optimization",
    "preset": "models.infimm_hd.presets",
    "register_auto": "registration",
    "restore": "integrations.optimization",
}

# Modules whose classes Transformers' Auto classes should know once one of them is in use.
_AUTO = {name for name, module in _PUBLIC.items() if module.startswith("models.")}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from infimm_fast.integrations.optimization import optimize as optimize
    from infimm_fast.integrations.optimization import restore as restore
    from infimm_fast.models.infimm_hd.checkpoint import convert_checkpoint as convert_checkpoint
    from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig as InfiMMHDConfig
    from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDVisionConfig as InfiMMHDVisionConfig
    from infimm_fast.models.infimm_hd.fused_gated_cross_attention import (
        FusedGatedCrossAttentionBlock as FusedGatedCrossAttentionBlock,
    )
    from infimm_fast.models.infimm_hd.image_processing_infimm_hd import InfiMMHDImageProcessor as InfiMMHDImageProcessor
    from infimm_fast.models.infimm_hd.modeling_eva_vision import EvaVisionTower as EvaVisionTower
    from infimm_fast.models.infimm_hd.modeling_gated_cross_attention import (
        GatedCrossAttentionBlock as GatedCrossAttentionBlock,
    )
    from infimm_fast.models.infimm_hd.modeling_infimm_hd import (
        InfiMMHDForConditionalGeneration as InfiMMHDForConditionalGeneration,
    )
    from infimm_fast.models.infimm_hd.presets import preset as preset
    from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor as InfiMMHDProcessor
    from infimm_fast.models.infimm_hd.visual_context import VisualContext as VisualContext
    from infimm_fast.registration import register_auto as register_auto


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'infimm_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"infimm_fast.{_PUBLIC[name]}"), name)
    globals()[name] = value
    if name in _AUTO:
        importlib.import_module("infimm_fast.registration").register_auto()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
