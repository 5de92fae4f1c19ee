"""What the TensorRT export does to a graph, without any TensorRT: preparation, lint, profiles, FP8."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

import onnx
import onnxruntime as ort
from onnx import helper

from infimm_fast.export.common.errors import (
    ExportError,
    LimitError,
    MissingKernelError,
)
from infimm_fast.export.common.spec import GraphSpec, TensorSpec
from infimm_fast.export.models.infimm_hd import InfiMMHD
from infimm_fast.export.to_onnx.functions import (
    DOMAIN,
    interval_attention_body,
    subimage_attention_body,
)
from infimm_fast.export.to_tensorrt import fp8, lint, prepare, profiles
from infimm_fast.models.infimm_hd.presets import preset
from interpreter import load_file

GRAPHS = load_file(Path(__file__).with_name("tensorrt_graphs.py"))
FLOAT, HALF, INT64 = GRAPHS.FLOAT, GRAPHS.HALF, GRAPHS.INT64
make_graph, save = GRAPHS.make_graph, GRAPHS.save
FAMILY = InfiMMHD()
TINY_RANGES = functools.partial(FAMILY.axis_ranges, preset("tiny"))
VISION = GraphSpec("vision", (TensorSpec("pixel_values", "float32", ("num_tiles", 3, 8, 8)),), ())


def run_model(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Run a prepared graph in ONNX Runtime, without the attribute that only TensorRT knows."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != prepare.DECOMPOSABLE]
        del node.attribute[:]
        node.attribute.extend(kept)
    return ort.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_integer_cumsum_runs_in_float() -> None:
    nodes = [
        helper.make_node("Constant", [], ["axis"], value_int=1),
        helper.make_node("CumSum", ["x", "axis"], ["y"], name="sum", exclusive=1),
    ]
    model = make_graph(nodes, {"x": (INT64, [2, "n"])}, {"y": (INT64, [2, "n"])})
    assert "sum (CumSum): INT64 input x" in str(lint.lint_graph(model)[0])
    prepared = prepare.prepare_graph(model)
    assert lint.lint_graph(prepared) == []
    x = np.arange(10).reshape(2, 5)
    assert np.array_equal(run_model(prepared, {"x": x})[0], run_model(model, {"x": x})[0])
    assert [node.op_type for node in model.graph.node] == ["Constant", "CumSum"]  # the original is not touched


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_flat_attention_becomes_four_dimensional(masked: bool, cached: bool) -> None:
    """3-D inputs, a 2-D mask, a cache of its own: the prepared graph computes the same and passes the lint."""
    past = 3 if cached else 0
    inputs = {"q": (FLOAT, [2, 4, 32]), "k": (FLOAT, [2, 6, 16]), "v": (FLOAT, [2, 6, 16])}
    outputs = {"out": (FLOAT, [2, 4, 32])}
    names, results = ["q", "k", "v", ""], ["out"]
    if masked:
        inputs["mask"] = (FLOAT, [4, 6 + past])
        names[3] = "mask"
    if cached:
        inputs |= {"past_key": (FLOAT, [2, 2, past, 8]), "past_value": (FLOAT, [2, 2, past, 8])}
        outputs |= {"key": (FLOAT, [2, 2, 6 + past, 8]), "value": (FLOAT, [2, 2, 6 + past, 8])}
        names += ["past_key", "past_value"]
        results += ["key", "value"]
    node = helper.make_node("Attention", names, results, name="attention", q_num_heads=4, kv_num_heads=2, scale=0.3)
    model = make_graph([node], inputs, outputs)
    assert lint.lint_graph(model)
    prepared = prepare.prepare_graph(model)
    assert lint.lint_graph(prepared) == []
    (attention,) = (node for node in prepared.graph.node if node.op_type == "Attention")
    assert prepare.attribute_of(attention, prepare.DECOMPOSABLE) == 1 and len(attention.output) == 1
    values = {name: numbers(*shape, seed=seed) for seed, (name, (_, shape)) in enumerate(inputs.items())}
    expected = run_model(model, values)
    for actual, want in zip(run_model(prepared, values), expected, strict=True):
        np.testing.assert_allclose(actual, want, rtol=1e-5, atol=1e-6)


def test_every_function_body_can_be_prepared() -> None:
    """Nodes of our domain: inlined without plugins, kept with the plugin's attributes with them."""
    query, visual = (FLOAT, ["b", "t", 4, 8]), (FLOAT, ["s", 2, 8])
    nodes = [
        helper.make_node("SubimageAttention", ["q", "q", "q"], ["first"], name="a", domain=DOMAIN, scale=0.4, is_causal=0),
        helper.make_node("IntervalAttention", ["first", "k", "v", "r"], ["out"], name="b", domain=DOMAIN, scale=0.4),
    ]
    values = [
        helper.make_tensor_value_info(name, *kind)
        for name, kind in {"q": query, "k": visual, "v": visual, "r": (INT64, ["b", "t", 2])}.items()
    ]
    graph = helper.make_graph(nodes, "graph", values, [helper.make_tensor_value_info("out", *query)])
    model = helper.make_model(
        graph,
        functions=[subimage_attention_body(23), interval_attention_body(23)],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    plain = prepare.prepare_graph(model)
    assert lint.lint_graph(plain) == [] and all(node.name for node in plain.graph.node)
    assert list(prepare.attention_nodes(plain).values()) == [False, False]
    kept = prepare.prepare_graph(model, prepare.PLUGIN_OPS)
    assert lint.lint_graph(kept, prepare.PLUGIN_OPS) == [] and not kept.functions
    assert prepare.attention_nodes(kept) == {"a": True, "b": True}
    for node in kept.graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert (
            attributes["plugin_namespace"] == b"infimm" and attributes["plugin_version"] == b"1" and attributes["aot"] == 1
        )
    with pytest.raises(MissingKernelError, match=r"a \(SubimageAttention\): no plugin runs it"):
        lint.check_graph("decoder", kept)
    inputs = {
        "q": numbers(2, 3, 4, 8), "k": numbers(7, 2, 8, seed=1), "v": numbers(7, 2, 8, seed=2),
        "r": np.array([[[0, 7], [2, 2], [1, 4]], [[3, 9], [5, 2], [0, 1]]]),
    }  # fmt: skip
    np.testing.assert_allclose(run_model(plain, inputs)[0], run_model(model, inputs)[0], rtol=1e-5, atol=1e-6)


def test_packed_attention_reads_one_tensor() -> None:
    nodes = [
        helper.make_node("Constant", [], ["axis"], value_ints=[2]),
        helper.make_node("Split", ["qkv"], ["q1", "k1", "v1"], axis=2, num_outputs=3),
        *(helper.make_node("Squeeze", [f"{name}1", "axis"], [name]) for name in "qkv"),
        helper.make_node("SubimageAttention", ["q", "k", "v"], ["out"], name="a", domain=DOMAIN, scale=0.4, is_causal=0),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("qkv", HALF, ["b", 9, 3, 4, 8])],
        [helper.make_tensor_value_info("out", HALF, ["b", 9, 4, 8])],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=[subimage_attention_body(23)], opset_imports=imports, ir_version=10)
    prepared = prepare.prepare_graph(model, prepare.PLUGIN_OPS)
    assert [(node.op_type, list(node.input)) for node in prepared.graph.node] == [("SubimageAttentionPacked", ["qkv"])]
    # In another order they are not one packed tensor.
    model.graph.node[-1].input[:] = ["k", "q", "v"]
    prepared = prepare.prepare_graph(model, prepare.PLUGIN_OPS)
    assert prepared.graph.node[-1].op_type == "SubimageAttention"


