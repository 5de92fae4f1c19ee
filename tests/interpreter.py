"""A process in which Triton kernels run on CPU tensors, and files outside every package."""

from __future__ import annotations

import importlib.util
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch


class InterpreterProcess:
    """A process of its own with ``TRITON_INTERPRET=1``, in which kernels run on CPU tensors.

    The switch has to be set before triton is imported and would change every kernel of the calling process. The process
    is kept, so that a test pays for its kernels and not for importing torch.
    """

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_enable_interpreter)

    def call(self, path: Path | str, function: str, **arguments: Any) -> Any:
        """Run a function of a Python file there and return its result, or raise its exception.

        Args:
            path: the file.
            function: name of a function in it.
            arguments: keyword arguments, picklable.
        """
        return self._pool.submit(_call, str(path), function, arguments).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _enable_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def load_file(path: Path | str) -> Any:
    """Import a Python file that lies outside every package, once; later calls return the same module."""
    name = f"infimm_fast_tests_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _call(path: str, function: str, arguments: dict[str, Any]) -> Any:
    return getattr(load_file(path), function)(**arguments)
