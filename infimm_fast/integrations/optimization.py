"""One call that puts the fused modules into a model for inference, and one that takes them out again."""

from __future__ import annotations

from torch import nn

from infimm_fast.errors import FoldError
from infimm_fast.kernels.common.launch import BACKENDS
from infimm_fast.models.infimm_hd.configuration_infimm_hd import check_choice
from infimm_fast.models.infimm_hd.fused_gated_cross_attention import FusedGatedCrossAttentionBlock, check_foldable
from infimm_fast.models.infimm_hd.modeling_eva_vision import InfiMMHDPreTrainedModel
from infimm_fast.models.infimm_hd.modeling_gated_cross_attention import GatedCrossAttentionBlock


def optimize(model: nn.Module, *, fold: bool = True, offload: bool = False, backend: str = "auto") -> nn.Module:
    """Put the fused kernels into `model`, in place.

    Every `GatedCrossAttentionBlock` becomes a `FusedGatedCrossAttentionBlock` with the same parameters, folded if asked
    for. An InfiMM-HD model is switched to `backend` throughout, its vision tower included. `restore` undoes all of it.

    Args:
        model: any module with gated blocks inside.
        fold: fold the blocks for inference; otherwise they train.
        offload: see `FusedGatedCrossAttentionBlock.fold`.
        backend: "auto" (Triton on CUDA, plain PyTorch elsewhere), "triton", "sdpa" or "reference".

    Returns:
        The model itself.

    Raises:
        ConfigurationError: the backend is not known.
        FoldError: there is no gated block, or a weight cannot be folded; the model is as it was.
    """
    check_choice("backend", backend, BACKENDS)
    blocks = _gated_blocks(model)
    if not blocks:
        raise FoldError(f"{type(model).__name__} has no GatedCrossAttentionBlock inside; there is nothing to optimize")
    if fold:
        for name, block in blocks.items():
            try:
                check_foldable(block, within=model)
            except FoldError as error:
                raise FoldError(f"in {name}: {error}") from error
    for name, block in blocks.items():
        if not isinstance(block, FusedGatedCrossAttentionBlock):
            block = FusedGatedCrossAttentionBlock.from_block(block)
            model.set_submodule(name, block)
        block.attn.backend = backend
        if fold:
            block.fold(offload=offload, within=model)
        else:
            block.unfold()
    if isinstance(model, InfiMMHDPreTrainedModel):
        model.set_backend(backend)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize`, exactly and in place; a model that is not optimized stays as it is.

    Args:
        model: what `optimize` returned.

    Returns:
        The model itself.
    """
    backend = None
    for name, block in _gated_blocks(model).items():
        if isinstance(block, FusedGatedCrossAttentionBlock):
            backend = block.replaced_backend
            model.set_submodule(name, block.to_block())
    if backend is not None and isinstance(model, InfiMMHDPreTrainedModel):
        model.set_backend(backend)
    return model


def _gated_blocks(model: nn.Module) -> dict[str, GatedCrossAttentionBlock]:
    """Return the gated blocks inside a module, by name."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, GatedCrossAttentionBlock)
    }
