"""Kernels with a mistake: what shows that a comparison can fail."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from interpreter import load_file


@contextlib.contextmanager
def mutated(op: str, mutation: tuple[str, str, str] | None) -> Iterator[None]:
    """Run an op's kernels with a piece of one file's source replaced.

    Every device function of that file is replaced in all modules of the op that use it by name.

    Args:
        op: name of the folder below kernels/.
        mutation: (file of the op without its ending, or "common/tiles"; text that occurs in it once; replacement). None
            changes nothing.
    """
    if mutation is None:
        yield
        return
    package = importlib.import_module(f"infimm_fast.kernels.{op}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{package.__name__}.")]
    name, old, new = mutation
    source = (Path(package.__path__[0]) / (f"../{name}.py" if "/" in name else f"{name}.py")).read_text()
    assert source.count(old) == 1, f"{name}.py holds {old!r} {source.count(old)} times; the mutation needs exactly one"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / f"{op}_{name.replace('/', '_')}_{abs(hash(mutation))}.py"
        path.write_text(source.replace(old, new))
        mutant = load_file(path)
        for attribute, value in vars(mutant).items():
            if getattr(getattr(value, "fn", None), "__module__", None) != mutant.__name__:
                continue  # no device function, or one of another file
            for module in modules:
                if attribute in vars(module):
                    stack.enter_context(mock.patch.object(module, attribute, value))
        yield
