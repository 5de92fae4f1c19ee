"""A model to ONNX and back: export, verify, look inside, ask the exported model about a picture.

Run it with ``python examples/export_onnx.py``; it needs ``infimm-fast[onnx]``. The weights are random, so that nothing is
downloaded and its answer means nothing; with real ones pass the folder that ``infimm-fast convert`` made.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import torch

from infimm_fast import InfiMMHDForConditionalGeneration, InfiMMHDProcessor, preset
from infimm_fast.export import ExportedModel, export_onnx, load
from infimm_fast.models.infimm_hd.tokenization_bytes import byte_tokenizer

PICTURE = Path(__file__).parent / "images" / "raccoon.jpg"
QUESTION = "What is in this picture?"


def make_model() -> tuple[InfiMMHDForConditionalGeneration, InfiMMHDProcessor]:
    """Return a shallow model with random weights and its processor."""
    config = preset("tiny")
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    config.cross_attention_every_n_layers = 1
    torch.manual_seed(0)
    model = InfiMMHDForConditionalGeneration(config).eval()
    return model, InfiMMHDProcessor.from_config(config, byte_tokenizer())


def describe(folder: Path) -> None:
    """Print what the folder holds and how exact its graphs are."""
    report = json.loads((folder / "verification.json").read_text())
    for file in sorted((folder / "onnx").glob("*.onnx")):
        graph = onnx.load(file, load_external_data=False).graph
        ours = Counter(node.op_type for node in graph.node if node.domain == "infimm")
        worst = max(report["graphs"][file.stem]["cases"].values(), key=lambda case: case["max_abs"])
        print(f"{file.name}: {len(graph.node)} nodes, of them ours {dict(ours)}; largest error {worst['max_abs']:.1e}")


def main() -> None:
    """Export, and compare the answers."""
    model, processor = make_model()
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_onnx(model, Path(scratch) / "artifact", processor=processor)
        describe(folder)
        exported = load(folder, provider="cpu")
        assert isinstance(exported, ExportedModel)
        print(f"{QUESTION} ", end="")
        for piece in exported.stream(str(PICTURE), QUESTION, max_new_tokens=8):
            print(repr(piece), end=" ", flush=True)
        print()
        # A picture is encoded once for any number of questions.
        encoded = exported.encode(str(PICTURE))
        answers = [exported.generate(None, text, encoded=encoded, max_new_tokens=8) for text in (QUESTION, "And what else?")]
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=str(PICTURE))
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = processor.decode(tokens, skip_special_tokens=True)
        if answers[0] != expected:
            raise SystemExit(f"ONNX Runtime answers {answers[0]!r}, PyTorch {expected!r}")
        print("PyTorch gives the same answer")


if __name__ == "__main__":
    main()
