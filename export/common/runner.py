"""Answers questions about pictures with an exported model, whatever runtime is behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from infimm_fast.errors import ImageCountError
from infimm_fast.export.common.artifact import Manifest
from infimm_fast.export.common.errors import ArtifactError, LimitError
from infimm_fast.export.common.spec import VISUAL_MULTIPLE, TensorSpec, padded_visual_length
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.image_processing_infimm_hd import nest_images
from infimm_fast.models.infimm_hd.position_embedding import encode_places
from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor
from infimm_fast.models.infimm_hd.tiling import tile_count, tile_places
from infimm_fast.models.infimm_hd.visual_context import VisualContext, consecutive_ranges, count_images


class Backend(Protocol):
    """A runtime that runs graphs. Its values are its own; only what is asked for becomes a tensor on the host."""

    def run(self, graph: str, inputs: Mapping[str, Any], on_host: Collection[str] = ()) -> dict[str, Any]:
        """Run a graph on tensors of the host and values of earlier runs."""

    def zeros(self, dtype: str, shape: tuple[int, ...]) -> Any:
        """Return zeros."""

    def to_tensor(self, value: Any) -> torch.Tensor:
        """Return a value as a tensor on the host."""


@dataclass(frozen=True)
class EncodedImages:
    """Pictures of a batch, encoded once for any number of questions.

    Attributes:
        features: the runtime's ``image_features``; None for a batch without pictures.
        cross_key_values: input name -> the runtime's value.
        offsets: int64 ``[images + 1]``, tokens of each picture.
        row_images: int64 ``[rows, 2]``, half-open range of each row's pictures.
        visual_length: visual tokens, with padding.
    """

    features: Any
    cross_key_values: dict[str, Any]
    offsets: torch.Tensor
    row_images: torch.Tensor
    visual_length: int

    @property
    def context(self) -> VisualContext:
        """Which picture lies where; the tokens themselves are the runtime's, so `features` of it is empty."""
        return VisualContext(torch.empty(0), self.offsets, self.row_images)


