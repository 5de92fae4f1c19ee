"""The InfiMM family: a vision tower on a batch of tiles, a Perceiver or none, gated cross-attention, a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from infimm_fast.errors import ConfigurationError, ImageCountError
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.modeling_eva_vision import EvaVisionTower, InfiMMHDPreTrainedModel
from infimm_fast.models.infimm_hd.modeling_gated_cross_attention import (
    CrossAttentionInputs,
    GatedCrossAttentionBlock,
    insert_gated_cross_attention,
    project_visual_at_once,
)
from infimm_fast.models.infimm_hd.modeling_perceiver import PerceiverResampler
from infimm_fast.models.infimm_hd.position_embedding import subimage_position_embedding
from infimm_fast.models.infimm_hd.tiling import tile_count, tile_places
from infimm_fast.models.infimm_hd.visual_context import VisualContext, consecutive_ranges, count_images


@dataclass
class InfiMMHDCausalLMOutputWithPast(ModelOutput):
    """Output of `InfiMMHDForConditionalGeneration`.

    Attributes:
        loss: mean causal language-model loss, if labels were given.
        logits: ``[B, T, vocabulary]``.
        past_key_values: cache of the language model's self-attention.
        hidden_states: of the language model, if asked for.
        attentions: of the language model, if asked for.
        visual_context: the encoded pictures; pass it on in the next step, in place of ``pixel_values``.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    visual_context: VisualContext | None = None


