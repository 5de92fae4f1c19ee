"""AOTInductor packages on the CPU: the same results as PyTorch, limits, and folders that are not accepted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from infimm_fast.export import ExportedModel, load
from infimm_fast.export.common import prepared as prepared_module
from infimm_fast.export.common import source as source_module
from infimm_fast.export.common.artifact import load_manifest
from infimm_fast.export.common.errors import ArtifactError, ExportError, LimitError, ProviderError
from infimm_fast.export.common.prepared import PreparedExport
from infimm_fast.export.common.spec import GraphSpec
from infimm_fast.export.models.infimm_hd import InfiMMHD
from infimm_fast.export.models.infimm_hd_graphs import graph_modules
from infimm_fast.export.runtime.providers import Opening, open_backend
from infimm_fast.export.to_aoti import export as aoti
from infimm_fast.export.to_aoti import export_aoti
from infimm_fast.export.to_aoti.backend import AotiBackend
from infimm_fast.kernels.common.numerics import outlier_normal
from infimm_fast.models.infimm_hd.configuration_infimm_hd import InfiMMHDConfig, InfiMMHDVisionConfig
from infimm_fast.models.infimm_hd.modeling_infimm_hd import InfiMMHDForConditionalGeneration
from infimm_fast.models.infimm_hd.presets import preset
from interpreter import load_file

FAMILY = InfiMMHD()
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def tiny_model() -> InfiMMHDForConditionalGeneration:
    """The tiny model with one decoder layer behind a gated block: compiling the rest would show nothing more."""
    config = preset("tiny")
    config.vision_config.num_hidden_layers = 2
    config.text_config.num_hidden_layers = config.cross_attention_every_n_layers = 1
    torch.manual_seed(0)
    return InfiMMHDForConditionalGeneration(config).eval()


def wide_model() -> InfiMMHDForConditionalGeneration:
    """The widths of InfiMM-HD, one layer deep, with a small vocabulary and a narrow feed-forward."""
    vision = InfiMMHDVisionConfig(image_size=448, num_hidden_layers=1)
    text = LlamaConfig(
        vocab_size=300, hidden_size=5120, intermediate_size=64, num_hidden_layers=1, num_attention_heads=40, pad_token_id=0
    )
    torch.manual_seed(0)
    return InfiMMHDForConditionalGeneration(
        InfiMMHDConfig(vision_config=vision, text_config=text, cross_attention_every_n_layers=1)
    ).eval()


def inputs_of(spec: GraphSpec, config: InfiMMHDConfig, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return inputs with every row at the end of its pictures and padding in front of the first one."""
    free = {"total_sequence_length": sizes.get("past_sequence_length", 0) + sizes.get("sequence_length", 0), **sizes}
    made = {}
    for seed, tensor in enumerate(spec.inputs):
        shape = tensor.sizes(free)
        if tensor.dtype == "float32":
            made[tensor.name] = outlier_normal(*shape, dtype=torch.float32, seed=seed)
        elif tensor.name == "attention_mask":
            made[tensor.name] = torch.ones(shape, dtype=torch.int64)
            made[tensor.name][0, : shape[1] // 3] = 0
        elif tensor.name == "kv_range":
            made[tensor.name] = torch.randint(0, free["visual_length"], shape).sort(-1)[0]
        elif tensor.name == "has_image":
            made[tensor.name] = torch.arange(shape[0]) % 3 != 1
        elif tensor.name == "tile_positions":
            made[tensor.name] = torch.randint(-1, 2, shape)
        elif tensor.name == "position_ids":
            made[tensor.name] = torch.arange(shape[1]).expand(shape) + free["past_sequence_length"]
        else:
            made[tensor.name] = torch.randint(0, config.text_config.vocab_size, shape)
    return made


def assert_equal_to_pytorch(
    model: InfiMMHDForConditionalGeneration, backend: AotiBackend, graph: str, sizes: Mapping[str, int]
) -> None:
    spec = FAMILY.specs(model.config, "float32")[graph]
    inputs = inputs_of(spec, model.config, sizes)
    actual = backend.run(graph, inputs, [tensor.name for tensor in spec.outputs])
    nested = spec.nest([inputs[t.name] for t in spec.inputs])
    with torch.no_grad():
        expected = graph_modules(model)[graph](*nested)
    expected = expected if isinstance(expected, list) else [expected]
    assert len(expected) == len(actual)
    for name, value, want in zip(actual, actual.values(), expected, strict=True):
        assert value.shape == want.shape and value.dtype == want.dtype, name
        # Sums run in another order; towers with random weights grow to some tens.
        assert (value - want).abs().max() <= 2e-5 * want.abs().max(), name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[InfiMMHDForConditionalGeneration, Path]:
    model = tiny_model()
    model.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("aoti") / "tiny"
    limits = {"num_tiles": (1, 40), "visual_length": (1, 3000)}
    return model, export_aoti(model, folder, limits=limits)


@pytest.mark.slow
@needs_compiler
def test_tiny_packages(tiny: tuple[InfiMMHDForConditionalGeneration, Path]) -> None:
    model, folder = tiny
    backend = AotiBackend(folder, load_manifest(folder))
    for tiles in (1, 2, 10, 40):
        assert_equal_to_pytorch(model, backend, "vision", {"num_tiles": tiles})
        assert_equal_to_pytorch(model, backend, "cross_kv", {"num_tiles": tiles})
    steps = [(1, 1, 0, 8), (2, 7, 0, 72), (3, 1, 9, 2600), (1, 4, 5, 1)]
    for batch, text, past, visual in steps:
        sizes = {"batch_size": batch, "sequence_length": text, "past_sequence_length": past, "visual_length": visual}
        assert_equal_to_pytorch(model, backend, "decoder", sizes)
    _generates_what_pytorch_does(model, folder)
    _refuses_what_it_does_not_take(model, ExportedModel(load_manifest(folder), backend))
    _weights_are_used_in_place(backend)
    _bad_folders(folder)


def _generates_what_pytorch_does(model: InfiMMHDForConditionalGeneration, folder: Path) -> None:
    """The common runner on the packages: two rows, one with pictures, greedy."""
    runner = load(folder, "aoti")
    assert isinstance(runner, ExportedModel)
    image = model.config.image_token_id
    tokens = torch.tensor([[5, image, 7, image, 9], [3, 4, 5, 6, 7]])
    pixels = outlier_normal(2, 3, 112, 112, dtype=torch.float32)
    grids, counts = torch.tensor([[1, 1], [1, 1]]), torch.tensor([2, 0])
    encoded = runner.encode_tiles(pixels, grids, counts)
    actual = runner.generate_tokens(tokens, torch.ones_like(tokens), encoded, max_new_tokens=6)
    expected = model.generate(
        tokens, pixel_values=pixels, image_grids=grids, image_counts=counts, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(actual, expected[:, 5:])


def _refuses_what_it_does_not_take(model: InfiMMHDForConditionalGeneration, exported: ExportedModel) -> None:
    spec = FAMILY.specs(model.config, "float32")["vision"]
    with pytest.raises(LimitError, match="num_tiles is 41; this artifact takes 1 to 40"):
        exported.run("vision", inputs_of(spec, model.config, {"num_tiles": 41}))
    with pytest.raises(LimitError, match=r"pixel_values is torch\.float16"):
        inputs = inputs_of(spec, model.config, {"num_tiles": 1})
        exported.run("vision", inputs | {"pixel_values": inputs["pixel_values"].half()})


def _weights_are_used_in_place(backend: AotiBackend) -> None:
    """No copy: changing a weight changes the result."""
    weights = backend._constants["cross_kv"]
    inputs = {"image_features": torch.ones(1, 65, 224)}
    before = backend.run("cross_kv", inputs)["cross_key_values.0.key"]
    (name,) = (name for name in weights if "kv_proj" in name)
    weights[name].mul_(2.0)
    assert torch.allclose(backend.run("cross_kv", inputs)["cross_key_values.0.key"], 2 * before)


def _bad_folders(folder: Path) -> None:
    copied = folder.with_name("copied")
    shutil.copytree(folder, copied)
    manifest = load_manifest(folder)
    weights = folder / manifest.options["weights"]
    assert (folder / "aoti" / "vision.pt2").stat().st_size < weights.stat().st_size / 2  # no weights inside
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(ArtifactError, match="has 1000 bytes"):
        load_manifest(folder)
    with pytest.raises(ArtifactError, match="cannot be read"):
        AotiBackend(folder, manifest)
    weights.write_bytes(content)
    package = folder / "aoti" / "vision.pt2"
    package.write_bytes(package.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match=r"vision\.pt2 cannot be loaded"):
        AotiBackend(folder, manifest)
    manifest.options["device"] = "cuda"
    if not torch.cuda.is_available():
        with pytest.raises(ProviderError, match="compiled for CUDA"):
            AotiBackend(folder, manifest)
    with pytest.raises(ProviderError, match="provider='cpu' does not run; use 'aoti'"):
        load(copied, "cpu")
    manifest.target = "onnx"
    with pytest.raises(ProviderError, match="artifact for onnx"):
        open_backend(Opening(folder, manifest, "aoti"))


@pytest.mark.slow
@needs_compiler
def test_real_widths(tmp_path: Path) -> None:
    model = wide_model()
    folder = export_aoti(model, tmp_path / "wide", limits={"num_tiles": (1, 4)})
    backend = AotiBackend(folder, load_manifest(folder))
    for tiles in (1, 4):
        assert_equal_to_pytorch(model, backend, "vision", {"num_tiles": tiles})
        assert_equal_to_pytorch(model, backend, "cross_kv", {"num_tiles": tiles})
        for text, past in ((5, 0), (1, 7)):
            sizes = {"batch_size": 2, "sequence_length": text, "past_sequence_length": past, "visual_length": 1032 * tiles}
            assert_equal_to_pytorch(model, backend, "decoder", sizes)


def test_twins_show_their_kernels() -> None:
    """On fake tensors: what the compiler gets holds launches of our kernels and none of our opaque operators."""
    pytest.importorskip("triton", reason="needs triton")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter's kernels cannot be traced")
    from torch._functorch.aot_autograd import aot_export_module

    class Attentions(torch.nn.Module):
        def forward(self, qkv, q, k, v, kv_range):
            out = torch.ops.infimm_fast.subimage_attention_packed(
                qkv, 0.1, None, None, 0, True, None, None, qkv.shape[1], False, "triton"
            )[0]
            return out, torch.ops.infimm_fast.interval_attention(q, k, v, kv_range, 0.1, "triton")[0]

    with FakeTensorMode() as mode:
        visual = torch.empty(24, 12, 64)
        arguments = (
            torch.empty(3, 1025, 3, 16, 112), torch.empty(2, 5, 12, 64), visual, visual.clone(),
            torch.empty(2, 5, 2, dtype=torch.int64),
        )  # fmt: skip
    program = aoti.decompose_attention(torch.export.export(Attentions(), arguments, strict=False))
    with mode:
        graph, _ = aot_export_module(program.module(), arguments, trace_joint=False)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count("triton_kernel_wrapper_functional") == 2
    assert not any("subimage_attention_packed" in target or "interval_attention" in target for target in targets)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["subimage", "interval"])
def test_what_a_compiler_copies_of_a_kernel_is_whole(op: str, tmp_path: Path) -> None:
    """A package is compiled from source that PyTorch puts together; it gives the same code as ours."""
    pytest.importorskip("triton", reason="needs triton")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter compiles nothing")
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code

    from infimm_fast.export.to_kernels.sources import cross_attention_source, subimage_source
    from infimm_fast.kernels.common.offline import compile_source

    source = (
        subimage_source(4, 72, torch.bfloat16, 1025, 90, 0.1, packed=True)
        if op == "subimage"
        else cross_attention_source(4, 2, 72, torch.bfloat16, torch.int64, 90, 0.1)
    )
    copied = user_defined_triton_kernel_transitive_closure_source_code(source.kernel)
    decorator = "@triton.jit(do_not_specialize=['num_tokens', 'num_keys'])"
    file = tmp_path / f"copied_{op}.py"
    file.write_text(f"import triton\nimport triton.language as tl\n\n{decorator}\n{copied}")
    kernel = getattr(load_file(file), source.kernel.__name__)
    ours, theirs = (compile_source(replace(source, kernel=one), 90).ptx for one in (source.kernel, kernel))
    assert ours == theirs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_packages_with_triton_kernels(tmp_path: Path) -> None:
    """On a GPU the packages hold our kernels and no Python operator."""
    model = tiny_model()
    folder = export_aoti(model, tmp_path / "tiny", dtype="bfloat16", device="cuda")
    backend = AotiBackend(folder, load_manifest(folder))
    specs = FAMILY.specs(model.config, "bfloat16")
    exact, plain = graph_modules(model.double()), None
    plain = graph_modules(tiny_model().to("cuda", torch.bfloat16))
    for graph, sizes in (
        ("vision", {"num_tiles": 3}),
        ("cross_kv", {"num_tiles": 3}),
        ("decoder", {"batch_size": 2, "sequence_length": 6, "past_sequence_length": 0, "visual_length": 72}),
    ):
        inputs = {
            tensor.name: value.to(tensor.torch_dtype)
            for tensor, value in zip(
                specs[graph].inputs,
                inputs_of(FAMILY.specs(model.config, "float32")[graph], model.config, sizes).values(),
                strict=True,
            )
        }
        names = [tensor.name for tensor in specs[graph].outputs]
        actual = backend.run(graph, inputs, names)
        flat = [inputs[tensor.name] for tensor in specs[graph].inputs]
        with torch.no_grad():
            wide = [value.double() if value.is_floating_point() else value for value in flat]
            want = exact[graph](*specs[graph].nest(wide))
            low = plain[graph](*specs[graph].nest([value.cuda() for value in flat]))
        pairs = zip(want, low, strict=True) if isinstance(want, list) else [(want, low)]
        for name, (good, rough) in zip(names, pairs, strict=True):
            allowed = 2 * (rough.cpu().double() - good).abs().max() + 1e-2 * good.abs().max()
            assert (actual[name].double() - good).abs().max() <= allowed, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device='tpu'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"graphs": ("tower",)}, "graphs="),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    """They are refused before weights are read: the folder of the model holds its configuration only."""
    (tmp_path / "config.json").write_text('{"model_type": "infimm_hd"}')
    with pytest.raises(ExportError, match=message):
        export_aoti(tmp_path, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_missing_compiler_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ExportError, match="PyTorch sees none"):
            export_aoti("nothing", tmp_path / "out", device="cuda")
    monkeypatch.setattr(aoti.shutil, "which", lambda name: None)
    with pytest.raises(ExportError, match="C\\+\\+ compiler"):
        export_aoti("nothing", tmp_path / "out")


