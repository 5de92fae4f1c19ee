"""A CUDA device without a GPU: shapes, dtypes, strides, memory and what a graph may capture, but no numbers.

Every tensor "on CUDA" is a meta tensor that says it is on ``cuda:0``; PyTorch's own fake CUDA tensors cannot go through
autograd on a machine without a driver. Small integer and boolean tensors carry their values along, computed on the CPU,
so that what the host reads of them (intervals, counts of images) is right.

As a plugin of pytest (``-p dry_cuda``) it runs GPU tests there: what they check of shapes, dtypes and devices.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import traceback
import types
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from infimm_fast.kernels.common import launch, numerics
from infimm_fast.kernels.common.offline import recorded_launches

CUDA, META = torch.device("cuda", 0), torch.device("meta")
NAME, MEMORY = "Dry H100", 78 * 2**30
_MOST_VALUES = 2**14
_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
# These take indices from the host, which are copied first.
_INDEXERS = {_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default, _aten.index_put.default}
# What reads values on the host, so that the host waits; none of it can be captured.
_READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Where a call that makes the host wait may be, to be named.
_PLACES = ("/infimm_fast/", "/kernels/", "/benchmarks/", "/transformers/", "/tests/", "/export/")


class CaptureError(RuntimeError):
    """What CUDA would refuse while a graph is captured."""


class DryCuda(TorchDispatchMode):
    """Follows every operator; see the module."""

    # Nothing is compiled here, and the wrapper would cost a tenth of the time.
    _should_skip_dynamo = classmethod(lambda cls: False)

    def __init__(self) -> None:
        super().__init__()
        # Of autograd in the graph that is being captured; and what is being timed, when the host may not wait either.
        self.first_node: int | None = None
        self.timing: str | None = None
        # What was timed, operator and place in the source of each time that the host waited; kernels that were launched.
        self.waits: list[tuple[str, str, str]] = []
        self.launches: list[str] = []
        # Bytes: of the device, of all tensors that are alive, and the most of them since it was set last.
        self.memory, self.allocated, self.peak = MEMORY, 0, 0
        # Whether an operator runs on the meta device, where tensors must say so.
        self.inside = False
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: META if _is_cuda(value) else value for name, value in (kwargs or {}).items()}
        tensors = list(_tensors((*args, *kwargs.values())))
        here = [tensor for tensor in tensors if _is_meta(tensor)]
        target = kwargs.get("device")
        if not here and target != META:
            return func(*args, **kwargs)
        if "generator" in kwargs:
            kwargs["generator"] = None
        reads = func not in _INDEXERS and not _READING.isdisjoint(func.tags)
        self._check(func, args, target, reads, {_is_meta(x) for x in tensors if _is_meta(x) or x.dim()})
        if func.namespace == "infimm_fast":
            return self._run_operator(func, args, kwargs)
        if func is _aten._to_copy.default and here and target is not None and target != META:
            return _values_of(here[0]).to(kwargs.get("dtype") or here[0].dtype, copy=True)
        if func is _aten._local_scalar_dense.default:
            return _values_of(here[0], otherwise=1).item()
        if reads:
            values = _follow_values(func, args, kwargs)
            result = tree_map_only(torch.Tensor, lambda value: value.to(META), values)
        else:
            result = self._shape(func, args, kwargs)
            known = "empty" not in func.__name__ and all(getattr(tensor, "_dry_values", None) is not None for tensor in here)
            small = all(not x.is_floating_point() and x.numel() <= _MOST_VALUES for x in _tensors((result,)))
            values = _follow_values(func, args, kwargs) if known and small else None
            if func is _aten.argmax.default:
                values = torch.zeros(result.shape, dtype=result.dtype)
        for index, made in enumerate(_tensors((result,))):
            # None for a tensor that has just been overwritten with what is not known.
            made._dry_values = list(_tensors((values,)))[index] if values is not None else None  # type: ignore[attr-defined]
            self._count(made.untyped_storage())
        return result

    def _shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on the meta device, whose kernels must find their tensors there."""
        self.inside = True
        try:
            return func(*args, **kwargs)
        finally:
            self.inside = False

    def _check(self, func: Any, args: Any, target: Any, reads: bool, sides: set[bool]) -> None:
        """Refuse what a GPU would: tensors of two devices, and under capture whatever makes the host wait."""
        if func in _INDEXERS:
            reads = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        copied = func is _aten._to_copy.default and target is not None and (target == META) != _is_meta(args[0])
        moves = copied or len(sides) == 2
        if moves and func not in _COPIES and func not in _INDEXERS:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but some are on cuda, others on cpu")
        # A copy of nothing returns at once.
        if reads or (moves and (func not in _COPIES or args[0].numel())):
            self.wait(str(func))
        node = torch._C._current_autograd_node()
        if node is not None and self.first_node is not None and node._sequence_nr() < self.first_node:
            # It belongs to another stream.
            raise CaptureError(f"the backward pass of {node.name()}, which ran before the graph was captured, {_place()}")

    def wait(self, what: str) -> None:
        """Note that the host waits for the device; under capture that is an error."""
        if self.first_node is not None:
            raise CaptureError(f"{what} while a graph is captured, {_place()}")
        if self.timing is not None:
            self.waits.append((self.timing, what, _place()))

    def _run_operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator's own implementation, and compare what it allocates with what its fake promises."""
        promised = self._shape(func, args, kwargs)
        with self, _Redirect(), recorded_launches() as launches:
            result = torch._library.custom_ops.OPDEFS[func.name()]._init_fn(*args, **kwargs)
        # Without their tensors, which would stay in memory.
        self.launches += [one.kernel.__name__ for one in launches]
        for made, expected in zip(_tensors((result,)), _tensors((promised,)), strict=True):
            found, said = ((x.shape, x.stride(), x.dtype, x.device) for x in (made, expected))
            assert found == said, f"{func} returns {found}, its fake {said}"
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        # The caching allocator rounds to 512 bytes.
        key, nbytes = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self._storages:
            return
        if self.allocated + nbytes > self.memory:
            gc.collect()
        if self.allocated + nbytes > self.memory:
            used = f"{self.allocated / 2**30:.1f} of {self.memory / 2**30:.1f} GiB"
            raise torch.cuda.OutOfMemoryError(f"tried to allocate {nbytes / 2**30:.1f} GiB with {used} in use, {_place()}")
        self._storages.add(key)
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._release, key, nbytes)

    def _release(self, key: int, nbytes: int) -> None:
        self._storages.discard(key)
        self.allocated -= nbytes