class InfiMMHDForConditionalGeneration(InfiMMHDPreTrainedModel, GenerationMixin):
    """Text generation from interleaved text and pictures of any size.

    Source: InfiMM-HD (arXiv 2403.01487), Flamingo (arXiv 2204.14198).
    """

    config_class = InfiMMHDConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _skip_keys_device_placement = ("past_key_values", "cross_attention")
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: InfiMMHDConfig):
        super().__init__(config)
        self.vision_tower = EvaVisionTower(config.vision_config)
        self.resampler = PerceiverResampler(config) if config.resampler_layers else None
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        blocks = {index: self._make_gated_block(config) for index in config.gated_layers}
        insert_gated_cross_attention(self.language_model.get_decoder(), blocks)
        self.set_backend(config.backend)
        decoder_layers = {type(layer).__name__ for layer in self.language_model.get_decoder().layers}
        self._no_split_modules = {*decoder_layers, *EvaVisionTower._no_split_modules, PerceiverResampler.__name__}
        self.post_init()

    @staticmethod
    def _make_gated_block(config: InfiMMHDConfig) -> GatedCrossAttentionBlock:
        return GatedCrossAttentionBlock(
            hidden_size=config.text_config.hidden_size,
            visual_size=config.vision_config.hidden_size,
            num_heads=config.cross_attention_heads,
            head_dim=config.cross_attention_head_dim,
            ff_mult=config.cross_attention_ff_mult,
            gate=config.cross_attention_gate,
            layer_norm_eps=config.cross_attention_layer_norm_eps,
        )

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise what no checkpoint has set."""
        super().initialize_weights()
        if self.resampler is not None:
            init.normal_(self.resampler.latents)
        # Transformers lets the language model initialise all modules inside it, and that does not know gates.
        for block in self.gated_blocks:
            init.normal_(block.attn_gate, std=self.config.gate_initializer_range)
            init.normal_(block.ff_gate, std=self.config.gate_initializer_range)

    @property
    def gated_blocks(self) -> list[GatedCrossAttentionBlock]:
        """The gated blocks, first layer first."""
        layers = self.language_model.get_decoder().layers
        return [layers[index].gated_cross_attention for index in self.config.gated_layers]

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(value)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the vision tower on all tiles, add each sub-image's place, and resample if the model has a resampler.

        Args:
            pixel_values: tiles of all pictures, ``[tiles, 3, S, S]``; a picture's sub-images row by row, then its
                thumbnail.
            image_grids: int ``[images, 2]``, (rows, columns) of each picture; None means one tile for each picture.

        Returns:
            Packed visual tokens ``[S, C]`` and the offset of each picture in them, int64 ``[images + 1]``.

        Raises:
            ImageCountError: the grids do not add up to the number of tiles.
        """
        if image_grids is None:
            grids, always_thumbnail = [[1, 1]] * len(pixel_values), False
        else:
            grids, always_thumbnail = image_grids.tolist(), self.config.always_thumbnail
        counts = [tile_count(rows, columns, always_thumbnail) for rows, columns in grids]
        if sum(counts) != len(pixel_values):
            raise ImageCountError(f"image_grids {grids} stand for {sum(counts)} tiles, but there are {len(pixel_values)}")
        positions = None
        if self.config.use_subimage_position_embedding:
            width = self.config.vision_config.hidden_size
            positions = subimage_position_embedding(tile_places(grids, always_thumbnail), width, pixel_values.device)
        features = self.encode_tiles(pixel_values, positions)
        offsets = torch.tensor([0, *counts]).cumsum(0) * features.shape[1]
        return features.flatten(0, 1), offsets.to(features.device)

    def encode_tiles(self, pixel_values: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Run tower and resampler on a batch of tiles; what the tiles belong to does not matter here.

        Args:
            pixel_values: ``[tiles, 3, S, S]``.
            positions: added to all tokens of a tile, ``[tiles, C]``; see `subimage_position_embedding`.

        Returns:
            ``[tiles, visual_tokens_per_tile, C]``.
        """
        features = self.vision_tower(pixel_values.to(self.vision_tower.dtype), self.config.vision_feature_layer)
        if not self.config.use_class_token:
            features = features[:, 1:]
        if positions is not None:
            features = features + positions.to(features)[:, None]
        return features if self.resampler is None else self.resampler(features)

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        image_grids: torch.Tensor | None = None,
        image_counts: torch.Tensor | None = None,
    ) -> VisualContext:
        """Encode pictures once, for any number of forward passes.

        Args:
            pixel_values: see `get_image_features`.
            image_grids: see `get_image_features`.
            image_counts: int ``[rows]``, pictures of each row; None means that one row has them all.

        Returns:
            The context, with the gated blocks' keys and values unless the backend is "reference".

        Raises:
            ImageCountError: the counts or grids do not add up.
        """
        features, offsets = self.get_image_features(pixel_values, image_grids)
        images = len(offsets) - 1
        counts = torch.tensor([images]) if image_counts is None else image_counts.to("cpu", torch.int64)
        if int(counts.sum()) != images:
            raise ImageCountError(
                f"image_counts {counts.tolist()} add up to {int(counts.sum())}, but there are {images} images"
            )
        row_images = consecutive_ranges(counts).to(features.device)
        key_values = None
        if self.config.backend != "reference":
            key_values = project_visual_at_once([block.attn for block in self.gated_blocks], features)
        return VisualContext(features, offsets, row_images, key_values)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        image_counts: torch.Tensor | None = None,
        visual_context: VisualContext | None = None,
        images_seen: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> InfiMMHDCausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: int64 ``[B, T]`` with an ``<image>`` token for each picture.
            attention_mask: ``[B, past + T]``, 1 for real tokens; padding on either side.
            position_ids: int64 ``[B, T]``.
            past_key_values: cache of earlier tokens. Tokens after a cache come after all of their row's pictures unless
                `images_seen` says otherwise.
            inputs_embeds: float ``[B, T, C]`` in place of `input_ids`, for text without pictures.
            pixel_values: tiles of all pictures of all rows, ``[tiles, 3, S, S]``.
            image_grids: int ``[images, 2]``, (rows, columns) of each picture; None means one tile for each picture.
            image_counts: int ``[B]``, pictures of each row; None reads them from the ``<image>`` tokens.
            visual_context: pictures that are encoded already, in place of the three arguments before.
            images_seen: int64 ``[B]``, ``<image>`` tokens of each row before these ones; for a prompt in several parts.
            labels: int64 ``[B, T]``, -100 where no loss is wanted; shifted inside.
            logits_to_keep: number of last positions that get logits, 0 for all.
            **kwargs: passed to the language model (``use_cache``, ``output_hidden_states``, ...).

        Raises:
            ImageCountError: a row has more ``<image>`` tokens than pictures, or the counts do not add up.
            ImageInputError: `pixel_values` has another shape.
        """
        visual_context = self._resolve_context(input_ids, pixel_values, image_grids, image_counts, visual_context)
        if images_seen is None and _is_whole_prompt(past_key_values):
            visual_context = self._match_images(input_ids, visual_context)
        elif images_seen is None and visual_context is not None:
            images_seen = visual_context.images_per_row
        cross_attention = None
        if visual_context is not None:
            so_far = count_images(input_ids == self.config.image_token_id, images_seen)
            kv_range = visual_context.kv_range(so_far, self.config.only_attend_immediate_image)
            cross_attention = CrossAttentionInputs(visual_context, kv_range, visual_context.images_per_row > 0)
        outputs = self.language_model.get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            cross_attention=cross_attention,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return InfiMMHDCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_context=visual_context,
        )

    def _resolve_context(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_grids: torch.Tensor | None,
        image_counts: torch.Tensor | None,
        visual_context: VisualContext | None,
    ) -> VisualContext | None:
        """Encode the pictures if they came as pixels."""
        if pixel_values is None:
            if visual_context is None and image_counts is not None and bool(image_counts.any()):
                raise ImageCountError("image_counts names pictures; pass them as pixel_values or visual_context")
            return visual_context
        if visual_context is not None:
            raise ImageCountError("both pixel_values and visual_context were given; pass one of them")
        if image_counts is None and input_ids is not None:
            image_counts = (input_ids == self.config.image_token_id).sum(dim=1)
        return self.encode_images(pixel_values, image_grids, image_counts)

    def _match_images(self, input_ids: torch.Tensor | None, context: VisualContext | None) -> VisualContext | None:
        """Drop surplus pictures of a whole prompt, and refuse surplus ``<image>`` tokens."""
        if input_ids is None:
            if context is not None:
                raise ImageCountError("inputs_embeds do not say where the pictures stand; pass input_ids with pictures")
            return None
        counts = (input_ids == self.config.image_token_id).sum(dim=1)
        available = torch.zeros_like(counts) if context is None else context.images_per_row
        if len(available) != len(counts):
            raise ImageCountError(f"there are {len(counts)} rows of text, but pictures for {len(available)}")
        if not torch.compiler.is_compiling() and bool((counts > available).any()):
            raise ImageCountError(f"rows have {counts.tolist()} <image> tokens, but {available.tolist()} images")
        return None if context is None else context.limit_images(counts)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        image_counts: torch.Tensor | None = None,
        visual_context: VisualContext | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text; pictures are encoded once, before beams or several return sequences multiply the rows.

        Args:
            inputs: ``input_ids`` of the prompt, ``[B, T]``.
            *args: see `transformers.GenerationMixin.generate`.
            pixel_values: see `forward`.
            image_grids: see `forward`.
            image_counts: see `forward`.
            visual_context: see `forward`.
            **kwargs: see `transformers.GenerationMixin.generate`.

        Raises:
            ImageCountError: see `forward`.
            ConfigurationError: chunked prefill was asked for a prompt with pictures.
        """
        input_ids = kwargs.get("input_ids", inputs)
        context = self._resolve_context(input_ids, pixel_values, image_grids, image_counts, visual_context)
        if context is not None and kwargs.get("prefill_chunk_size"):
            raise ConfigurationError("prefill_chunk_size is not supported with pictures; leave it out")
        if _is_whole_prompt(kwargs.get("past_key_values")):
            context = self._match_images(input_ids, context)
        kwargs["visual_context"] = context
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Add the number of ``<image>`` tokens before this step's tokens to Transformers' own inputs."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        step, cache = model_inputs.get("input_ids"), model_inputs.get("past_key_values")
        if step is None:
            return model_inputs
        before = input_ids[:, : input_ids.shape[1] - step.shape[1]]
        # A caller who continues from a cache may pass the new tokens alone; forward then assumes all pictures seen.
        if cache is None or cache.get_seq_length() <= before.shape[1]:
            model_inputs["images_seen"] = (before == self.config.image_token_id).sum(dim=1)
        return model_inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Multiply rows, not pictures: all beams of a row share its pictures."""
        context = kwargs.pop("visual_context", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, *args, input_ids=input_ids, **kwargs)
        if context is not None:
            rows = torch.arange(len(context.row_images), device=context.row_images.device)
            model_kwargs["visual_context"] = context.select_rows(rows.repeat_interleave(expand_size))
        return input_ids, model_kwargs


def _is_whole_prompt(past_key_values: Cache | None) -> bool:
    return past_key_values is None or past_key_values.get_seq_length() == 0