def test_fixed_axes_are_refused(tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor, tile_positions: torch.Tensor) -> torch.Tensor:
            return pixel_values.flatten(1)[:, : len(pixel_values)]

    config = preset("tiny")
    spec = FAMILY.specs(config, "float32")["vision"]
    limits = FAMILY.default_limits(config)
    prepared = PreparedExport(FAMILY, None, config, tmp_path, "float32", {"vision": spec}, limits)
    with pytest.raises(ExportError, match="vision"):
        aoti.trace_program(Fixed(), spec, prepared, "cpu")


def test_a_failed_compilation_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ExportError("no")

    monkeypatch.setattr(aoti, "_compile", fail)
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="no"):
        export_aoti(tiny_model(), out, graphs=("cross_kv",))
    assert not (out / "manifest.json").exists()
    with pytest.raises(ArtifactError, match="not an artifact"):
        load_manifest(out)


def test_weights_are_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names in the file are those of the checkpoint; the tracer's own constants are apart."""
    monkeypatch.setattr(aoti, "_compile", lambda program, file: [*program.state_dict, *program.constants])
    monkeypatch.setattr(
        prepared_module, "write_manifest", lambda out, manifest, names, progress: json.dumps(manifest.to_json())
    )
    saved: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(aoti, "_save_weights", lambda file, tensors: saved.update(tensors))
    model = tiny_model()
    export_aoti(model, tmp_path / "out", graphs=("vision", "cross_kv"))
    names = set(source_module.checkpoint_names(model).values())
    assert "vision_tower.blocks.0.attn.qkv.weight" in saved and set(saved) & names
    assert all(name.split(".")[0] in ("vision", "cross_kv") for name in set(saved) - names)
