"""The authors' checkpoints to a folder that `from_pretrained` reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from infimm_fast.errors import CheckpointError
from infimm_fast.folders import new_folder
from infimm_fast.models.infimm_hd.checkpoint_io import CheckpointReader, write_safetensors
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig
from infimm_fast.models.infimm_hd.image_processing_infimm_hd import InfiMMHDImageProcessor
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.position_embedding import resize_patch_embedding, resize_position_embedding
from infimm_fast.models.infimm_hd.processing_infimm_hd import InfiMMHDProcessor

# The authors register decoder layers and gated blocks twice; the left form is a second name of the right one.
_ALIASES = (
    (r"^lang_encoder\.old_decoder_blocks\.(\d+)\.", r"lang_encoder.model.layers.\1.decoder_layer."),
    (r"^lang_encoder\.gated_cross_attn_layers\.(\d+)\.", r"lang_encoder.model.layers.\1.gated_cross_attn_layer."),
)

# Applied in this order; every pattern that matches is used.
_RENAMES = (
    (r"^vision_encoder\.cls_token$", "vision_tower.embeddings.class_token"),
    (r"^vision_encoder\.pos_embed$", "vision_tower.embeddings.position_embedding"),
    (r"^vision_encoder\.patch_embed\.proj\.", "vision_tower.embeddings.patch_embed."),
    (r"^vision_encoder\.", "vision_tower."),
    (r"\.attn\.([qv]_bias)$", r".attn.qkv.\1"),
    (r"\.attn\.inner_attn_ln\.", ".attn.inner_norm."),
    (r"\.mlp\.w1\.", ".mlp.gate_proj."),
    (r"\.mlp\.w2\.", ".mlp.up_proj."),
    (r"\.mlp\.w3\.", ".mlp.down_proj."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
    (r"^perceiver\.", "resampler."),
    (r"^(resampler\.layers\.\d+)\.0\.", r"\1.attn."),
    (r"^(resampler\.layers\.\d+)\.1\.", r"\1.ff."),
    (r"^lang_encoder\.", "language_model."),
    (r"\.decoder_layer\.", "."),
    (r"\.gated_cross_attn_layer\.", ".gated_cross_attention."),
    (r"\.attn\.to_(q|kv)\.", r".attn.\1_proj."),
    (r"\.attn\.to_out\.", ".attn.o_proj."),
    (r"\.ff\.0\.", ".ff.norm."),
    (r"\.ff\.1\.", ".ff.up_proj."),
    (r"\.ff\.3\.", ".ff.down_proj."),
)

# Tables that the model computes by itself.
_COMPUTED = re.compile(r"(\.|^)rope\.freqs_(cos|sin)$|\.rotary_emb\.inv_freq$")
_VISION_QKV_PART = re.compile(r"^(vision_tower\.blocks\.\d+\.attn)\.([qkv])_proj\.weight$")
_POSITION_EMBEDDING = "vision_tower.embeddings.position_embedding"
_PATCH_EMBEDDING = "vision_tower.embeddings.patch_embed.weight"
_LISTED_NAMES = 20

Progress = Callable[[int, int], None]


@dataclass
class ConversionPlan:
    """Which source tensors make each tensor of the model.

    Attributes:
        sources: target name -> source names, joined along dim 0.
        shapes: target name -> shape in the model.
        duplicates: (second name, first name) of source tensors that must hold the same values.
    """

    sources: dict[str, list[str]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)


def rename_key(name: str) -> tuple[str, int]:
    """Return the model's name of an official (canonical) key, and which part of that tensor it is."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    if match := _VISION_QKV_PART.match(name):
        return f"{match[1]}.qkv.weight", "qkv".index(match[2])
    return name, 0


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    config: InfiMMHDConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int = 4 * 2**30,
    progress: Progress | None = None,
) -> Path:
    """Turn an official InfiMM checkpoint into a folder for `InfiMMHDForConditionalGeneration.from_pretrained`.

    Tensors keep their dtype and are streamed one at a time. A position or patch embedding of another grid or patch size
    is resized in float32. Nothing is left at `destination` unless everything succeeded.

    Args:
        source: the checkpoint: a ``.ckpt`` / ``.bin`` / ``.pt`` / ``.pth`` in PyTorch's zip format, a ``.safetensors`` file,
            or a folder of such files.
        destination: folder to make; it must not exist or be empty.
        config: the configuration that the checkpoint was trained with.
        tokenizer: saved with the model as its processor, so that the folder is complete; its ids of ``<image>`` and
            ``<|endofchunk|>`` replace the configuration's.
        max_shard_bytes: largest size of a weights file.
        progress: called with (bytes written, bytes in all) after every tensor.

    Returns:
        The destination.

    Raises:
        CheckpointError: unreadable, or with unknown, missing or wrongly shaped keys (all named), or the destination is in
            use, or another process converts to it.
        OSError: the disk is full, or the destination cannot be written.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} exists already and is not an empty folder")
    reader = CheckpointReader(source)
    plan = plan_conversion(reader, config)
    _check_duplicates(reader, plan)
    with new_folder(destination) as partial:
        dtype = _write_weights(reader, plan, partial, max_shard_bytes, progress or (lambda done, total: None))
        _write_configuration(partial, config, tokenizer, dtype)
    return destination


def plan_conversion(reader: CheckpointReader, config: InfiMMHDConfig) -> ConversionPlan:
    """Match the keys of a checkpoint with the parameters of a model; refuse with all misfits named."""
    plan = ConversionPlan(shapes=_model_shapes(config))
    parts: dict[str, dict[int, str]] = {}
    unknown = []
    for name in reader.shapes:
        official = _strip_prefix(name)
        if _COMPUTED.search(official):
            continue
        canonical = official
        for pattern, replacement in _ALIASES:
            canonical = re.sub(pattern, replacement, canonical)
        target, part = rename_key(canonical)
        if target not in plan.shapes:
            unknown.append(name)
            continue
        first = parts.setdefault(target, {}).setdefault(part, name)
        if first != name:
            plan.duplicates.append((name, first))
    plan.sources = {target: [found[part] for part in sorted(found)] for target, found in parts.items()}
    missing = [target for target in plan.shapes if target not in plan.sources]
    misshapen = [
        f"{' + '.join(sources)} {[list(reader.shapes[name]) for name in sources]}, expected {list(plan.shapes[target])}"
        for target, sources in plan.sources.items()
        if not _fits(target, [reader.shapes[name] for name in sources], plan.shapes[target])
    ]
    problems = [
        f"{len(names)} {kind}: {'; '.join(names[:_LISTED_NAMES])}{'; ...' if len(names) > _LISTED_NAMES else ''}"
        for kind, names in (("unknown", unknown), ("missing", missing), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"the checkpoint does not fit the configuration: keys {' | keys '.join(problems)}")
    return plan


def _strip_prefix(name: str) -> str:
    """Drop what wrappers put before every key."""
    return re.sub(r"^(module\.|model\.)+(?=(vision_encoder|lang_encoder|perceiver)\.)", "", name)


def _model_shapes(config: InfiMMHDConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = InfiMMHDForConditionalGeneration(config)
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def _fits(target: str, shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    if len(shapes) > 1:
        rows = sum(shape[0] for shape in shapes)
        return (rows, *shapes[0][1:]) == wanted and len({shape[1:] for shape in shapes}) == 1
    if target == _POSITION_EMBEDDING:
        patches = shapes[0][1] - 1 if len(shapes[0]) == 3 else 0
        return patches > 0 and round(patches**0.5) ** 2 == patches and shapes[0][::2] == wanted[::2]
    if target == _PATCH_EMBEDDING:
        return len(shapes[0]) == 4 and shapes[0][:2] == wanted[:2] and shapes[0][2] == shapes[0][3]
    return shapes[0] == wanted


def _check_duplicates(reader: CheckpointReader, plan: ConversionPlan) -> None:
    """Tensors that the originals hold under two names are stored once, if both hold the same values."""
    for second, first in plan.duplicates:
        if reader.same_storage(second, first):
            continue
        if not torch.equal(reader.read(first).clone(), reader.read(second)):
            raise CheckpointError(f"{second} and {first} are two names of one tensor, but differ")


def _load_target(reader: CheckpointReader, plan: ConversionPlan, target: str) -> torch.Tensor:
    sources = plan.sources[target]
    if len(sources) > 1:
        return torch.cat([reader.read(name).clone() for name in sources])
    tensor = reader.read(sources[0])
    if target == _POSITION_EMBEDDING:
        return resize_position_embedding(tensor, round((plan.shapes[target][1] - 1) ** 0.5))
    if target == _PATCH_EMBEDDING:
        return resize_patch_embedding(tensor, plan.shapes[target][-1])
    return tensor


def _stored_dtype(reader: CheckpointReader, plan: ConversionPlan, target: str) -> torch.dtype:
    dtype = reader.dtypes[plan.sources[target][0]]
    is_resized = len(plan.sources[target]) == 1 and reader.shapes[plan.sources[target][0]] != plan.shapes[target]
    return torch.promote_types(dtype, torch.float32) if is_resized else dtype


def _write_weights(
    reader: CheckpointReader, plan: ConversionPlan, folder: Path, max_shard_bytes: int, progress: Progress
) -> torch.dtype:
    """Write the shards and their index; return the dtype that most of the weights have."""
    entries = [(target, plan.shapes[target], _stored_dtype(reader, plan, target)) for target in sorted(plan.sources)]
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape, dtype in entries}
    shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + sizes[entry[0]] > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += sizes[entry[0]]
    total, done = sum(sizes.values()), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_safetensors(folder / file, shard, lambda name: _load_target(reader, plan, name), on_bytes)
        weight_map.update({name: file for name, _, _ in shard})
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")
    counts: Counter[torch.dtype] = Counter()
    for name, _, dtype in entries:
        counts[dtype] += sizes[name]
    return counts.most_common(1)[0][0]


def _write_configuration(
    folder: Path, config: InfiMMHDConfig, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype
) -> None:
    config = InfiMMHDConfig.from_dict(config.to_dict())
    if tokenizer is not None:
        processor = InfiMMHDProcessor.from_config(config, tokenizer)
        processor.write_token_ids(config)
        processor.save_pretrained(folder)
    else:
        InfiMMHDImageProcessor.from_config(config).save_pretrained(folder)
    config.dtype = dtype
    config.architectures = [InfiMMHDForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    text = config.text_config
    eos = [token for token in (text.eos_token_id, config.end_of_chunk_token_id) if token is not None]
    GenerationConfig(bos_token_id=text.bos_token_id, eos_token_id=eos, pad_token_id=text.pad_token_id).save_pretrained(
        folder
    )
