"""What all tests share: few threads, and a skip with its reason for what this machine lacks."""

import importlib.util
import os

# The models are tiny: more threads only wait for each other, for minutes if another job uses the cores. Set before torch
# is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# Workers of pytest-xdist fix the terminal's width; tests of the command line choose it themselves.
os.environ.pop("COLUMNS", None)

import pytest
import torch

from interpreter import InterpreterProcess


def pytest_collection_modifyitems(items):
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA GPU"
    if importlib.util.find_spec("tensorrt") is None:
        missing["tensorrt"] = "needs the TensorRT runtime"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def pictures():
    """Noise pictures whose grids are 1x1, 1x2, 2x2, 2x1."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    sizes = ((100, 100), (100, 230), (200, 220), (240, 90))
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def interpreter():
    """A process that runs Triton kernels on CPU tensors, kept for all tests of a file."""
    process = InterpreterProcess()
    yield process
    process.close()
