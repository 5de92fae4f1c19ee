"""Exported models on their runtimes: a picture and a prompt to the first token."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from infimm_fast.benchmarks import registry
from infimm_fast.benchmarks.registry import BenchCase, Plan, Prepared, Run, Stage
from infimm_fast.benchmarks.suites.model import check_deviation, make_ids
from infimm_fast.errors import ConfigurationError
from infimm_fast.kernels.common.cases import Inputs
from infimm_fast.kernels.common.numerics import Errors, outlier_normal
from infimm_fast.models.infimm_hd import costs

NAME = "exported_model"
_TOKENS = 32


class ExportedModel(Stage):
    """An artifact of `infimm_fast.export` as it stands in its folder.

    Its export compared it with PyTorch, and one that was never verified gets no figure. Providers are compared with the
    CPU's.
    """

    name, section = NAME, "export"
    wall_clock = True

    def cases(self, plan: Plan) -> list[BenchCase]:
        """Return one case for each artifact: a picture of the largest grid."""
        try:
            return [self._make_case(folder) for folder in plan.artifacts]
        except ValueError as error:  # what the exporters raise, whichever of them it is
            raise ConfigurationError(str(error)) from error

    @staticmethod
    def _make_case(folder: str) -> BenchCase:
        exported = _load(folder)
        config, dtype = exported.config, exported.manifest.dtype
        side = config.max_grid * config.vision_config.image_size
        picture = costs.picture_costs(config, side, side)
        text = (1, _TOKENS, 0, picture.visual_tokens)
        return BenchCase(
            name=f"{folder}, a picture of {side} x {side} and {_TOKENS} tokens",
            sizes={"tiles": picture.tiles, "grid": config.max_grid, "tokens": _TOKENS},
            dtype=dtype,
            flops=picture.flops + costs.language_flops(config, *text),
            bytes=costs.vision_bytes(config, dtype, picture.tiles) + costs.language_bytes(config, dtype, *text),
            importance=0,
            artifact=folder,
            pictures=1,
        )

    def make_inputs(self, case: BenchCase, device: torch.device, seed: int) -> Inputs:
        """Return tiles, grid and prompt on the host, where the runtimes take them."""
        config, host = _load(case.artifact).config, torch.device("cpu")
        size, channels = config.vision_config.image_size, config.vision_config.num_channels
        shape = (case.sizes["tiles"], channels, size, size)
        return {
            "pixels": outlier_normal(*shape, dtype=torch.float32, device=host, seed=seed),
            "grids": torch.full((1, 2), case.sizes["grid"]),
            "ids": make_ids(config, 1, case.sizes["tokens"], host),
        }

    def expected(self, case: BenchCase, inputs: Inputs) -> torch.Tensor:
        """Return the CPU provider's visual tokens."""
        return _prepare("cpu", case, inputs).run()

    def check(self, case: BenchCase, inputs: Inputs, expected: Any, implementation: str, run: Run) -> dict[str, Errors]:
        """Return the deviation from the CPU provider; see `Stage.check`."""
        assert _load(case.artifact).manifest.verified, "the artifact was never verified; export it again without --no-verify"
        return check_deviation("the CPU provider", run(), expected, case.dtype)


def _load(folder: str, provider: str = "cpu") -> Any:
    # Here, since exporters need packages that no other section does.
    from infimm_fast.export import load

    return load(folder, provider)


def _prepare(provider: str, case: BenchCase, inputs: Inputs) -> Prepared:
    exported = _load(case.artifact, provider)
    pixels, grids, ids = inputs["pixels"], inputs["grids"], inputs["ids"]
    one = torch.ones(1, dtype=torch.int64)

    def encode() -> Any:
        return exported.encode_tiles(pixels, grids, one)

    def first_token(encoded: Any) -> torch.Tensor:
        exported.generate_tokens(ids, torch.ones_like(ids), encoded, max_new_tokens=1)
        return exported.backend.to_tensor(encoded.features).float()

    stages: dict[str, Run] = {"encode": encode, "first token": partial(first_token, encode())}
    return Prepared(lambda: first_token(encode()), stages)


registry.register_stage(ExportedModel())
for _provider in ("cpu", "cuda", "tensorrt"):
    _properties = {} if _provider == "cpu" else {"requires": registry.needs_cuda}
    _register = registry.register_implementation(NAME, f"onnxruntime {_provider}", graph=False, **_properties)
    _register(partial(_prepare, _provider))
