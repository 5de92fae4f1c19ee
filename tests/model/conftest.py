import pytest
import torch

from infimm_fast import InfiMMHDForConditionalGeneration, InfiMMHDImageProcessor, InfiMMHDProcessor, byte_tokenizer, preset


@pytest.fixture(scope="session")
def tiny_model():
    torch.manual_seed(0)
    return InfiMMHDForConditionalGeneration(preset("tiny")).eval()


@pytest.fixture(scope="session")
def processor():
    return InfiMMHDProcessor(InfiMMHDImageProcessor.from_config(preset("tiny")), byte_tokenizer())


@pytest.fixture(scope="session")
def pictures():
    """Noise pictures whose grids are 1x1, 1x2, 2x2, 2x1."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    sizes = ((100, 100), (100, 230), (200, 220), (240, 90))
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
