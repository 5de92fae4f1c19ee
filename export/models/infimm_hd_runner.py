"""Runs an exported InfiMM-HD: pictures are encoded once, the decoder graph serves the prompt and every step after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from infimm_fast.errors import ImageCountError
from infimm_fast.export.common.artifact import Manifest
from infimm_fast.export.common.errors import LimitError
from infimm_fast.export.common.generation import GenerativeModel
from infimm_fast.export.common.runner import Backend
from infimm_fast.export.common.spec import TensorSpec
from infimm_fast.export.models.infimm_hd import VISUAL_MULTIPLE, padded_visual_length
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.image_processing_infimm_hd import nest_images
from infimm_fast.models.infimm_hd.position_embedding import encode_places
from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor
from infimm_fast.models.infimm_hd.tiling import tile_count, tile_places
from infimm_fast.models.infimm_hd.visual_context import VisualContext, consecutive_ranges, count_images


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


class ExportedInfiMMHD(GenerativeModel):
    """An exported InfiMM-HD on a runtime.

    Args:
        manifest: of the artifact.
        backend: the runtime.
        processor: tokenizer and image processor; None for a folder without.
    """

    def __init__(self, manifest: Manifest, backend: Backend, processor: InfiMMHDProcessor | None = None):
        super().__init__(manifest, backend, processor)
        self.config = InfiMMHDConfig.from_dict(manifest.config)

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
        vision = self.run("vision", {"pixel_values": pixel_values.float(), "tile_positions": places})
        features_shape = self.manifest.graphs["vision"].outputs[0].sizes({"num_tiles": len(pixel_values)})
        cross = self.run("cross_kv", vision)
        return EncodedImages(
            features=vision["image_features"],
            cross_key_values=cross,
            offsets=torch.tensor([0, *counts]).cumsum(0) * features_shape[1],
            row_images=consecutive_ranges(image_counts),
            visual_length=padded_visual_length(features_shape[0] * features_shape[1]),
        )

    def prepare(
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

    def start(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, encoded: EncodedImages | None, max_new_tokens: int
    ) -> Decoding:
        """Return the beginning of a text; see `Decoding`."""
        return Decoding(self, input_ids, attention_mask, encoded, max_new_tokens)


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
        model: ExportedInfiMMHD,
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
        inputs = {
            "input_ids": self._tokens,
            "attention_mask": self._mask,
            "position_ids": self._positions,
            "kv_range": self._context.kv_range(self._seen, self._model.config.only_attend_immediate_image),
            "has_image": self._context.images_per_row > 0,
            **self._past,
            **self._encoded.cross_key_values,
        }
        outputs = self._model.run("decoder", inputs, ("logits",))
        logits = self._model.backend.to_tensor(outputs.pop("logits"))[:, -1]
        self._past = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
        return logits

    def append(self, token: torch.Tensor) -> None:
        """Make ``token [B]`` the next step's."""
        self._tokens = token[:, None]
        self._positions, self._seen = self._positions[:, -1:] + 1, self._seen[:, -1:]
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(token), 1)), dim=1)
