"""Places the weights of a traced graph: streamed into a data file, or as offsets into safetensors files that exist."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from infimm_fast.errors import CheckpointError
from infimm_fast.export.common.artifact import writing
from infimm_fast.export.to_onnx.trace import TracedGraph, cast_tensor

# Smaller tensors are kept in the graph's file.
_INLINE_BYTES = 1024
# So that a runtime can map every tensor aligned.
_ALIGNMENT = 64
_PIECE_BYTES = 32 * 2**20

_SAFETENSORS_DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file."""

    file: str
    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]


def index_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the safetensors files of a folder by name.

    Raises:
        CheckpointError: a file's header cannot be read, or there is no file.
    """
    found = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file whose weights could be shared")
    for file in files:
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
        except (struct.error, ValueError, MemoryError, OverflowError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in _SAFETENSORS_DTYPES:
                begin, end = entry["data_offsets"]
                kind, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
                found[name] = StoredTensor(file.name, 8 + length + begin, end - begin, kind, shape)
    return found


def transpose_weights(graph: TracedGraph) -> None:
    """Turn every weight that the graph transposes into a weight stored transposed.

    A linear layer is a product with the transposed weight. Runtimes would transpose it when they load the graph, and hold
    both.
    """
    model = graph.model
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        if source is None or source.name not in graph.weights or len(list(source.uses())) != 1:
            continue
        tensor, kept = graph.weights[source.name], source.const_value
        if tensor.dim() != 2 or tuple(node.attributes["perm"].as_ints()) != (1, 0) or kept is None:
            continue
        name, shape = f"{source.name}.transposed", ir.Shape(tuple(tensor.t().shape))
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(kept.dtype))
        read = functools.partial(cast_tensor, tensor.t(), tensor_adapters.to_torch_dtype(kept.dtype))
        value.const_value = ir.LazyTensor(read, kept.dtype, shape, name=name)
        del graph.weights[source.name], model.graph.initializers[source.name]
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        model.graph.remove(node, safe=True)
        model.graph.initializers[name] = value
        graph.weights[name] = tensor.t()


def place_weights(
    graph: TracedGraph,
    folder: Path,
    data_name: str,
    stored: dict[str, StoredTensor] | None,
    on_bytes: Callable[[int], None],
) -> set[str]:
    """Write a graph's weights, one at a time, and point the graph at them.

    Args:
        graph: a traced graph; every weight becomes external data.
        folder: where the graph's file will lie.
        data_name: name of the data file to write there.
        stored: tensors of safetensors files in the same folder, by the weights' names; those of the same dtype and shape
            are used where they are.
        on_bytes: told the size of each tensor that was placed.

    Returns:
        Names of the files that the graph points at.
    """
    used: set[str] = set()
    written: dict[int, tuple[int, int]] = {}
    with writing(folder / data_name) as partial, partial.open("wb") as stream:
        for name, value in graph.model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None, name
            weight = graph.weights.get(name)
            shape = tuple(tensor.shape.numpy())
            place = (stored or {}).get(name) if weight is not None else None
            if place is not None and (place.dtype, place.shape) == (tensor.dtype, shape):
                used.add(place.file)
                value.const_value = _external(name, tensor, place.file, place.offset, place.length)
                on_bytes(place.length)
                continue
            if weight is None and tensor.nbytes < _INLINE_BYTES:
                continue
            # Tied weights are one tensor under two names.
            key = id(weight) if weight is not None else id(tensor)
            if key not in written:
                stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
                begin = stream.tell()
                for piece in [tensor] if weight is None else _pieces(weight, tensor.dtype):
                    stream.write(piece.numpy().reshape(-1).view("uint8").data)
                written[key] = (begin, stream.tell() - begin)
            value.const_value = _external(name, tensor, data_name, *written[key])
            on_bytes(tensor.nbytes)
    if written:
        used.add(data_name)
    else:
        (folder / data_name).unlink()
    return used


def _pieces(weight: torch.Tensor, dtype: ir.DataType) -> Iterator[ir.TensorProtocol]:
    """Yield a weight in its order of rows, cast, in pieces: it may be transposed, and would be copied as a whole."""
    kind = tensor_adapters.to_torch_dtype(dtype)
    rows = weight.reshape(1) if weight.dim() == 0 else weight
    count = max(1, _PIECE_BYTES * rows.shape[0] // max(rows.nbytes, 1))
    return (cast_tensor(piece, kind) for piece in rows.split(count))


def _external(name: str, tensor: ir.TensorProtocol, file: str, offset: int, length: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(file, offset, length, tensor.dtype, shape=tensor.shape, name=name)  # type: ignore[arg-type]


def weight_bytes(graph: TracedGraph) -> int:
    """Return the size of a traced graph's weights as they will be stored."""
    values = (graph.model.graph.initializers[name].const_value for name in graph.weights)
    return sum(tensor.nbytes for tensor in values if tensor is not None)
