"""The vision tower on the tiles of one picture."""

from __future__ import annotations

import torch

from infimm_fast.benchmarks.cases import vision_bytes, vision_flops
from infimm_fast.benchmarks.inputs import random_tensor
from infimm_fast.benchmarks.registry import Case, Inputs, Plan, Run, register_op
from infimm_fast.benchmarks.suites.model import ModelOp, load_model, register_model_implementations


@register_op
class VisionTower(ModelOp):
    """Pixels ``[tiles, 3, S, S]`` to features, up to the block that the language model sees."""

    name = "vision_tower"
    section = "vision"
    largest_graph = 1

    def cases(self, plan: Plan) -> list[Case]:
        """Return the preset's numbers of tiles."""
        config = plan.config
        return [
            Case(
                name=f"{tiles} tile{'s' * (tiles > 1)}",
                sizes={"tiles": tiles},
                dtype=plan.dtype,
                flops=vision_flops(config, tiles),
                bytes=vision_bytes(config, plan.dtype, tiles),
                importance=0 if tiles == plan.tile_counts[-1] else 2,
                series=(("vision tower", "tiles", tiles),),
                preset=plan.preset,
            )
            for tiles in plan.tile_counts
        ]

    def make_inputs(self, case: Case, device: torch.device, seed: int) -> Inputs:
        """Return the model and normalised pixels."""
        model = load_model(case.preset, case.dtype, device)
        vision = model.config.vision_config
        shape = (case.sizes["tiles"], vision.num_channels, vision.image_size, vision.image_size)
        return {"model": model, "pixels": random_tensor(*shape, dtype=case.torch_dtype, device=device, seed=seed)}

    def make_run(self, case: Case, inputs: Inputs) -> Run:
        """Return a pass of the tower."""
        model, pixels = inputs["model"], inputs["pixels"]
        return lambda: model.vision_tower(pixels, model.config.vision_feature_layer)


register_model_implementations(VisionTower, gated_blocks=False)