class _Redirect(TorchFunctionMode):
    """Turns ``device="cuda"`` into the meta device where PyTorch would ask for a driver before it calls an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_cuda(kwargs.get("device", _device.CURRENT_DEVICE)):
            # As on a real GPU: made on the host, then copied.
            return func(*args, **kwargs | {"device": "cpu"}).to(META)
        if func is torch.Tensor.cuda:
            return args[0].to(META)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and _is_meta(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            # PyTorch makes a tensor of a list out of sight.
            args = (args[0], tuple(torch.tensor(one) if isinstance(one, list) else one for one in index), *args[2:])
        if func is torch.Tensor.to:
            args = [META if _is_cuda(arg) else arg for arg in args]
            kwargs = {name: META if _is_cuda(value) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _is_meta(tensor: torch.Tensor) -> bool:
    # Not by the attribute, which says something else while this is in force.
    return torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Meta)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments or results."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _values_of(tensor: torch.Tensor, otherwise: int = 0) -> torch.Tensor:
    """Return what the host reads: known values, or the same number for all results of floating-point operations."""
    values = getattr(tensor, "_dry_values", None)
    if values is None and not (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise RuntimeError(f"the host reads {tensor.dtype} {list(tensor.shape)}, whose values are not known, {_place()}")
    return torch.full(tensor.shape, otherwise, dtype=tensor.dtype) if values is None else values


def _follow_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the CPU, on the values of its arguments."""
    args, kwargs = tree_map_only(torch.Tensor, lambda x: _values_of(x) if _is_meta(x) else x, (args, kwargs))
    return func(*args, **(kwargs | {"device": "cpu"} if "device" in kwargs else kwargs))


def _place() -> str:
    """Return where in the library, its benchmarks or Transformers the innermost call was made."""
    for frame in reversed(traceback.extract_stack()):
        if "dry_cuda" not in frame.filename and any(part in frame.filename for part in _PLACES):
            return f"at {frame.filename.rpartition('/')[2]}:{frame.lineno} ({frame.name})"
    return "at an unknown place"


def _attend(attend: Any, q: Any, k: Any, v: Any, attn_mask: Any = None, *args: Any, **options: Any) -> torch.Tensor:
    """PyTorch's attention as a fused kernel: no scores; `attend` is what it does elsewhere."""
    if not _is_meta(q):
        return attend(q, k, v, attn_mask, *args, **options)
    assert q.dtype == k.dtype == v.dtype and k.shape[:3] == v.shape[:3] and q.shape[-1] == k.shape[-1], "SDPA's arguments"
    assert q.shape[1] == k.shape[1] or (options.get("enable_gqa") and q.shape[1] % k.shape[1] == 0), "SDPA's heads"
    if attn_mask is not None:
        assert _is_meta(attn_mask) and attn_mask.dtype in (torch.bool, q.dtype), "SDPA's mask"
        scores = (*q.shape[:3], k.shape[2])
        assert torch.broadcast_shapes(attn_mask.shape, scores) == scores, "SDPA's mask"
    return _aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _attend_flexibly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: Any = None, **options: Any):
    if block_mask is not None:
        assert block_mask.shape[-2:] == (q.shape[2], k.shape[2]) and _is_meta(block_mask.kv_indices), "FlexAttention's mask"
    return F.scaled_dot_product_attention(q, k, v, **options)


