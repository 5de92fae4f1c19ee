"""A model that infimm_fast has never heard of, as two ONNX graphs: a CLIP tower of Transformers and a projector behind it.

Run it with ``python examples/export_own_family.py``; it needs ``infimm-fast[onnx]``. The weights are random.
"""

import tempfile

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from infimm_fast import register_auto
from infimm_fast.export import Family, GraphSpec, TensorSpec, export_onnx, load, register_family


class Tower(nn.Module):
    """The tower, with a tensor in place of Transformers' output class."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.clip = CLIPVisionModel._from_config(config, attn_implementation="infimm_fast")

    def forward(self, pixel_values):
        """Return features [num_tiles, 17, 144]."""
        return self.clip(pixel_values=pixel_values).last_hidden_state


class TowerAndProjector(nn.Module):
    """The model; its ``config`` is what the family reads sizes from."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config, self.tower, self.projector = config, Tower(config), nn.Linear(config.hidden_size, 96)


class TowerAndProjectorFamily(Family):
    """What exporters and runtimes need to know of it."""

    name, model_class, graphs = "tower_and_projector", "TowerAndProjector", ("tower", "projector")

    def specs(self, config, dtype):
        """Declare inputs and outputs; "num_tiles" is a free axis."""
        pixels = TensorSpec("pixel_values", "float32", ("num_tiles", 3, config.image_size, config.image_size))
        features = TensorSpec("features", dtype, ("num_tiles", 17, config.hidden_size))
        tower = GraphSpec("tower", (pixels,), (features,))
        projected = TensorSpec("projected", dtype, ("num_tiles", 17, 96))
        return {"tower": tower, "projector": GraphSpec("projector", (features,), (projected,))}

    def modules(self, model):
        """Return what computes each graph."""
        return {"tower": model.tower, "projector": model.projector}


register_auto()  # Transformers' towers find our attention by name; in the file it is one node
register_family(TowerAndProjectorFamily())
sizes = {"hidden_size": 144, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 56, "patch_size": 14}
model = TowerAndProjector(CLIPVisionConfig(intermediate_size=288, **sizes)).eval()
pixels = torch.randn(5, 3, 56, 56)
with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
    exported = load(export_onnx(model, f"{scratch}/artifact"))
    features = exported.run("tower", {"pixel_values": pixels})  # stays on the runtime's device
    projected = exported.compute("projector", **features)["projected"]
    difference = (projected - model.projector(model.tower(pixels))).abs().max().item()
print(f"ONNX Runtime and PyTorch differ by {difference:.1e}")
if difference > 1e-4:
    raise SystemExit("that is too much")
