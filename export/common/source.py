"""The model that an export starts from: loaded, with its dtype settled, on backends that can be exported."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infimm_fast.export.common.artifact import PROCESSOR
from infimm_fast.export.common.errors import ExportError
from infimm_fast.export.common.spec import DTYPES, check_dtype, default_limits
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.fused_gated_cross_attention import FusedGatedCrossAttentionBlock
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor
from infimm_fast.registration import register_auto


def load_model(
    model: InfiMMHDForConditionalGeneration | str | Path, dtype: str | None, processor: InfiMMHDProcessor | None
) -> tuple[Path | None, InfiMMHDForConditionalGeneration, InfiMMHDProcessor | None]:
    """Return the folder, the model and its processor."""
    if isinstance(model, InfiMMHDForConditionalGeneration):
        return None, model, processor
    if not isinstance(model, (str, Path)):
        raise ExportError(
            f"{type(model).__name__} is not an InfiMMHDForConditionalGeneration or the folder of one; "
            "other modules go to export_module_onnx"
        )
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder} is not the folder of a model: it has no config.json")
    processor = processor or load_processor(folder)
    kind = "auto" if dtype is None else DTYPES[dtype]
    return folder, InfiMMHDForConditionalGeneration.from_pretrained(folder, dtype=kind).eval(), processor


def load_processor(folder: Path) -> InfiMMHDProcessor | None:
    """Return the processor in a folder, or None if it holds no tokenizer."""
    register_auto()  # its parts are found by Transformers' Auto classes
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return InfiMMHDProcessor.from_pretrained(folder)
    return None


def settle_dtype(model: InfiMMHDForConditionalGeneration, dtype: str | None) -> str:
    """Return the dtype of the export: the model's, unless another one was asked for."""
    own = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if dtype is None:
        if len(own) > 1:
            raise ExportError(f"the model has weights of {', '.join(sorted(own))}; give one dtype")
        (dtype,) = own
        check_dtype(dtype)
    if own != {dtype} and any(getattr(block, "folded", None) is not None for block in model.gated_blocks):
        raise ExportError(
            f"a folded model of {', '.join(sorted(own))} would be rounded twice on the way to {dtype}; "
            f"use model.to({dtype}), which folds it anew, and export that"
        )
    return dtype


def settle_limits(config: InfiMMHDConfig, limits: Mapping[str, tuple[int, int]] | None) -> dict[str, tuple[int, int]]:
    """Return (smallest, largest) size of every free axis: `default_limits`, with those that were asked for in place."""
    settled = default_limits(config)
    longest = settled["total_sequence_length"][1]
    for axis, (smallest, largest) in (limits or {}).items():
        if axis not in settled or not settled[axis][0] <= smallest <= largest:
            raise ExportError(f"limits {smallest} to {largest} of {axis!r} are not accepted; the axes start at {settled}")
        if axis == "total_sequence_length" and largest > longest:
            raise ExportError(f"{axis} up to {largest} is not accepted; the language model is right up to {longest}")
        settled[axis] = (smallest, largest)
    return settled


@contextlib.contextmanager
def as_exported(model: InfiMMHDForConditionalGeneration) -> Iterator[None]:
    """Put a model in evaluation mode and on the backends that can be exported, and back afterwards."""
    training = model.training
    modules = [(module, module.backend) for module in model.modules() if hasattr(module, "backend")]
    attention = model.language_model.config._attn_implementation
    try:
        model.eval()
        for module, _ in modules:
            module.backend = "sdpa"
        if attention != "sdpa":
            model.language_model.set_attn_implementation("sdpa")
        yield
    finally:
        model.train(training)
        for module, backend in modules:
            module.backend = backend
        if attention != "sdpa":
            model.language_model.set_attn_implementation(attention)


def cast_model(model: nn.Module, dtype: torch.dtype) -> Any:
    """Return a model with its parameters in another dtype on the CPU; itself if they are."""
    if all(p.dtype == dtype and p.device.type == "cpu" for p in model.parameters()):
        return model
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        is_weight = isinstance(tensor, nn.Parameter)
        value = tensor.detach().to("cpu", dtype if is_weight and tensor.is_floating_point() else tensor.dtype)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_weight else value
    copied = copy.deepcopy(model, memo)
    for block in copied.modules():
        if isinstance(block, FusedGatedCrossAttentionBlock) and block.folded is not None:
            block.fold()  # folded weights belong to the parameters that they were made of
    return copied


def checkpoint_names(model: nn.Module) -> dict[int, str]:
    """Return id of each tensor -> its name in the model, which is its name in a checkpoint."""
    named = [*model.named_buffers(), *model.named_parameters()]
    return {id(tensor): name for name, tensor in named}


def save_processor(processor: InfiMMHDProcessor, out: Path) -> set[str]:
    """Save a processor in an artifact and return the paths of its files there."""
    processor.save_pretrained(out / PROCESSOR)
    return {str(file.relative_to(out)) for file in (out / PROCESSOR).rglob("*") if file.is_file()}


def generation_ids(model: InfiMMHDForConditionalGeneration) -> dict[str, Any]:
    """Return the ids that end and pad a generated text, for a manifest."""
    config = model.generation_config
    return {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
