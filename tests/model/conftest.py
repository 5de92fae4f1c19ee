import pytest
import torch

from infimm_fast import InfiMMHDForConditionalGeneration, InfiMMHDImageProcessor, InfiMMHDProcessor, preset
from infimm_fast.models.infimm_hd.tokenization_bytes import byte_tokenizer


@pytest.fixture(scope="session")
def tiny_model():
    torch.manual_seed(0)
    return InfiMMHDForConditionalGeneration(preset("tiny")).eval()


@pytest.fixture(scope="session")
def processor():
    return InfiMMHDProcessor(InfiMMHDImageProcessor.from_config(preset("tiny")), byte_tokenizer())
