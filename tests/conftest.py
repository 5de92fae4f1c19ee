"""What all tests share: tests that need hardware this machine lacks are skipped, with the reason counted."""

import importlib.util

import pytest
import torch


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