class _Event(types.SimpleNamespace):
    def record(self) -> None:
        self.recorded = self.enable_timing

    def elapsed_time(self, end: _Event) -> float:
        assert self.recorded and end.recorded
        return 1.0


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


@contextlib.contextmanager
def _captures(dry: DryCuda, graph: Any) -> Iterator[None]:
    # Numbers of autograd's nodes rise.
    with mock.patch.object(dry, "first_node", torch.autograd._get_sequence_nr()):
        yield
    # Before, there is nothing to replay.
    graph.replay = lambda: None


@contextlib.contextmanager
def dry_cuda() -> Iterator[DryCuda]:
    """Pretend that this machine has a GPU; nothing that runs on it computes, launches or compiles anything."""
    dry, stream = DryCuda(), mock.Mock(spec_set=["wait_stream"])
    # What takes a device or nothing, and always gives the same.
    answers = {
        "_lazy_init": None,
        "is_available": True,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "get_device_properties": types.SimpleNamespace(L2_cache_size=50 * 2**20),
        "current_stream": stream,
        "empty_cache": None,
    }
    stand_ins = {
        **{f"cuda.{name}": lambda device=None, answer=answer: answer for name, answer in answers.items()},
        "cuda.device": contextlib.nullcontext,
        "cuda.mem_get_info": lambda device=None: (dry.memory - dry.allocated, dry.memory),
        "cuda.memory_allocated": lambda device=None: dry.allocated,
        "cuda.max_memory_allocated": lambda device=None: dry.peak,
        "cuda.reset_peak_memory_stats": lambda device=None: setattr(dry, "peak", dry.allocated),
        "cuda.synchronize": lambda device=None: dry.wait("torch.cuda.synchronize"),
        "cuda.is_current_stream_capturing": lambda: dry.first_node is not None,
        "cuda.stream": contextlib.nullcontext,
        "cuda.Stream": lambda: stream,
        "cuda.Event": _Event,
        "cuda.CUDAGraph": types.SimpleNamespace,
        "cuda.graph": lambda graph, **options: _captures(dry, graph),
        "Tensor.device": property(lambda x: CUDA if x.is_cuda else torch._C.TensorBase.device.__get__(x)),
        "Tensor.is_cuda": property(lambda tensor: _is_meta(tensor) and not dry.inside),
        "Tensor.is_meta": property(lambda tensor: _is_meta(tensor) and dry.inside),
        "Generator": _Generator,
        "compile": lambda function=None, **options: function if function is not None else lambda inner: inner,
        "nn.Module.compile": lambda module, **options: None,
        "nn.functional.scaled_dot_product_attention": functools.partial(_attend, F.scaled_dot_product_attention),
        "nn.attention.flex_attention.flex_attention": _attend_flexibly,
    }
    with pytest.MonkeyPatch.context() as patch, recorded_launches(), _Redirect(), dry:
        patch.setattr(launch, "_device_capability", functools.cache(launch._device_capability.__wrapped__))
        for name, stand_in in stand_ins.items():
            patch.setattr(f"torch.{name}", stand_in)
        yield dry


def compare_shapes(name: str, actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> numerics.Errors:
    """Stand in for the error budget: what would be compared fits together."""
    kinds = [(x.shape, x.device) for x in (actual, plain, exact)]
    assert kinds[0] == kinds[1] == kinds[2], f"{name}: {kinds}"
    assert actual.dtype == plain.dtype or plain.dtype == torch.float32, f"{name}: {actual.dtype}, {plain.dtype}"
    return numerics.Errors(0.0, 0.0, 1.0, 1.0)


def _same_kind(actual: Any, expected: Any, **tolerances: Any) -> bool:
    pairs = zip(actual, expected, strict=True) if isinstance(actual, (list, tuple)) else [(actual, expected)]
    for one, other in pairs:
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device), f"{one} and {other}"
    return True


def pytest_configure() -> None:
    """Before tests are imported: they ask for a GPU then, and take the comparison by name."""
    torch.cuda.is_available = lambda: True
    numerics.assert_error_budget = compare_shapes


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Run a test on the pretended device."""
    with dry_cuda(), mock.patch("torch.equal", _same_kind), mock.patch("torch.testing.assert_close", _same_kind):
        return (yield)
