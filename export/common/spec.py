"""What an exporter knows of a model: its graphs, with the names, dtypes and axes of their inputs and outputs.

Three graphs make a model. Shapes are written with numbers for fixed sizes and names for free axes::

    vision      pixel_values [num_tiles, 3, S, S], tile_positions [num_tiles, 2]
                    -> image_features [num_tiles, tokens_per_tile, C]
    cross_kv    image_features
                    -> cross_key_values.{i}.key / .value [visual_length, heads, head_dim]     for each gated block
    decoder     input_ids, position_ids [batch_size, sequence_length], attention_mask [batch_size, total_sequence_length],
                kv_range [batch_size, sequence_length, 2], has_image [batch_size],
                past_key_values.{i}.key / .value [batch_size, kv_heads, past_sequence_length, head_dim]   for each layer,
                cross_key_values.{i}.key / .value
                    -> logits [batch_size, sequence_length, vocabulary],
                       present.{i}.key / .value [batch_size, kv_heads, total_sequence_length, head_dim]

`tile_positions` is (row, column) of a sub-image and (-1, -1) of a thumbnail. `visual_length` is the number of visual tokens
rounded up to a multiple of 8; the tokens added are zero and in nobody's interval. `kv_range` says which of them each text
token sees. `has_image` says whether a row has any picture: text before a row's first picture sees nothing either, but goes
through the gated feed-forward, while a row without pictures passes the gated blocks unchanged, so that `kv_range` alone
cannot tell the two apart. A batch without any picture still gives the decoder one (dummy) visual token.

Pixels and logits are float32 whatever the weights' dtype, so that a program on the host needs no 16-bit numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from infimm_fast.export.common.errors import ExportError, LimitError
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig

GRAPHS = ("vision", "cross_kv", "decoder")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALL_DTYPES = DTYPES | {"int64": torch.int64, "bool": torch.bool}
VISUAL_MULTIPLE = 8

# Sizes of the free axes in the samples that a graph is traced with. Different from each other, and from 0 and 1, which
# tracing would take for constants.
SAMPLE_SIZES = {
    "num_tiles": 3,
    "batch_size": 2,
    "sequence_length": 5,
    "past_sequence_length": 6,
    "total_sequence_length": 11,
    "visual_length": 24,
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: in the graph.
        dtype: "float32", "float16", "bfloat16", "int64" or "bool".
        shape: sizes of fixed axes, names of free ones.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch's."""
        return ALL_DTYPES[self.dtype]

    @property
    def free_axes(self) -> dict[int, str]:
        """Axis -> name of every free axis."""
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}

    def sizes(self, free: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with numbers in place of the free axes' names."""
        return tuple(free[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class GraphSpec:
    """One graph: a module's inputs in the order of its arguments, and its outputs.

    Attributes:
        name: "vision", "cross_kv" or "decoder" for a model.
        inputs: flat, in order.
        outputs: flat, in order.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __iter__(self) -> Iterator[TensorSpec]:
        """Iterate over inputs and outputs."""
        yield from self.inputs
        yield from self.outputs

    def resolve_axes(self, shapes: Mapping[str, tuple[int, ...]], limits: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Return the size of every free axis in the shapes of actual inputs.

        Args:
            shapes: input name -> shape.
            limits: free axis -> (smallest, largest) size; axes that are not named have no limit.

        Raises:
            LimitError: an input is missing, has another shape, disagrees with another input, or lies outside the limits.
        """
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name not in shapes:
                raise LimitError(f"{self.name} needs the input {spec.name}; given are {', '.join(shapes) or 'none'}")
            shape = tuple(shapes[spec.name])
            fits = len(shape) == len(spec.shape) and all(
                have == (sizes.setdefault(want, have) if isinstance(want, str) else want)
                for have, want in zip(shape, spec.shape, strict=True)
            )
            if not fits:
                known = {axis: sizes[axis] for axis in spec.free_axes.values() if axis in sizes}
                raise LimitError(f"{spec.name} has shape {list(shape)}; {self.name} takes {list(spec.shape)} with {known}")
        for axis, size in sizes.items():
            smallest, largest = limits.get(axis, (0, size))
            if not smallest <= size <= largest:
                raise LimitError(f"{axis} is {size}; this artifact takes {smallest} to {largest}")
        return sizes


def padded_visual_length(tokens: int) -> int:
    """Return the visual length of so many visual tokens."""
    return (tokens + VISUAL_MULTIPLE - 1) // VISUAL_MULTIPLE * VISUAL_MULTIPLE


def check_graphs(graphs: tuple[str, ...]) -> None:
    """Raise `ExportError` unless there are graphs and all names are known."""
    if not graphs or not set(graphs) <= set(GRAPHS):
        raise ExportError(f"graphs={graphs!r} is not accepted; choose from {', '.join(GRAPHS)}")


def check_dtype(dtype: str) -> None:
    """Raise `ExportError` unless a dtype's name is known."""
    if dtype not in DTYPES:
        raise ExportError(f"dtype={dtype!r} is not accepted; choose one of {', '.join(DTYPES)}")


def _key_values(name: str, count: int, dtype: str, shape: tuple[int | str, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(f"{name}.{i}.{part}", dtype, shape) for i in range(count) for part in ("key", "value"))


def model_graphs(config: InfiMMHDConfig, dtype: str) -> dict[str, GraphSpec]:
    """Return the three graphs of a model.

    Args:
        config: the model's configuration.
        dtype: of the weights and of everything between the graphs.

    Raises:
        ExportError: the dtype is not known.
    """
    check_dtype(dtype)
    vision, text = config.vision_config, config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    side, channels = vision.image_size, vision.num_channels
    features = TensorSpec("image_features", dtype, ("num_tiles", config.visual_tokens_per_tile, vision.hidden_size))
    cross_shape = ("visual_length", config.cross_attention_heads, config.cross_attention_head_dim)
    cross = _key_values("cross_key_values", len(config.gated_layers), dtype, cross_shape)
    tokens = ("batch_size", "sequence_length")
    past, present = (
        _key_values(name, text.num_hidden_layers, dtype, ("batch_size", heads, axis, head_dim))
        for name, axis in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length"))
    )
    return {
        "vision": GraphSpec(
            "vision",
            (
                TensorSpec("pixel_values", "float32", ("num_tiles", channels, side, side)),
                TensorSpec("tile_positions", "int64", ("num_tiles", 2)),
            ),
            (features,),
        ),
        "cross_kv": GraphSpec("cross_kv", (features,), cross),
        "decoder": GraphSpec(
            "decoder",
            (
                TensorSpec("input_ids", "int64", tokens),
                TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
                TensorSpec("position_ids", "int64", tokens),
                TensorSpec("kv_range", "int64", (*tokens, 2)),
                TensorSpec("has_image", "bool", ("batch_size",)),
                *past,
                *cross,
            ),
            (TensorSpec("logits", "float32", (*tokens, text.vocab_size)), *present),
        ),
    }


def most_positions(config: InfiMMHDConfig) -> int:
    """Return the longest text that the decoder graph is right for: of a sliding window only what fits into it."""
    text = config.text_config
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return min(text.max_position_embeddings, window or text.max_position_embeddings)


def default_limits(config: InfiMMHDConfig) -> dict[str, tuple[int, int]]:
    """Return (smallest, largest) size of each free axis; the largest ones are chosen generously and bound memory only."""
    positions = most_positions(config)
    return {
        "num_tiles": (1, 1024),
        "batch_size": (1, 1024),
        "sequence_length": (1, positions),
        "past_sequence_length": (0, positions - 1),
        "total_sequence_length": (1, positions),
        "visual_length": (1, 1024 * config.visual_tokens_per_tile + VISUAL_MULTIPLE),
    }