@pytest.mark.parametrize(
    ("node", "inputs", "problem"),
    [
        (helper.make_node("NonZero", ["x"], ["y"], name="n"), {"x": (FLOAT, [4])}, None),
        (helper.make_node("Bernoulli", ["x"], ["y"], name="n"), {"x": (FLOAT, [4])}, "no ai.onnx operator"),
        (helper.make_node("Softmax", ["x"], ["y"], name="n"), {"x": (11, [4])}, "FP64 input x; the parser takes FP32"),
        (
            helper.make_node("ReduceSum", ["x", "a"], ["y"], name="n"),
            {"x": (FLOAT, [4]), "a": (INT64, [1])},
            "axes a are computed",
        ),
        (
            helper.make_node("ScatterND", ["x", "i", "u"], ["y"], name="n", reduction="add"),
            {"x": (FLOAT, [4]), "i": (INT64, [2, 1]), "u": (FLOAT, [2])},
            "reduction add",
        ),
        (
            helper.make_node("Attention", ["x", "k", "x"], ["y"], name="n", softcap=3.0),
            {"x": (FLOAT, [1, 2, 3, 8]), "k": (FLOAT, [1, 2, 3, 8])},
            "softcap",
        ),
        (
            helper.make_node("Attention", ["x", "x", "v"], ["y"], name="n"),
            {"x": (FLOAT, [1, 2, 3, 8]), "v": (FLOAT, [1, 2, 3, 8])},
            "on which builders crash",
        ),
    ],
)
def test_lint_names_the_node(node: onnx.NodeProto, inputs: dict, problem: str | None) -> None:
    values = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    graph = helper.make_graph([node], "graph", values, [onnx.ValueInfoProto(name="y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    findings = lint.lint_graph(model)
    assert bool(findings) == (problem is not None)
    if problem:
        assert problem in str(findings[0]) and str(findings[0]).startswith("n (")


def test_lint_refuses_new_opsets() -> None:
    model = make_graph([helper.make_node("Relu", ["x"], ["y"], name="n")], {"x": (FLOAT, [1])}, {"y": (FLOAT, [1])}, 25)
    with pytest.raises(MissingKernelError, match="opset 25; the parser takes up to 24"):
        lint.check_graph("vision", model)


def test_presets_fit_the_graphs() -> None:
    config = preset("tiny")
    for name in profiles.PRESETS:
        for spec in FAMILY.specs(config, "float16").values():
            limits = profiles.resolve_profiles(name)
            made = profiles.profiles_of(spec, limits, TINY_RANGES, {"total_sequence_length": (1, 4096)})
            assert made
            for profile in made:
                for low, usual, high in profile.shapes(spec).values():
                    assert all(a <= b <= c for a, b, c in zip(low, usual, high, strict=True))
                if "total_sequence_length" in profile.axes:
                    parts = (profile.axes["past_sequence_length"], profile.axes["sequence_length"])
                    assert profile.axes["total_sequence_length"] == tuple(map(sum, zip(*parts, strict=True)))
    vision = FAMILY.specs(config, "float16")["vision"]
    assert len(profiles.profiles_of(vision, profiles.PRESETS["chat"], TINY_RANGES, {})) == 1


def test_profiles_are_chosen_by_shape() -> None:
    spec = FAMILY.specs(preset("tiny"), "float16")["decoder"]
    made = profiles.profiles_of(spec, profiles.PRESETS["chat"], TINY_RANGES, {})
    sizes = {"batch_size": 1, "visual_length": 8}
    prompt = sizes | {"sequence_length": 300, "past_sequence_length": 0, "total_sequence_length": 300}
    step = sizes | {"sequence_length": 1, "past_sequence_length": 300, "total_sequence_length": 301}
    assert [made[profiles.choose_profile(made, spec, wanted)].name for wanted in (prompt, step)] == ["prompt", "step"]
    with pytest.raises(LimitError, match=r"batch_size=99.*outside every profile of the decoder engine.*batch_size 1 to 4"):
        profiles.choose_profile(made, spec, prompt | {"batch_size": 99})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: profiles.resolve_profiles("huge"), "choose one of chat, batch, one-tile"),
        (lambda: profiles.resolve_profiles([]), "profiles is empty"),
        (lambda: profiles.Limits("p", tiles=(4, 2, 8)), "tiles=4,2,8"),
        (lambda: profiles.Limits("p", batch=(0, 1, 1)), "batch=0,1,1"),
        (
            lambda: profiles.profiles_of(
                VISION, [profiles.Limits("p", tiles=(50, 60, 70))], TINY_RANGES, {"num_tiles": (1, 40)}
            ),
            "num_tiles 50 to 70 lies outside 1 to 40",
        ),
    ],
)
def test_bad_profiles(make: object, message: str) -> None:
    with pytest.raises(LimitError, match=message):
        make()


