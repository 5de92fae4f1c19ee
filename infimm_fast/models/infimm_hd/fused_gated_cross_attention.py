"""The gated cross-attention block on the fused kernels: for training, and folded for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from infimm_fast.errors import FoldError
from infimm_fast.kernels import gated_residual, interval_attention
from infimm_fast.models.infimm_hd.modeling_gated_cross_attention import GatedCrossAttentionBlock
from infimm_fast.models.infimm_hd.visual_context import KeyValue

# Children of a block whose weights are folded; the K/V projection stays as it is.
_FOLDED_LINEARS = ("attn.q_proj", "attn.o_proj", "ff.up_proj", "ff.down_proj")
_FOLDED_NORMS = ("attn.norm", "ff.norm")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FoldedWeights(nn.Module):
    """One gated block with everything that is linear folded into four matrix products.

    ``tanh(gate)`` scales the rows of the two output projections. LayerNorm's weight scales the columns of the projections
    that follow it, and its bias becomes their bias; the query projection takes in the softmax scale as well. All folds
    are computed in fp32 from the parameters as they are stored, and rounded once. The residual is added by the matrix
    product that ends each half.

    The weights are buffers outside the state dict, so that they follow the block from device to device and a saved
    block holds its parameters only.

    Args:
        block: the block whose weights to fold.
    """

    q_weight: torch.Tensor
    q_bias: torch.Tensor
    o_weight: torch.Tensor
    up_weight: torch.Tensor
    up_bias: torch.Tensor
    down_weight: torch.Tensor

    def __init__(self, block: GatedCrossAttentionBlock):
        super().__init__()
        attn, ff = block.attn, block.ff
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim
        self.attn_eps, self.ff_eps = attn.norm.eps, ff.norm.eps
        q_weight, q_bias = _fold_norm(attn.q_proj.weight, attn.norm, attn.head_dim**-0.5)
        up_weight, up_bias = _fold_norm(ff.up_proj.weight, ff.norm)
        folded = {
            "q_weight": q_weight,
            "q_bias": q_bias,
            "o_weight": _fold_gate(attn.o_proj.weight, block.attn_gate),
            "up_weight": up_weight,
            "up_bias": up_bias,
            "down_weight": _fold_gate(ff.down_proj.weight, block.ff_gate),
        }
        for name, tensor in folded.items():
            self.register_buffer(name, tensor.to(attn.q_proj.weight.dtype), persistent=False)

    def forward(
        self, x: torch.Tensor, kv_range: torch.Tensor, has_image: torch.Tensor, key_value: KeyValue, backend: str
    ) -> torch.Tensor:
        """Map ``[B, T, C]`` to the same shape; see `GatedCrossAttentionBlock.forward`."""
        shape = x.shape
        q = F.linear(F.layer_norm(x, shape[-1:], eps=self.attn_eps), self.q_weight, self.q_bias)
        # A row without a picture sees nothing, so its attention is exactly 0 and adds nothing.
        kv_range = kv_range.masked_fill(~has_image[:, None, None], 0)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))  # [B, T, H, D]
        out = interval_attention(q, *key_value, kv_range, scale=1.0, backend=backend)
        rows = torch.addmm(x.flatten(0, 1), out.flatten(2).flatten(0, 1), self.o_weight.t())  # [B * T, C]
        hidden = F.gelu(F.linear(F.layer_norm(rows, shape[-1:], eps=self.ff_eps), self.up_weight, self.up_bias))
        hidden = hidden.view(*shape[:-1], -1) * has_image[:, None, None].to(hidden.dtype)
        return torch.addmm(rows, hidden.flatten(0, 1), self.down_weight.t()).view(shape)


class FusedGatedCrossAttentionBlock(GatedCrossAttentionBlock):
    """Drop-in for `GatedCrossAttentionBlock` on the fused kernels: same arguments, same parameters, same names.

    As it is, it trains: Triton attention, and gate, residual and the next LayerNorm in one pass. `fold` turns it into an
    inference block of four matrix products and one attention; `unfold` turns it back, exactly.

    ``attn.backend`` chooses the backend of the ops, "auto" here: Triton on CUDA, plain PyTorch elsewhere.

    Args:
        *args: see `GatedCrossAttentionBlock`.
        **kwargs: see `GatedCrossAttentionBlock`.

    Source: Flamingo (arXiv 2204.14198, section 3.1.2); InfiMM-HD (arXiv 2403.01487, section 3).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._become_fused()

    def _become_fused(self) -> None:
        self.replaced_backend: str = self.attn.backend
        self.attn.backend = "auto"
        self.folded: FoldedWeights | None = None
        self._fingerprint: tuple[Any, ...] = ()
        self._offloaded_from: torch.device | None = None

    @classmethod
    def from_block(cls, block: GatedCrossAttentionBlock) -> FusedGatedCrossAttentionBlock:
        """Return a fused block that shares all parameters and submodules with `block`."""
        fused = cls.__new__(cls)
        _share(block, fused)
        fused._become_fused()
        return fused

    def to_block(self) -> GatedCrossAttentionBlock:
        """Return a plain block that shares all parameters and submodules with this one, which is unfolded by that."""
        self.unfold()
        block = GatedCrossAttentionBlock.__new__(GatedCrossAttentionBlock)
        _share(self, block)
        block.attn.backend = self.replaced_backend
        return block

    def forward(
        self,
        x: torch.Tensor,
        kv_range: torch.Tensor,
        has_image: torch.Tensor,
        features: torch.Tensor,
        key_value: KeyValue | None = None,
    ) -> torch.Tensor:
        """Mix visual tokens into text states; see `GatedCrossAttentionBlock.forward`.

        Raises:
            FoldError: the parameters have changed since `fold`.
        """
        backend = self.attn.backend
        if self.folded is not None:
            self._check_fingerprint()
            if key_value is None or backend == "reference":
                key_value = self.attn.project_visual(features)
            return self.folded(x, kv_range, has_image, key_value, backend)
        norm = self.ff.norm
        out = self.attn(x, kv_range, features, key_value)
        x, normed = gated_residual(
            x,
            out,
            self.attn_gate,
            has_image,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            norm_eps=norm.eps,
            backend=backend,
        )
        return gated_residual(x, self.ff.transform(normed), self.ff_gate, has_image, backend=backend)

    @torch.no_grad()
    def fold(self, *, offload: bool = False, within: nn.Module | None = None) -> FusedGatedCrossAttentionBlock:
        """Fold gates, LayerNorms and the softmax scale into the projections, for inference.

        The parameters stay what they are, and so does the state dict. Loading one unfolds the block; changing parameters
        in another way makes the next forward pass refuse to run.

        Args:
            offload: keep the folded parameters in CPU memory until `unfold`, which saves as much as the folded weights
                take on the block's device.
            within: the model that the block is part of, searched for weights tied to the block's; None searches the
                block alone.

        Returns:
            The block itself.

        Raises:
            FoldError: a weight is quantised, adapted, tied, requires grad, or is not in memory; nothing was changed.
        """
        self.unfold()
        check_foldable(self, within)
        folded = FoldedWeights(self)
        if offload:
            self._offloaded_from = self.attn.q_proj.weight.device
            for parameter in _folded_parameters(self).values():
                parameter.data = parameter.data.cpu()
        self.folded = folded
        self._fingerprint = self._take_fingerprint()
        return self

    @torch.no_grad()
    def unfold(self) -> FusedGatedCrossAttentionBlock:
        """Undo `fold`, exactly: the parameters were kept. A block that is not folded stays as it is."""
        if self._offloaded_from is not None:
            for parameter in _folded_parameters(self).values():
                parameter.data = parameter.data.to(self._offloaded_from)
        self.folded, self._fingerprint, self._offloaded_from = None, (), None
        return self

    def _take_fingerprint(self) -> tuple[Any, ...]:
        # The version of a tensor counts its changes in place.
        return tuple((id(p), p._version, p.requires_grad) for p in _folded_parameters(self).values())

    def _check_fingerprint(self) -> None:
        if not torch.compiler.is_compiling() and self._take_fingerprint() != self._fingerprint:
            raise FoldError("the block's parameters have changed since fold(); call fold() again, or unfold()")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FusedGatedCrossAttentionBlock:
        """Move or cast the block; one that is folded is folded anew, since casting folded weights would round twice."""
        folded, offload = self.folded is not None, self._offloaded_from is not None
        self.unfold()
        super()._apply(fn, recurse)
        return self.fold(offload=offload) if folded else self


