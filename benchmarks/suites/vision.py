"""The vision tower on the tiles of one picture."""

from __future__ import annotations

import torch

from infimm_fast.benchmarks.cases import vision_bytes, vision_flops
from infimm_fast.benchmarks.registry import BenchCase, Plan, Run
from infimm_fast.benchmarks.suites.model import ModelStage, load_model, register_model_stage
from infimm_fast.kernels.common.cases import Inputs
from infimm_fast.kernels.common.numerics import outlier_normal


class VisionTower(ModelStage):
    """Pixels ``[tiles, 3, S, S]`` to features, up to the block that the language model sees."""

    name, section = "vision_tower", "vision"
    largest_graph = 1

    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return the preset's numbers of tiles."""
        config = plan.config
        return [
            BenchCase(
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

    def make_inputs(self, case: BenchCase, device: torch.device, seed: int) -> Inputs:
        """Return the model and normalised pixels."""
        model = load_model(case.preset, case.dtype, device)
        vision = model.config.vision_config
        shape = (case.sizes["tiles"], vision.num_channels, vision.image_size, vision.image_size)
        return {"model": model, "pixels": outlier_normal(*shape, dtype=case.torch_dtype, device=device, seed=seed)}

    def make_run(self, case: BenchCase, inputs: Inputs) -> Run:
        """Return a pass of the tower."""
        model, pixels = inputs["model"], inputs["pixels"]
        return lambda: model.vision_tower(pixels, model.config.vision_feature_layer)


register_model_stage(VisionTower(), gated_blocks=False)
