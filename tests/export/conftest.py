import pytest
import torch

from infimm_fast import InfiMMHDProcessor
from infimm_fast.models.infimm_hd.tokenization_bytes import byte_tokenizer
from onnx_models import make_config, make_model


@pytest.fixture(scope="session")
def model():
    return make_model(make_config())


@pytest.fixture(scope="session")
def processor(model):
    return InfiMMHDProcessor.from_config(model.config, byte_tokenizer())


@pytest.fixture(scope="session")
def batch(processor, pictures):
    """Rows with two pictures, none, one, and one that comes late."""
    return processor(
        text=["Compare <image> and <image>.", "No picture at all here.", "<image>Short", "First text, then <image>"],
        images=[[pictures[0], pictures[1]], [], [pictures[2]], [pictures[3]]],
    )


@pytest.fixture(scope="session")
def artifact(model, processor, tmp_path_factory):
    """A verified float32 artifact with infimm:: nodes; tests that change it copy it first."""
    from infimm_fast.export import export_onnx

    return export_onnx(model, tmp_path_factory.mktemp("export") / "artifact", processor=processor)


@pytest.fixture(scope="session")
def exported(artifact):
    from infimm_fast.export import load

    return load(artifact, threads=2)


@pytest.fixture
def check_tokens(batch):
    """Compare greedy tokens of a batch with mixed pictures."""

    def check(model, exported, steps=6):
        length = batch["input_ids"].shape[1]
        expected = model.generate(**batch, max_new_tokens=steps, do_sample=False)[:, length:]
        encoded = exported.encode_tiles(batch["pixel_values"], batch["image_grids"], batch["image_counts"])
        actual = exported.generate_tokens(batch["input_ids"], batch["attention_mask"], encoded, max_new_tokens=steps)
        assert torch.equal(actual, expected)
        # The pictures matter: without them other tokens come.
        blank = exported.encode_tiles(torch.zeros_like(batch["pixel_values"]), batch["image_grids"], batch["image_counts"])
        other = exported.generate_tokens(batch["input_ids"], batch["attention_mask"], blank, max_new_tokens=steps)
        assert not torch.equal(other, expected)

    return check