def _share(source: GatedCrossAttentionBlock, target: GatedCrossAttentionBlock) -> None:
    """Make `target`, not initialised yet, a block of the parameters and submodules of `source`."""
    nn.Module.__init__(target)
    for name in ("attn", "attn_gate", "ff", "ff_gate"):
        setattr(target, name, getattr(source, name))
    target.training = source.training


def _folded_parameters(block: GatedCrossAttentionBlock) -> dict[str, nn.Parameter]:
    """Return the parameters that `fold` replaces: all but those of the K/V projection."""
    return {name: p for name, p in block.named_parameters() if not name.startswith("attn.kv_proj.")}


def _fold_norm(weight: torch.Tensor, norm: nn.LayerNorm, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias, in at least fp32, of ``scale * (norm(x) @ weight.T)`` as a function of the bare norm."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    scaled = weight.to(wide) * scale
    return scaled * norm.weight.to(wide), scaled @ norm.bias.to(wide)


def _fold_gate(weight: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return ``tanh(gate)`` times the rows of `weight`, in at least fp32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) * gate.to(wide).tanh()[:, None]


def check_foldable(block: GatedCrossAttentionBlock, within: nn.Module | None = None) -> None:
    """Raise `FoldError`, naming the weight, unless all weights of `block` are plain ones that may be folded.

    Args:
        block: the block.
        within: the model that the block is part of; see `FusedGatedCrossAttentionBlock.fold`.
    """
    for name in (*_FOLDED_LINEARS, *_FOLDED_NORMS):
        module = block.get_submodule(name)
        expected: type[nn.Module] = nn.Linear if name in _FOLDED_LINEARS else nn.LayerNorm
        if type(module) is not expected or nn.utils.parametrize.is_parametrized(module):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise FoldError(f"{name} is a {kind}; only a plain {expected.__name__} can be folded (merge or unload it first)")
        if hasattr(module, "_hf_hook"):
            raise FoldError(f"{name} is moved between devices by a hook of accelerate; fold needs its weights in place")
    names: dict[int, list[str]] = {}
    for name, parameter in (within or block).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in _folded_parameters(block).items():
        if type(parameter.data) is not torch.Tensor or parameter.dtype not in _DTYPES:
            raise FoldError(f"{name} is quantised ({type(parameter.data).__name__}, {parameter.dtype}); fold takes floats")
        if len(names.get(id(parameter), ())) > 1:
            raise FoldError(f"{name} is tied: it is {' and '.join(names[id(parameter)])}; fold takes weights of one owner")
        if parameter.requires_grad:
            raise FoldError(f"{name} requires grad; fold is for inference: call requires_grad_(False) first")
