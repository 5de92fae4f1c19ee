"""The spelling of dtypes in every command, file and table: PyTorch's own names."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for ``torch.bfloat16``, and so on."""
    return str(dtype).removeprefix("torch.")
