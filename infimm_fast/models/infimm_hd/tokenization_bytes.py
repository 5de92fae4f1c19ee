"""A byte-level tokenizer built in code, for the `tiny` preset: no download, nobody's vocabulary."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"
_SPECIAL = ("<unk>", "<s>", "</s>")
END_OF_CHUNK_ID = len(_SPECIAL) + 256
IMAGE_ID = END_OF_CHUNK_ID + 1
VOCABULARY_SIZE = 264  # a multiple of 8


def byte_tokenizer(model_max_length: int = 4096) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte of UTF-8 text, and the special tokens of InfiMM-HD.

    Args:
        model_max_length: tokens after which Transformers warns.

    Returns:
        A fast tokenizer that puts ``<s>`` first, pads on the left with ``<unk>`` (as Vicuna does) and round-trips any
        text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (END_OF_CHUNK_TOKEN, IMAGE_TOKEN)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
