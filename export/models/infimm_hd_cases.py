"""What InfiMM-HD's graphs are verified with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from infimm_fast.export.common.cases import Case, random_inputs
from infimm_fast.export.common.spec import GraphSpec
from infimm_fast.export.models.infimm_hd import VISUAL_MULTIPLE, padded_visual_length
from infimm_fast.models.infimm_hd.position_embedding import THUMBNAIL
from infimm_fast.models.infimm_hd.visual_context import VisualContext, consecutive_ranges, count_images

if TYPE_CHECKING:
    from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig


@dataclass(frozen=True)
class _DecoderShape:
    """A batch of text: tiles of each picture of each row, new tokens, cached ones, padding of the last row."""

    name: str
    pictures: tuple[tuple[int, ...], ...]
    length: int
    past: int = 0
    padding: int = 0


_DECODER_SHAPES = (
    _DecoderShape("one tile", ((1,),), 6),
    _DecoderShape("ten tiles", ((10,),), 5),
    _DecoderShape("several images in a row, padding", ((1, 2, 1), (2,)), 9, padding=3),
    _DecoderShape("a text-only row among others", ((2,), ()), 6, padding=2),
    _DecoderShape("text only", ((), ()), 4),
    _DecoderShape("a cache", ((1,), (1, 1)), 3, past=7, padding=2),
    _DecoderShape("one token after a cache", ((1,), ()), 1, past=9, padding=4),
    _DecoderShape("one token, nothing before", ((1,),), 1),
)
_TILE_COUNTS = (1, 2, 10)


def model_cases(graph: GraphSpec, config: InfiMMHDConfig) -> list[Case]:
    """Return the cases of one of the graphs; the numbers are random but the same every time."""
    if graph.name == "decoder":
        return [_decoder_case(graph, shape, config, seed) for seed, shape in enumerate(_DECODER_SHAPES)]
    return [_tile_case(graph, tiles) for tiles in _TILE_COUNTS]


def _tile_case(graph: GraphSpec, tiles: int) -> Case:
    inputs = random_inputs(graph, {"num_tiles": tiles}, tiles)
    if graph.name == "vision":
        places = [(tile // 3, tile % 3) for tile in range(tiles - 1)]
        inputs["tile_positions"] = torch.tensor([*places, THUMBNAIL if tiles > 1 else (0, 0)])
    return Case(f"{tiles} tile{'s' if tiles > 1 else ''}", inputs)


def _decoder_case(graph: GraphSpec, shape: _DecoderShape, config: InfiMMHDConfig, seed: int) -> Case:
    rows, total = len(shape.pictures), shape.past + shape.length
    tokens_per_tile = config.visual_tokens_per_tile
    generator = torch.Generator().manual_seed(seed)
    special = (config.image_token_id, config.end_of_chunk_token_id)
    ids = torch.randint(config.text_config.vocab_size, (rows, total), generator=generator)
    ids[(ids == special[0]) | (ids == special[1])] = 1
    mask = torch.ones(rows, total, dtype=torch.int64)
    mask[-1, : shape.padding] = 0
    for row, pictures in enumerate(shape.pictures):
        start = 1 + (shape.padding if row == rows - 1 else 0)  # the first token comes before the first picture
        ids[row, [min(start + 2 * index, total - 1) for index in range(len(pictures))]] = config.image_token_id
    tiles = [count for pictures in shape.pictures for count in pictures]
    row_images = consecutive_ranges(torch.tensor([len(pictures) for pictures in shape.pictures]))
    offsets = torch.tensor([0, *tiles]).cumsum(0) * tokens_per_tile
    context = VisualContext(torch.empty(0), offsets, row_images)
    seen = count_images(ids == config.image_token_id)[:, shape.past :]
    visual_length = max(padded_visual_length(sum(tiles) * tokens_per_tile), VISUAL_MULTIPLE)
    free = {"batch_size": rows, "past_sequence_length": shape.past, "visual_length": visual_length}
    inputs = random_inputs(graph, free, seed) | {
        "input_ids": ids[:, shape.past :].contiguous(),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, shape.past :].contiguous(),
        "kv_range": context.kv_range(seen, config.only_attend_immediate_image),
        "has_image": context.images_per_row > 0,
    }
    # What comes out at padding is nobody's business.
    real = mask.bool()
    compared = {tensor.name: real[:, None, :, None] for tensor in graph.outputs}
    compared["logits"] = real[:, shape.past :, None]
    return Case(shape.name, inputs, compared)
