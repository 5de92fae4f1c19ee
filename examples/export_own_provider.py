"""A runtime that infimm_fast has never heard of: ONNX's reference evaluator, in NumPy, as a provider of `load`.

Run it with ``python examples/export_own_provider.py``; it needs ``infimm-fast[onnx]``.
"""

import tempfile

import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from infimm_fast.export import Opening, export_module_onnx, load, register_provider


class Reference:
    """One evaluator for each graph; its values are NumPy's arrays, all on the host."""

    def __init__(self, opening: Opening):
        files = opening.manifest.graph_files
        self.graphs = {name: ReferenceEvaluator(str(opening.folder / file)) for name, file in files.items()}

    def run(self, graph, inputs, on_host=()):
        """Run a graph on tensors of the host and arrays of earlier runs."""
        evaluator = self.graphs[graph]
        results = evaluator.run(None, {name: np.asarray(value) for name, value in inputs.items()})
        return dict(zip(evaluator.output_names, results, strict=True))

    def zeros(self, dtype, shape):
        """Return zeros."""
        return np.zeros(shape, dtype)

    def to_tensor(self, value):
        """Return an array as a tensor."""
        return torch.from_numpy(value)


register_provider("reference", Reference)
torch.manual_seed(0)
module, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(3, 16)
with tempfile.TemporaryDirectory() as scratch:
    folder = export_module_onnx(module, {"input": x}, f"{scratch}/artifact", dynamic_axes={"input": {0: "rows"}})
    fast, slow = (load(folder, provider)(input=x)["output"] for provider in ("cpu", "reference"))
difference = (fast - slow).abs().max().item()
print(f"ONNX Runtime and the reference evaluator differ by {difference:.1e}")
if difference > 1e-5:
    raise SystemExit("that is too much")
