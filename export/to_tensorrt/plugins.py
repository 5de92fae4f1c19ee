"""Our Triton kernels as ahead-of-time TensorRT plugins: shapes, formats, a Python run, and PTX for engines without Python.

TensorRT's parser finds a plugin by a node's op type, its namespace and ``aot=1``. When it builds, it asks for the PTX,
its grid as an expression of the inputs' shapes, and the int32 scalars that follow the inputs' pointers; the output's pointer
comes last. That is the signature of the contiguous entries, out of the same `choose_config` as everywhere.

No ``from __future__ import annotations`` here: TensorRT reads the annotations of the functions as objects.
"""

# TensorRT's classes are values here, which no static checker takes for types.
# mypy: disable-error-code="valid-type, attr-defined"

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from infimm_fast.export.common.errors import ExportError
from infimm_fast.export.to_kernels.sources import CROSS_ROWS, cross_attention_source, subimage_source
from infimm_fast.export.to_onnx.functions import DOMAIN
from infimm_fast.export.to_tensorrt.flavors import Flavor
from infimm_fast.export.to_tensorrt.prepare import PACKED_ATTENTION
from infimm_fast.kernels.common.launch import MAX_HEAD_DIM, TRITON_INSTALLED
from infimm_fast.kernels.common.offline import CompiledKernel, KernelSource, compile_source

SUBIMAGE = f"{DOMAIN}::SubimageAttention"
SUBIMAGE_PACKED = f"{DOMAIN}::{PACKED_ATTENTION}"
CROSS = f"{DOMAIN}::IntervalAttention"
# Attributes are arrays of one number: release 10.16 cannot read scalars with NumPy 2.4.
Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int32]
# A tactic for each bucket of rows; TensorRT times them at the usual shape of each profile. All take every shape.
CROSS_TACTICS = dict(enumerate(CROSS_ROWS.values(), start=1))


@dataclass
class _Target:
    """The GPU that kernels are compiled for; plugins are registered once for a process, and builds may differ."""

    sm: int = 0


_target = _Target()
_registered: set[int] = set()


def register_plugins(flavor: Flavor, sm: int) -> None:
    """Make the plugins known to a TensorRT, for builds for one GPU.

    Args:
        flavor: TensorRT 10.x or 11.x.
        sm: compute capability, 90 for a Hopper.

    Raises:
        ExportError: this TensorRT has no ahead-of-time plugins, or triton is not installed.
    """
    if not TRITON_INSTALLED:
        raise ExportError("plugins need the triton package to compile kernels; pip install 'infimm-fast[gpu]'")
    trt = flavor.trt
    try:
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise ExportError(f"TensorRT {flavor.version} has no tensorrt.plugin: {error}") from error
    if flavor.name != "tensorrt" or not hasattr(trtp, "aot_impl"):
        raise ExportError(f"TensorRT {flavor.version} has no Python ahead-of-time plugins; it takes 10.15 and later")
    _target.sm = sm
    if id(trt) not in _registered:
        _define_subimage(trt, trtp)
        _define_packed(trt, trtp)
        _define_cross(trt, trtp)
        _registered.add(id(trt))