def test_fp8_pairs(tmp_path: Path) -> None:
    """Both forms of a linear layer get pairs; the result stays near."""
    weight = numbers(16, 8, seed=3).astype(np.float16)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
            helper.make_node("Transpose", ["w2"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["h", "turned"], ["m"], name="second"),
            helper.make_node("Gemm", ["m", "w2"], ["y"], name="third", transB=1),
        ],
        "graph",
        [helper.make_tensor_value_info("x", HALF, ["n", 16])],
        [helper.make_tensor_value_info("y", HALF, ["n", 8])],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(weight[:8] / 4, "w2")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    file = save(model, tmp_path)
    layers = fp8.linear_layers(model.graph)
    assert [(layer.activation, layer.weight, layer.channel_axis) for layer in layers] == [
        ("x", "w", 1), ("h", "w2", 0), ("m", "w2", 0),
    ]  # fmt: skip
    x = numbers(5, 16).astype(np.float16)
    largest = fp8.measure_activations(file, [layer.activation for layer in layers], [{"x": x}])
    assert largest["x"] == pytest.approx(np.abs(x).max(), rel=1e-3) and set(largest) == {"x", "h", "m"}
    assert fp8.quantize_graph(model, tmp_path, largest) == 3
    onnx.checker.check_model(model)
    assert lint.lint_graph(model) == []
    before, after = (run_model(m, {"x": x})[0].astype(np.float32) for m in (onnx.load(file), model))
    error = np.abs(after - before).max() / np.abs(before).max()
    assert 1e-4 < error < 0.2
    with pytest.raises(ExportError, match="none were given"):
        fp8.measure_activations(file, ["x"], [])
    with pytest.raises(ExportError, match="overflow"):
        fp8.measure_activations(file, ["h"], [{"x": np.full((1, 16), 60000, np.float16)}])
    with pytest.raises(ExportError, match="cannot be measured"):
        fp8.measure_activations(file, ["nothing"], [{"x": x}])
