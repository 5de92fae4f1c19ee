"""Fused kernels, exporters and benchmarks for high-resolution multimodal LLMs, around a model of InfiMM-HD.

Importing this package is light: public names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_PUBLIC = {
    "EvaVisionTower": "modeling_eva_vision",
    "FusedGatedCrossAttentionBlock": "modules",
    "GatedCrossAttentionBlock": "modeling_gated_cross_attention",
    "InfiMMHDConfig": "configuration_infimm_hd",
    "InfiMMHDForConditionalGeneration": "modeling_infimm_hd",
    "InfiMMHDImageProcessor": "image_processing_infimm_hd",
    "InfiMMHDProcessor": "processing_infimm_hd",
    "InfiMMHDVisionConfig": "configuration_infimm_hd",
    "PRESETS": "presets",
    "VisualContext": "visual_context",
    "byte_tokenizer": "tokenization_bytes",
    "convert_checkpoint": "checkpoint",
    "insert_gated_cross_attention": "modeling_gated_cross_attention",
    "optimize": "optimization",
    "preset": "presets",
    "register_auto": "registration",
    "restore": "optimization",
}

# Modules whose classes Transformers' Auto classes should know once one of them is in use.
_AUTO = {name for name, module in _PUBLIC.items() if "infimm_hd" in module or module == "modeling_eva_vision"}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from infimm_fast.checkpoint import convert_checkpoint as convert_checkpoint
    from infimm_fast.configuration_infimm_hd import InfiMMHDConfig as InfiMMHDConfig
    from infimm_fast.configuration_infimm_hd import InfiMMHDVisionConfig as InfiMMHDVisionConfig
    from infimm_fast.image_processing_infimm_hd import InfiMMHDImageProcessor as InfiMMHDImageProcessor
    from infimm_fast.modeling_eva_vision import EvaVisionTower as EvaVisionTower
    from infimm_fast.modeling_gated_cross_attention import GatedCrossAttentionBlock as GatedCrossAttentionBlock
    from infimm_fast.modeling_gated_cross_attention import insert_gated_cross_attention as insert_gated_cross_attention
    from infimm_fast.modeling_infimm_hd import InfiMMHDForConditionalGeneration as InfiMMHDForConditionalGeneration
    from infimm_fast.modules import FusedGatedCrossAttentionBlock as FusedGatedCrossAttentionBlock
    from infimm_fast.optimization import optimize as optimize
    from infimm_fast.optimization import restore as restore
    from infimm_fast.presets import PRESETS as PRESETS
    from infimm_fast.presets import preset as preset
    from infimm_fast.processing_infimm_hd import InfiMMHDProcessor as InfiMMHDProcessor
    from infimm_fast.registration import register_auto as register_auto
    from infimm_fast.tokenization_bytes import byte_tokenizer as byte_tokenizer
    from infimm_fast.visual_context import VisualContext as VisualContext


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
