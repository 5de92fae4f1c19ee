"""Kernels as files: PTX and cubin of each, and one description of how to launch them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from infimm_fast.dtypes import DTYPES, dtype_name
from infimm_fast.export.common.errors import ArtifactError, ExportError
from infimm_fast.export.to_kernels.recipes import RECIPES, Recipe, Request, describe_parameter, sources_of
from infimm_fast.kernels.common.configs import ARCHITECTURES
from infimm_fast.kernels.common.launch import MAX_HEAD_DIM, TRITON_INSTALLED
from infimm_fast.kernels.common.offline import assemble, compile_source

DESCRIPTION = "kernels.json"
FORMAT = 1
Files = tuple[dict[str, Any], str, bytes]  # description, PTX, cubin
ABOUT = (
    "Launch a kernel with grid [programs, 1, 1], where `grid` gives the number of programs, block [threads, 1, 1], and "
    "shared_memory bytes of dynamic shared memory; above 48 KB set CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES first. "
    "Pass the parameters in the order given. Pointers must be aligned to 16 bytes. Names in capitals are constants, "
    "compiled in. Strides must be multiples of ALIGN elements, and are passed divided by it."
)


def export_kernels(
    out: str | Path,
    sms: Sequence[int],
    *,
    head_dims: Sequence[int] = (64, 112),
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    heads: int = 16,
    processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Compile the inference kernels of both attention ops for some GPUs; none is needed.

    Args:
        out: folder to make, with ``kernels.json``, a ``.ptx`` and a ``.cubin`` for each kernel. One that an earlier
            export made is replaced.
        sms: compute capabilities, for example ``(90, 120)``.
        head_dims: multiples of 8 up to 128.
        dtypes: "float32", "float16", "bfloat16".
        heads: of the contiguous kernels, which have it compiled in.
        processes: that compile at the same time.
        progress: called with (calls of ops compiled, calls in all) after each of them.

    Returns:
        The folder.

    Raises:
        ExportError: an argument is not accepted, or triton is not installed.
        ArtifactError: `out` exists and is something else.
    """
    _check(sms, head_dims, dtypes, heads)
    out = Path(out)
    if out.exists() and not (out / DESCRIPTION).is_file():
        raise ArtifactError(f"{out} exists and holds no {DESCRIPTION}; give a new folder, or one of an earlier export")
    requests = [Request(heads, dim, DTYPES[dtype], sm) for sm in sms for dim in head_dims for dtype in dtypes]
    jobs = [(recipe, request) for request in requests for recipe in RECIPES]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rows: list[dict[str, Any]] = []
        for done, kernels in enumerate(_compile_all(jobs, processes), 1):
            for row, ptx, cubin in kernels:
                for suffix, content in (("ptx", ptx.encode()), ("cubin", cubin)):
                    (partial / f"{row['name']}.{suffix}").write_bytes(content)
                    row[suffix] = {"file": f"{row['name']}.{suffix}", "sha256": hashlib.sha256(content).hexdigest()}
                rows.append(row)
            if progress is not None:
                progress(done, len(jobs))
        _write_description(partial / DESCRIPTION, rows)
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _check(sms: Sequence[int], head_dims: Sequence[int], dtypes: Sequence[str], heads: int) -> None:
    if not TRITON_INSTALLED:
        raise ExportError("compiling kernels needs the triton package; pip install 'infimm-fast[gpu]'")
    if not sms or not set(sms) <= set(ARCHITECTURES):
        raise ExportError(f"sms={list(sms)} is not accepted; choose from {', '.join(map(str, ARCHITECTURES))}")
    if not head_dims or any(dim % 8 or not 0 < dim <= MAX_HEAD_DIM for dim in head_dims):
        raise ExportError(f"head_dims={list(head_dims)} is not accepted; give multiples of 8 up to {MAX_HEAD_DIM}")
    if not dtypes or not set(dtypes) <= set(DTYPES):
        raise ExportError(f"dtypes={list(dtypes)} is not accepted; choose from {', '.join(DTYPES)}")
    if heads < 1:
        raise ExportError(f"heads={heads} is not accepted; it must be at least 1")


def _compile_all(jobs: Sequence[tuple[Recipe, Request]], processes: int) -> Iterator[list[Files]]:
    if processes <= 1:
        yield from map(compile_recipe, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_recipe, jobs)


def compile_recipe(job: tuple[Recipe, Request]) -> list[Files]:
    """Return (description, PTX, cubin) of every kernel of one recipe."""
    recipe, request = job
    dtype = dtype_name(request.dtype)
    results = []
    for source, _, _ in sources_of(recipe, request):
        kernel = compile_source(source, request.sm)
        row = {
            "name": f"{recipe.op}.{recipe.variant}.{kernel.name}.d{request.head_dim}.{dtype}.sm{request.sm}",
            "op": recipe.op,
            "variant": recipe.variant,
            "about": recipe.about,
            "sm": request.sm,
            "head_dim": request.head_dim,
            "dtype": dtype,
            "entry": kernel.name,
            "parameters": [
                {"name": name, "type": kind, "meaning": describe_parameter(name)} for name, kind in kernel.parameters
            ],
            "constants": {name: value for name, value in kernel.constants.items() if value is not None},
            "grid": recipe.grids[kernel.name],
            "threads": 32 * kernel.num_warps,
            "shared_memory": kernel.shared,
        }
        results.append((row, kernel.ptx, assemble(kernel.ptx, request.sm)))
    return results


def _write_description(path: Path, rows: list[dict[str, Any]]) -> None:
    import triton

    import infimm_fast

    versions = {"infimm_fast": infimm_fast.__version__, "triton": triton.__version__, "torch": torch.__version__}
    path.write_text(json.dumps({"format": FORMAT, "about": ABOUT, "versions": versions, "kernels": rows}, indent=1) + "\n")


def _replace(partial: Path, out: Path) -> None:
    """Put a finished folder in the place of an older one."""
    if out.exists():
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)
