"""Reading checkpoints tensor by tensor, and writing safetensors shards in a stream: neither ever holds the whole."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from infimm_fast.errors import CheckpointError

PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
_WRAPPERS = ("state_dict", "model", "module")
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class CheckpointReader:
    """Tensors of one or several checkpoint files by name, read one at a time through a memory map.

    Args:
        path: a ``.ckpt`` / ``.bin`` / ``.pt`` / ``.pth`` file in PyTorch's zip format, a ``.safetensors`` file, or a folder
            of one of these kinds.
        release_bytes: after reading this much from a file its memory map is opened anew, so that the pages read so far
            leave this process.

    Raises:
        CheckpointError: no checkpoint there, or not in an accepted format.
    """

    def __init__(self, path: Path, release_bytes: int = 128 * 2**20):
        self._release_bytes = release_bytes
        self._read_since_open = 0
        self._open_file: tuple[Path, Any] | None = None
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in _checkpoint_files(path):
            self._index(file)

    def _index(self, file: Path) -> None:
        tensors = self._open(file)
        for name in tensors.keys():  # noqa: SIM118 - safetensors' handle is no mapping
            if name in self._file_of:
                raise CheckpointError(f"{name} is stored in both {self._file_of[name].name} and {file.name}")
            tensor = tensors[name] if isinstance(tensors, dict) else tensors.get_slice(name)
            self._file_of[name] = file
            if isinstance(tensors, dict):
                self.shapes[name], self.dtypes[name] = tuple(tensor.shape), tensor.dtype
            else:
                self.shapes[name] = tuple(tensor.get_shape())
                self.dtypes[name] = _torch_dtype(name, tensor.get_dtype())

    def _open(self, file: Path) -> Any:
        if self._open_file is None or self._open_file[0] != file or self._read_since_open > self._release_bytes:
            self._open_file = None  # unmaps the old file before the new one is mapped
            self._read_since_open = 0
            opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
            self._open_file = (file, opened)
        return self._open_file[1]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; it may be backed by the memory map and is valid until the next read."""
        tensors = self._open(self._file_of[name])
        tensor = tensors[name] if isinstance(tensors, dict) else tensors.get_tensor(name)
        self._read_since_open += tensor.nbytes
        return tensor

    def same_storage(self, first: str, second: str) -> bool:
        """Whether two names of one pickle are the same memory, so that their values need no comparison."""
        if self._file_of[first] != self._file_of[second]:
            return False
        tensors = self._open(self._file_of[first])
        return isinstance(tensors, dict) and tensors[first].data_ptr() == tensors[second].data_ptr()


def _checkpoint_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
            raise CheckpointError(
                f"{path} has suffix {path.suffix!r}; accepted are {', '.join((*PICKLE_SUFFIXES, '.safetensors'))}"
            )
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    for suffixes in ((".safetensors",), PICKLE_SUFFIXES):
        files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
        if files:
            return files
    raise CheckpointError(f"{path} is not a checkpoint: it holds no {', '.join((*PICKLE_SUFFIXES, '.safetensors'))} file")


def _torch_dtype(name: str, code: str) -> torch.dtype:
    for dtype, known in _SAFETENSORS_DTYPES.items():
        if known == code:
            return dtype
    raise CheckpointError(f"{name} has dtype {code}; accepted are {', '.join(_SAFETENSORS_DTYPES.values())}")


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error


def _open_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Map a zip-format pickle; only tensors are unpickled, so no code in the file can run."""
    if not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is truncated or not in PyTorch's zip format, the only pickle format accepted")
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be loaded with weights_only=True: {error}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{file} holds no state dict")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{file} holds {name} of type {type(value).__name__}, not a tensor")
    return dict(content)


def write_safetensors(
    file: Path,
    entries: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
    load: Callable[[str], torch.Tensor],
    on_bytes: Callable[[int], None],
) -> None:
    """Write one safetensors file, loading each tensor only when its turn comes.

    Args:
        file: the file to write.
        entries: name, shape and dtype of each tensor.
        load: returns the tensor of a name, of that shape and dtype.
        on_bytes: told the size of each tensor written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    entries = list(entries)
    offset = 0
    for name, shape, dtype in entries:
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the data 8-byte aligned
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape, dtype in entries:
            tensor = load(name).contiguous()
            assert tuple(tensor.shape) == shape and tensor.dtype == dtype, name
            stream.write(tensor.flatten().view(torch.uint8).numpy().data)
            on_bytes(tensor.nbytes)
            del tensor  # or it would keep the memory map of its file alive while the next one is read
