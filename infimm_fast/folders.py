"""Folders that appear whole or not at all: written beside their place, moved there at the end, one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from infimm_fast.errors import CheckpointError


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `destination` if the block succeeds, and vanishes if it does not.

    What a killed process left behind is removed by the next one.

    Args:
        destination: must not exist or be an empty folder.

    Raises:
        CheckpointError: the destination is in use, or another process is writing it.
    """
    with _partial_folder(destination) as partial:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise CheckpointError(f"{destination} exists already and is not an empty folder")
        yield partial
        partial.replace(destination)  # the system allows it over an empty folder


@contextlib.contextmanager
def updated_folder(destination: Path, generation: re.Pattern[str]) -> Iterator[Path]:
    """Yield an empty folder whose files move into `destination` if the block succeeds; nothing is touched if it does not.

    Args:
        destination: a folder with or without other files, or none yet.
        generation: names of files that belong together; if any of them was written, older ones are removed.

    Raises:
        CheckpointError: another process is writing it.
    """
    with _partial_folder(destination) as partial:
        yield partial
        destination.mkdir(parents=True, exist_ok=True)
        written = {file.name for file in partial.iterdir()}
        for name in written:
            (partial / name).replace(destination / name)
        if any(generation.fullmatch(name) for name in written):
            for file in destination.iterdir():
                if generation.fullmatch(file.name) and file.name not in written:
                    file.unlink()


@contextlib.contextmanager
def _partial_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty folder beside `destination` that no other process writes, and remove what is left of it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.partial")
    handle = _lock(partial, destination)
    try:
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(handle)


def _lock(folder: Path, destination: Path) -> int:
    """Make and lock a folder; the system lets go of the lock when the process ends, whatever ends it."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its owner has just finished
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The owner before us may have moved the folder away after we opened it.
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
            os.close(handle)
        except BlockingIOError as error:
            os.close(handle)
            raise CheckpointError(f"{destination} is being written by another process; wait for it or stop it") from error