def _define_subimage(trt: Any, trtp: Any) -> None:
    """``q, k, v [B, N, H, D] -> out [B, N, H, D]``."""
    Desc, Tensor = trtp.TensorDesc, trtp.Tensor

    @trtp.register(SUBIMAGE)
    def describe(q: Desc, k: Desc, v: Desc, scale: Float, is_causal: Int) -> Desc:
        return q.like()

    @trtp.autotune(SUBIMAGE)
    def formats(q: Desc, k: Desc, v: Desc, outputs: tuple[Desc]) -> list[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination(", ".join(["FP16|BF16|FP32"] * 4), "LINEAR")]

    @trtp.impl(SUBIMAGE)
    def run(q: Tensor, k: Tensor, v: Tensor, scale: Float, is_causal: Int, outputs: tuple[Tensor], stream: int) -> None:
        from infimm_fast.kernels import subimage_attention

        with _on_stream(stream):
            out = subimage_attention(
                *_as_torch(q, k, v), scale=float(scale[0]), is_causal=bool(is_causal[0]), backend="triton"
            )
            _write(outputs, out)

    @trtp.aot_impl(SUBIMAGE)
    def compile_ahead(
        q: Desc, k: Desc, v: Desc, scale: Float, is_causal: Int, outputs: tuple[Desc], tactic: int
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        return _compile_subimage(trtp, tuple(q.shape_expr), _dtype(trt, q.dtype), scale, is_causal, packed=False)


def _define_packed(trt: Any, trtp: Any) -> None:
    """``qkv [B, N, 3, H, D] -> out [B, N, H, D]``."""
    Desc, Tensor = trtp.TensorDesc, trtp.Tensor

    @trtp.register(SUBIMAGE_PACKED)
    def describe(qkv: Desc, scale: Float, is_causal: Int) -> Desc:
        batch, tokens, _, heads, head_dim = qkv.shape_expr
        return trtp.from_shape_expr((batch, tokens, heads, head_dim), qkv.dtype)

    @trtp.autotune(SUBIMAGE_PACKED)
    def formats(qkv: Desc, outputs: tuple[Desc]) -> list[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination("FP16|BF16|FP32, FP16|BF16|FP32", "LINEAR")]

    @trtp.impl(SUBIMAGE_PACKED)
    def run(qkv: Tensor, scale: Float, is_causal: Int, outputs: tuple[Tensor], stream: int) -> None:
        from infimm_fast.kernels import subimage_attention_packed

        with _on_stream(stream):
            out = subimage_attention_packed(
                *_as_torch(qkv), scale=float(scale[0]), is_causal=bool(is_causal[0]), backend="triton"
            )
            _write(outputs, out)

    @trtp.aot_impl(SUBIMAGE_PACKED)
    def compile_ahead(
        qkv: Desc, scale: Float, is_causal: Int, outputs: tuple[Desc], tactic: int
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        batch, tokens, _, heads, head_dim = qkv.shape_expr
        return _compile_subimage(
            trtp, (batch, tokens, heads, head_dim), _dtype(trt, qkv.dtype), scale, is_causal, packed=True
        )


def _define_cross(trt: Any, trtp: Any) -> None:
    """``q [B, T, Hq, D], k, v [S, Hkv, D], kv_range [B, T, 2] -> out [B, T, Hq, D]``."""
    Desc, Tensor = trtp.TensorDesc, trtp.Tensor

    @trtp.register(CROSS)
    def describe(q: Desc, k: Desc, v: Desc, kv_range: Desc, scale: Float) -> Desc:
        return q.like()

    @trtp.autotune(CROSS)
    def formats(q: Desc, k: Desc, v: Desc, kv_range: Desc, outputs: tuple[Desc]) -> list[trtp.AutoTuneCombination]:
        same = "FP16|BF16|FP32"
        return [trtp.AutoTuneCombination(f"{same}, {same}, {same}, INT64, {same}", "LINEAR", list(CROSS_TACTICS))]

    @trtp.impl(CROSS)
    def run(
        q: Tensor, k: Tensor, v: Tensor, kv_range: Tensor, scale: Float, outputs: tuple[Tensor], stream: int, tactic: int
    ) -> None:
        from infimm_fast.kernels import interval_attention

        with _on_stream(stream):
            out = interval_attention(*_as_torch(q, k, v, kv_range), scale=float(scale[0]), backend="triton")
            _write(outputs, out)

    @trtp.aot_impl(CROSS)
    def compile_ahead(
        q: Desc, k: Desc, v: Desc, kv_range: Desc, scale: Float, outputs: tuple[Desc], tactic: int
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        batch, tokens, heads, head_dim = q.shape_expr
        keys, kv_heads, _ = k.shape_expr
        source = cross_attention_source(
            _constant("heads", heads),
            _constant("KV heads", kv_heads),
            _head_dim(head_dim),
            _dtype(trt, q.dtype),
            torch.int64,
            _target.sm,
            float(scale[0]),
            CROSS_TACTICS[tactic],
        )
        constants = source.constants
        tiles = trtp.cdiv(tokens * constants["GROUP"], constants["BLOCK_M"])
        programs = tiles * (constants["H"] // constants["GROUP"]) * batch
        return _answer(trtp, source, programs, [tokens, keys])


def _compile_subimage(
    trtp: Any, sizes: tuple[Any, ...], dtype: torch.dtype, scale: Float, is_causal: Int, packed: bool
) -> tuple[str | bytes, str | bytes, Any, Any]:
    """Return the answer for sub-image attention; sizes are batch, tokens, heads and head dim, as TensorRT's expressions."""
    batch, tokens, heads, head_dim = sizes
    source = subimage_source(
        _constant("heads", heads),
        _head_dim(head_dim),
        dtype,
        _known(tokens),
        _target.sm,
        float(scale[0]),
        packed=packed,
        causal=bool(is_causal[0]),
    )
    peel, block_m = source.constants["PEEL"], source.constants["BLOCK_M"]
    blocks = trtp.cdiv(tokens - peel, block_m) + peel
    return _answer(trtp, source, blocks * source.constants["H"] * batch, [tokens])


def _answer(
    trtp: Any, source: KernelSource, programs: Any, scalars: Sequence[Any]
) -> tuple[str | bytes, str | bytes, Any, Any]:
    """Return what TensorRT wants to know about a kernel."""
    kernel: CompiledKernel = compile_source(source, _target.sm)
    given = [name for name, kind in kernel.parameters if kind == "i32"]
    if len(given) != len(scalars) or not kernel.parameters[-1][0].startswith("out"):
        raise ExportError(f"{kernel.name} takes {kernel.parameters}; expected inputs, {len(scalars)} int32, and the output")
    launch = trtp.KernelLaunchParams()
    launch.grid_x = programs
    launch.block_x = 32 * kernel.num_warps
    launch.shared_mem = kernel.shared
    extra = trtp.SymIntExprs(len(scalars))
    for index, scalar in enumerate(scalars):
        extra[index] = trtp.SymInt32(scalar)
    return kernel.name, kernel.ptx, launch, extra


def _known(size: Any) -> int | None:
    """Return a size if it is fixed when the engine is built."""
    return size.constant_value() if not size.is_fake and size.is_constant else None


def _constant(name: str, size: Any) -> int:
    value = _known(size)
    if value is None:
        raise ExportError(f"the plugin needs a fixed number of {name}; it is a free axis of the graph")
    return value


def _head_dim(size: Any) -> int:
    value = _constant("channels of a head", size)
    if value % 8 or value > MAX_HEAD_DIM:
        raise ExportError(f"the plugin takes head dims that are multiples of 8 up to {MAX_HEAD_DIM}, not {value}")
    return value


def _dtype(trt: Any, dtype: Any) -> torch.dtype:
    names = {trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16, trt.DataType.FLOAT: torch.float32}
    return names[dtype]


@dataclass(frozen=True)
class _View:
    """A tensor of TensorRT for PyTorch; NumPy's array interface knows no bfloat16, so 16 bits travel as integers."""

    __cuda_array_interface__: dict[str, Any]


def _as_torch(*tensors: Any) -> list[torch.Tensor]:
    """Return TensorRT's contiguous tensors as PyTorch's, without copies."""
    views = []
    for tensor in tensors:
        name = str(tensor.dtype).split(".")[-1]
        dtype, code = {
            "HALF": (torch.float16, "<i2"),
            "BF16": (torch.bfloat16, "<i2"),
            "FLOAT": (torch.float32, "<f4"),
            "INT64": (torch.int64, "<i8"),
        }[name]
        interface = {"shape": tuple(tensor.shape), "typestr": code, "data": (tensor.data_ptr, False), "version": 3}
        views.append(torch.as_tensor(_View(interface), device="cuda").view(dtype))
    return views


def _write(outputs: Any, out: Any) -> None:
    _as_torch(outputs[0])[0].copy_(out)


def _on_stream(stream: int) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.stream(torch.cuda.ExternalStream(stream))
