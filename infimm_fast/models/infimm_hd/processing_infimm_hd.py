"""Text and pictures to model inputs, and chat prompts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from infimm_fast.errors import ImageCountError, PromptError
from infimm_fast.models.infimm_hd.chat_templates import CHAT_TEMPLATES
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.image_processing_infimm_hd import InfiMMHDImageProcessor, nest_images
from infimm_fast.models.infimm_hd.tokenization_bytes import END_OF_CHUNK_TOKEN, IMAGE_TOKEN


class InfiMMHDProcessor(ProcessorMixin):
    """Tokenizer and image processor in one.

    Args:
        image_processor: an `InfiMMHDImageProcessor`.
        tokenizer: a tokenizer; ``<image>`` and ``<|endofchunk|>`` are added to it if it lacks them.
        chat_template: a Jinja template; Vicuna's by default.
    """

    def __init__(
        self,
        image_processor: InfiMMHDImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        self.image_token = IMAGE_TOKEN
        if tokenizer is not None:
            known = tokenizer.get_vocab()
            missing = [token for token in (END_OF_CHUNK_TOKEN, IMAGE_TOKEN) if token not in known]
            if missing:
                tokenizer.add_special_tokens({"additional_special_tokens": missing}, False)
            self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATES["vicuna"])

    @classmethod
    def from_config(cls, config: InfiMMHDConfig, tokenizer: PreTrainedTokenizerBase) -> InfiMMHDProcessor:
        """Return the processor that fits a model's configuration."""
        return cls(InfiMMHDImageProcessor.from_config(config), tokenizer, CHAT_TEMPLATES[config.chat_format])

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        padding: bool | str | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: a picture; a flat list, dealt to the rows by their ``<image>`` tokens; or a list of lists, one for each
                row. None for text only.
            text: a prompt or a list of prompts with an ``<image>`` for each picture.
            padding: see `transformers.PreTrainedTokenizerBase`; by default rows of several prompts are padded.
            return_tensors: "pt".
            **kwargs: passed to the tokenizer (``truncation``, ``add_special_tokens``, ...).

        Returns:
            ``input_ids`` and ``attention_mask`` int64 ``[B, T]``; with pictures also ``pixel_values``, ``image_grids`` and
            ``image_counts`` (see `InfiMMHDImageProcessor.preprocess`).

        Raises:
            PromptError: a prompt is empty or not text.
            ImageCountError: a row has more ``<image>`` tokens than pictures, or more pictures than ``<image>`` tokens.
            ImageInputError: a picture cannot be used.
        """
        prompts = [text] if isinstance(text, str) else list(text or ())
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise PromptError(f"text={text!r} holds an empty prompt or something that is not text")
        rows = self._deal_images(prompts, images)
        padding = len(prompts) > 1 if padding is None else padding
        features = dict(self.tokenizer(prompts, padding=padding, return_tensors=return_tensors, **kwargs))
        features.pop("token_type_ids", None)
        if any(rows):
            features.update(self.image_processor(rows, return_tensors=return_tensors))
        return BatchFeature(features)

    def _deal_images(self, prompts: list[str], images: Any) -> list[list[Any]]:
        """Return the pictures of each row, as many as it has ``<image>`` tokens."""
        tokens = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
        rows = [] if images is None else nest_images(images)
        nested = isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images)
        if not nested:
            flat = [image for row in rows for image in row]
            if len(flat) != sum(tokens):
                raise ImageCountError(f"the text has {sum(tokens)} <image> tokens, but {len(flat)} images were given")
            remaining = iter(flat)
            return [[next(remaining) for _ in range(count)] for count in tokens]
        if [len(row) for row in rows] != tokens:
            raise ImageCountError(
                f"the rows have {tokens} <image> tokens, but {[len(row) for row in rows]} images were given"
            )
        return rows

    @property
    def model_input_names(self) -> list[str]:
        """Names of all arrays the processor can return."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def token_ids(self) -> dict[str, int]:
        """Return the ids that a model's configuration must share with the tokenizer."""
        return {
            "image_token_id": self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            "end_of_chunk_token_id": self.tokenizer.convert_tokens_to_ids(END_OF_CHUNK_TOKEN),
        }

    def write_token_ids(self, config: InfiMMHDConfig) -> None:
        """Give a model's configuration the ids that it must share with the tokenizer."""
        for name, token_id in self.token_ids().items():
            setattr(config, name, token_id)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Decode a batch of token ids; see the tokenizer."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, token_ids: torch.Tensor | list[int], **kwargs: Any) -> str:
        """Decode one row of token ids; see the tokenizer."""
        return self.tokenizer.decode(token_ids, **kwargs)