class ExportedModel:
    """An exported model on a runtime.

    Made by `infimm_fast.export.load`.

    Args:
        manifest: of the artifact.
        backend: the runtime.
        processor: tokenizer and image processor; None for a folder without.
    """

    def __init__(self, manifest: Manifest, backend: Backend, processor: InfiMMHDProcessor | None):
        self.manifest, self.backend = manifest, backend
        self.config = InfiMMHDConfig.from_dict(manifest.config)
        self._processor = processor

    @property
    def processor(self) -> InfiMMHDProcessor:
        """Tokenizer and image processor."""
        if self._processor is None:
            raise ArtifactError("the artifact has no processor; export it with one, or use generate_tokens")
        return self._processor

    def need(self, *graphs: str) -> None:
        """Raise `ArtifactError` unless the artifact has these graphs."""
        missing = [graph for graph in graphs if graph not in self.manifest.graphs]
        if missing:
            raise ArtifactError(
                f"the artifact has no {' and no '.join(missing)} graph; it has {', '.join(self.manifest.graphs)}"
            )

    def run(
        self, graph: str, inputs: dict[str, Any], sizes: dict[str, tuple[int, ...]], on_host: Collection[str] = ()
    ) -> dict[str, Any]:
        """Run a graph once its inputs were checked.

        Args:
            graph: its name.
            inputs: tensors on the host, or values of earlier runs.
            sizes: shapes of those that are the runtime's values.
            on_host: outputs to copy to the host.

        Raises:
            LimitError: an input does not fit the declaration, or lies outside the limits.
        """
        shapes = {name: sizes.get(name) or tuple(value.shape) for name, value in inputs.items()}
        self.manifest.graphs[graph].resolve_axes(shapes, self.manifest.limits)
        return self.backend.run(graph, inputs, on_host)

    def encode(self, images: Any) -> EncodedImages:
        """Encode pictures once.

        Args:
            images: a picture (path, bytes, PIL), a list of them for one row, or a list of lists, one for each row.

        Raises:
            ImageInputError: a picture cannot be used.
            LimitError: there are more tiles than the artifact takes.
        """
        inputs = self.processor.image_processor(images)
        return self.encode_tiles(inputs["pixel_values"], inputs["image_grids"], inputs["image_counts"])

    def encode_tiles(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor, image_counts: torch.Tensor
    ) -> EncodedImages:
        """Encode tiles.

        Args:
            pixel_values: float32 ``[tiles, 3, S, S]``.
            image_grids: int64 ``[images, 2]``.
            image_counts: int64 ``[rows]``.
        """
        self.need("vision", "cross_kv")
        grids = image_grids.tolist()
        counts = [tile_count(rows, columns, self.config.always_thumbnail) for rows, columns in grids]
        if sum(counts) != len(pixel_values) or int(image_counts.sum()) != len(grids):
            raise ImageCountError(
                f"{len(pixel_values)} tiles, grids {grids} and counts {image_counts.tolist()} do not fit together"
            )
        places = encode_places(tile_places(grids, self.config.always_thumbnail))
        vision = self.run("vision", {"pixel_values": pixel_values.float(), "tile_positions": places}, {})
        features_shape = self.manifest.graphs["vision"].outputs[0].sizes({"num_tiles": len(pixel_values)})
        cross = self.run("cross_kv", vision, {"image_features": features_shape})
        return EncodedImages(
            features=vision["image_features"],
            cross_key_values=cross,
            offsets=torch.tensor([0, *counts]).cumsum(0) * features_shape[1],
            row_images=consecutive_ranges(image_counts),
            visual_length=padded_visual_length(features_shape[0] * features_shape[1]),
        )

    def generate(
        self,
        images: Any,
        prompt: str | list[str],
        *,
        encoded: EncodedImages | None = None,
        chat: bool = True,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> str | list[str]:
        """Answer a question about pictures, or several at once.

        Args:
            images: a picture, a list of pictures, a list of lists (one for each prompt), or None.
            prompt: the question, or a list of them.
            encoded: what `encode` made of `images`, to save encoding them again.
            chat: put the prompt into the chat template, pictures first; False takes it as it is, with ``<image>`` where a
                picture stands.
            max_new_tokens: longest answer.
            temperature: 0 for greedy decoding.
            top_p: with a temperature, sample from the most probable tokens that have this probability together.
            seed: of the sampling.

        Returns:
            The answer, or a list of answers.

        Raises:
            ImageCountError: pictures and ``<image>`` tokens do not fit together.
            LimitError: the prompt is longer than the artifact takes.
        """
        single = isinstance(prompt, str)
        inputs, encoded = self._prepare(images, [prompt] if isinstance(prompt, str) else prompt, encoded, chat)
        steps = self.generate_steps(
            inputs["input_ids"],
            inputs["attention_mask"],
            encoded,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        tokens = torch.stack(list(steps), dim=1)
        answers = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return answers[0] if single else answers

    def stream(self, images: Any, prompt: str, **options: Any) -> Iterator[str]:
        """Answer a question about pictures, piece by piece; see `generate`.

        Yields:
            Text as soon as it is complete: a token that ends inside a character waits for the next one.
        """
        inputs, encoded = self._prepare(images, [prompt], options.pop("encoded", None), options.pop("chat", True))
        tokens: list[int] = []
        told = ""
        for step in self.generate_steps(inputs["input_ids"], inputs["attention_mask"], encoded, **options):
            tokens.append(int(step))
            text = self.processor.decode(tokens, skip_special_tokens=True)
            if len(text) > len(told) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(told) :]
                told = text
        rest = self.processor.decode(tokens, skip_special_tokens=True)[len(told) :]
        if rest:
            yield rest

    def _prepare(
        self, images: Any, prompts: list[str], encoded: EncodedImages | None, chat: bool
    ) -> tuple[Mapping[str, torch.Tensor], EncodedImages | None]:
        """Return the tokens of prompts, and their pictures encoded."""
        processor = self.processor
        if encoded is None and images is not None:
            rows = nest_images(images)
            encoded = self.encode(rows) if any(rows) else None
        counts = [0] * len(prompts) if encoded is None else encoded.context.images_per_row.tolist()
        if len(counts) != len(prompts):
            raise ImageCountError(f"there are {len(prompts)} prompts, but images for {len(counts)}")
        if chat:
            prompts = [self._chat(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
        asked = [prompt.count(processor.image_token) for prompt in prompts]
        if asked != counts:
            raise ImageCountError(f"the prompts have {asked} <image> tokens, but there are {counts} images")
        tokens = processor.tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, padding_side="left")
        return tokens, encoded

    def _chat(self, prompt: str, images: int) -> str:
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def generate_tokens(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, encoded: EncodedImages | None = None, **options: Any
    ) -> torch.Tensor:
        """Return the tokens ``[B, n]`` that follow a prompt; see `generate_steps`."""
        return torch.stack(list(self.generate_steps(input_ids, attention_mask, encoded, **options)), dim=1)

    def generate_steps(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        encoded: EncodedImages | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Generate token by token.

        Args:
            input_ids: int64 ``[B, T]``, padded on the left.
            attention_mask: int64 ``[B, T]``.
            encoded: the pictures, None for text only.
            max_new_tokens: longest answer.
            temperature: see `generate`.
            top_p: see `generate`.
            seed: see `generate`.

        Yields:
            int64 ``[B]``, the next token of every row; the padding token for rows that have ended.

        Raises:
            LimitError: the prompt and the answer are longer than the artifact takes.
            ImageCountError: a row has more ``<image>`` tokens than pictures.
        """
        decoding = Decoding(self, input_ids, attention_mask, encoded, max_new_tokens)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        ends = torch.tensor(_as_list(self.manifest.generation.get("eos_token_id")), dtype=torch.int64)
        padding = self.manifest.generation.get("pad_token_id") or 0
        running = torch.ones(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            token = torch.where(running, _choose(decoding.step(), temperature, top_p, generator), padding)
            yield token
            running = running & ~torch.isin(token, ends)
            if not running.any():
                return
            decoding.append(token)


class Decoding:
    """One text being generated: the prompt's tokens first, then one token after the other.

    Args:
        model: the exported model.
        input_ids: the prompt, int64 ``[B, T]``, padded on the left.
        attention_mask: int64 ``[B, T]``.
        encoded: its pictures, None for text only.
        max_new_tokens: how many tokens will be asked for.

    Raises:
        LimitError: prompt and answer are longer than the artifact takes.
        ImageCountError: a row has more ``<image>`` tokens than pictures.
    """

    def __init__(
        self,
        model: ExportedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        encoded: EncodedImages | None,
        max_new_tokens: int,
    ):
        model.need("decoder")
        rows = len(input_ids)
        self._model = model
        self._encoded = encoded if encoded is not None else self._no_images(rows)
        self._context = self._encoded.context
        is_image = input_ids == model.config.image_token_id
        self._check(is_image, max_new_tokens)
        self._tokens, self._mask = input_ids, attention_mask
        self._positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        self._seen = count_images(is_image)
        self._past_length = 0
        free = {"batch_size": rows, "past_sequence_length": 0}
        self._past = {t.name: model.backend.zeros(t.dtype, t.sizes(free)) for t in self._specs("past_key_values.")}

    def _specs(self, prefix: str) -> list[TensorSpec]:
        return [tensor for tensor in self._model.manifest.graphs["decoder"].inputs if tensor.name.startswith(prefix)]

    def _no_images(self, rows: int) -> EncodedImages:
        """Stand in for the pictures of a batch without any: zeros that nobody sees."""
        free = {"visual_length": VISUAL_MULTIPLE}
        zeros = {t.name: self._model.backend.zeros(t.dtype, t.sizes(free)) for t in self._specs("cross_key_values.")}
        nothing = torch.zeros(1, dtype=torch.int64)
        return EncodedImages(None, zeros, nothing, torch.zeros(rows, 2, dtype=torch.int64), VISUAL_MULTIPLE)

    def _check(self, is_image: torch.Tensor, max_new_tokens: int) -> None:
        rows, length = is_image.shape
        available = self._context.images_per_row
        if len(available) != rows:
            raise ImageCountError(f"there are {rows} rows of text, but images for {len(available)}")
        asked = is_image.sum(dim=1)
        if bool((asked > available).any()):
            raise ImageCountError(f"rows have {asked.tolist()} <image> tokens, but {available.tolist()} images")
        largest = self._model.manifest.limits["total_sequence_length"][1]
        if length + max_new_tokens > largest:
            raise LimitError(
                f"the prompt of {length} tokens and max_new_tokens={max_new_tokens} are more than {largest}, "
                "the longest text that this artifact takes"
            )

    def step(self) -> torch.Tensor:
        """Run the tokens that are new; return the logits ``[B, vocabulary]`` of what follows."""
        free = {
            "batch_size": len(self._tokens),
            "past_sequence_length": self._past_length,
            "visual_length": self._encoded.visual_length,
        }
        sizes = {t.name: t.sizes(free) for t in (*self._specs("past_key_values."), *self._specs("cross_key_values."))}
        inputs = {
            "input_ids": self._tokens,
            "attention_mask": self._mask,
            "position_ids": self._positions,
            "kv_range": self._context.kv_range(self._seen, self._model.config.only_attend_immediate_image),
            "has_image": self._context.images_per_row > 0,
            **self._past,
            **self._encoded.cross_key_values,
        }
        outputs = self._model.run("decoder", inputs, sizes, ("logits",))
        logits = self._model.backend.to_tensor(outputs.pop("logits"))[:, -1]
        self._past = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
        self._past_length = self._mask.shape[1]
        return logits

    def append(self, token: torch.Tensor) -> None:
        """Make ``token [B]`` the next step's."""
        self._tokens = token[:, None]
        self._positions, self._seen = self._positions[:, -1:] + 1, self._seen[:, -1:]
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(token), 1)), dim=1)


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _choose(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """Return the next token of each row, int64 ``[B]``, from logits ``[B, vocabulary]``."""
    if temperature <= 0:
        return logits.argmax(-1)
    values, order = (logits / temperature).softmax(-1).sort(descending=True, dim=-1)
    # A token stays if those before it do not make up top_p yet; the first one always does.
    values = values.masked_fill(values.cumsum(-1) - values > top_p, 0.0)
    return order.gather(1, torch.multinomial(values, 1, generator=generator))[:, 0]
