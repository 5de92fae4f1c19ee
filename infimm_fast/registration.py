"""Makes Transformers know InfiMM-HD's classes and our attention."""

from __future__ import annotations

import functools


@functools.cache
def register_auto() -> None:
    """Register with `AutoConfig`, `AutoModelForImageTextToText`, `AutoImageProcessor`, `AutoProcessor`, and our attention.

    Runs by itself when a model, configuration or processor class of `infimm_fast` is first used; a program that only
    uses Auto classes calls it once. Calling it again does nothing.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    # Some versions replace transformers.AutoImageProcessor by a dummy when torchvision is missing; this one always works.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from infimm_fast.integrations.transformers_attention import register_attention
    from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig, InfiMMHDVisionConfig
    from infimm_fast.models.infimm_hd.image_processing_infimm_hd import InfiMMHDImageProcessor
    from infimm_fast.models.infimm_hd.modeling_eva_vision import EvaVisionTower
    from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
    from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor

    AutoConfig.register(InfiMMHDConfig.model_type, InfiMMHDConfig)
    AutoConfig.register(InfiMMHDVisionConfig.model_type, InfiMMHDVisionConfig)
    AutoModel.register(InfiMMHDVisionConfig, EvaVisionTower)
    AutoModelForImageTextToText.register(InfiMMHDConfig, InfiMMHDForConditionalGeneration)
    AutoImageProcessor.register(InfiMMHDConfig, image_processor_classes={"pil": InfiMMHDImageProcessor})
    AutoProcessor.register(InfiMMHDConfig, InfiMMHDProcessor)
    register_attention()
