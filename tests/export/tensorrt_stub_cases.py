"""Runs in a process whose path holds a stub of TensorRT: ``python tensorrt_stub_cases.py names | plugins``."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import tensorrt as trt
import torch

from infimm_fast.export import to_tensorrt
from infimm_fast.export.to_tensorrt.flavors import load_flavor
from infimm_fast.kernels.common.offline import assemble, entry_parameters

SOURCES = sorted(Path(to_tensorrt.__file__).parent.glob("*.py"))
# What the variables of our code hold. Attributes of a variable that is named here must exist in the class.
VARIABLES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "_config": "IBuilderConfig",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "added": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
}
RTX_ONLY = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}


def used_names() -> set[str]:
    """Return every TensorRT name in our sources: "Builder.create_network", "BuilderFlag.REFIT", "plugin.cdiv", ..."""
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            names = [node.attr]
            base: ast.AST = node.value
            while isinstance(base, ast.Attribute):
                names.append(base.attr)
                base = base.value
            root = base.id if isinstance(base, ast.Name) else None
            names.reverse()
            if root == "trt" or (root == "self" and names[0] == "trt"):
                path = names if root == "trt" else names[1:]
                found.add(".".join(path[:2]))
            elif root == "trtp":
                found.add(f"plugin.{names[0]}")
            elif root in VARIABLES:
                found.add(f"{VARIABLES[root]}.{names[0]}")
            elif root == "self" and names[0] in VARIABLES and len(names) > 1:
                found.add(f"{VARIABLES[names[0]]}.{names[1]}")
    return {name for name in found if name}


def exists(name: str) -> bool:
    value: object = trt
    for part in name.split("."):
        if part == "plugin":
            import tensorrt.plugin

            value = tensorrt.plugin
        elif not hasattr(value, part):
            return False
        else:
            value = getattr(value, part)
    return True


def names() -> None:
    used = used_names()
    assert {"Builder.create_network", "BuilderFlag.REFIT", "plugin.aot_impl", "IBuilderConfig.progress_monitor"} <= used, (
        used
    )
    missing = {name for name in used if not exists(name)}
    assert {name.split(".")[-1] for name in missing} <= RTX_ONLY, f"TensorRT {trt.__version__} has no {sorted(missing)}"
    print(len(used), "names")


class Expression:
    """A dimension that knows its value; `free` ones do not say so, as dimensions of a profile do not."""

    def __init__(self, value: int, free: bool = False):
        self.value, self.free = value, free

    def is_constant(self) -> bool:
        return not self.free

    def get_constant_value(self) -> int:
        assert not self.free
        return self.value

    def is_size_tensor(self) -> bool:
        return False


class Symbol:
    """What a kernel's scalar or a launch's size is handed over in."""


def replace_native_expressions() -> None:
    """Put Python classes in the place of those that only the library can make; before `tensorrt.plugin` is imported."""
    trt.IDimensionExpr = Expression
    trt.ISymExpr = Symbol
    trt.DimsExprs = lambda size: [None] * size


class Expressions:
    """Computes what TensorRT would at run time."""

    OPERATIONS: ClassVar = {
        trt.DimensionOperation.SUM: lambda a, b: a + b,
        trt.DimensionOperation.SUB: lambda a, b: a - b,
        trt.DimensionOperation.PROD: lambda a, b: a * b,
        trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
        trt.DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
    }

    def constant(self, value: int) -> Expression:
        return Expression(value)

    def operation(self, operation: object, first: Expression, second: Expression) -> Expression:
        return Expression(self.OPERATIONS[operation](first.value, second.value), first.free or second.free)


class Registry:
    def __init__(self) -> None:
        self.creators: dict[str, object] = {}

    def register_creator(self, creator: object, namespace: str) -> bool:
        self.creators[f"{namespace}::{creator.name}"] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> object:
        return self.creators[f"{namespace}::{name}"]


class Scalars(dict):
    nbSymExprs = 0


def drive(creator: object, inputs: list, types: list, attributes: dict, tactic: int | None = None) -> SimpleNamespace:
    """Ask a plugin what TensorRT's builder asks, in its order."""
    fields = [trt.PluginField(name, value, kind) for name, (value, kind) in attributes.items()]
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(
        creator.name, "infimm", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD, request
    )
    (out_type,) = plugin.get_output_data_types(types, [len(shape) for shape in inputs])
    assert out_type == types[0]
    expressions = Expressions()
    (out_shape,) = plugin.get_output_shapes(inputs, [], expressions)
    described = []
    for shape, kind in zip([*inputs, out_shape], [*types, out_type], strict=True):
        desc = trt.DynamicPluginTensorDesc()
        plain = trt.PluginTensorDesc()
        plain.type, plain.format = kind, trt.TensorFormat.LINEAR
        plain.dims = trt.Dims([-1 if size.free else size.value for size in shape])
        desc.desc = plain
        described.append(desc)
    combinations = plugin.get_supported_format_combinations(described, len(inputs))
    wanted = [desc.desc.type for desc in described]
    offered = [[c.type for c in combinations[i : i + len(wanted)]] for i in range(0, len(combinations), len(wanted))]
    assert wanted in offered, (wanted, offered)
    plugin.configure_plugin(described[:-1], described[-1:])
    tactics = plugin.get_valid_tactics()
    plugin.set_tactic(tactic if tactic is not None else 0)
    launch, scalars = SimpleNamespace(), Scalars()
    plugin.get_launch_params(inputs, described, len(inputs), launch, scalars, expressions)
    name, ptx = plugin.get_kernel([d.desc for d in described[:-1]], [described[-1].desc])
    return SimpleNamespace(
        name=name,
        ptx=ptx.decode(),
        grid=launch.grid_x.expr.value,
        block=launch.block_x.expr.value,
        shared=launch.shared_mem.expr.value,
        scalars=[scalars[i].expr.value for i in range(scalars.nbSymExprs)],
        tactics=tactics,
        out=[size.value for size in out_shape],
    )


def plugins(sms: tuple[int, ...] = (80, 89, 90, 100, 120)) -> None:
    from infimm_fast.export.to_kernels.sources import choose_cross_config, subimage_config
    from infimm_fast.export.to_tensorrt.plugins import CROSS_TACTICS, register_plugins

    replace_native_expressions()
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    flavor = load_flavor("tensorrt")
    scale = (np.array([0.125], np.float32), trt.PluginFieldType.FLOAT32)
    causal = (np.array([0], np.int32), trt.PluginFieldType.INT32)
    cdiv = lambda a, b: -(-a // b)  # noqa: E731
    for index, sm in enumerate(sms):
        register_plugins(flavor, sm)  # a second time is fine
        kind, dtype = ((trt.bfloat16, torch.bfloat16), (trt.float16, torch.float16))[index % 2]
        tiles, tokens = Expression(3, free=True), Expression(1025)
        shape = [tiles, tokens, Expression(16), Expression(112)]
        config, _ = subimage_config(112, dtype, 1025, sm)
        for name, inputs in (
            ("SubimageAttention", [shape] * 3),
            ("SubimageAttentionPacked", [[tiles, tokens, Expression(3), *shape[2:]]]),
        ):
            answer = drive(
                registry.creators[f"infimm::{name}"], inputs, [kind] * len(inputs), {"scale": scale, "is_causal": causal}
            )
            assert answer.out == [3, 1025, 16, 112] and answer.scalars == [1025]
            assert answer.grid == (cdiv(1025 - config.peel, config.block_m) + config.peel) * 16 * 3
            assert answer.block == 32 * config.num_warps and answer.shared > 0
            check_ptx(answer, ["u64"] * len(inputs) + ["u32", "u64"], sm)
        batch, text, keys = (Expression(size, free=True) for size in (2, 40, 2056))
        query = [batch, text, Expression(12), Expression(64)]
        visual = [keys, Expression(12), Expression(64)]
        for tactic, rows in list(CROSS_TACTICS.items())[: None if index == 0 else 1]:
            answer = drive(
                registry.creators["infimm::IntervalAttention"],
                [query, visual, visual, [batch, text, Expression(2)]],
                [kind, kind, kind, trt.int64],
                {"scale": scale},
                tactic,
            )
            config = choose_cross_config("decode" if rows == 1 else "forward", 64, dtype, rows, sm)
            assert answer.scalars == [40, 2056] and answer.out == [2, 40, 12, 64]
            assert answer.grid == cdiv(40, config.block_m) * 12 * 2 and sorted(answer.tactics) == sorted(CROSS_TACTICS)
            check_ptx(answer, ["u64"] * 4 + ["u32", "u32", "u64"], sm)
    refuse_free_heads(registry, scale, causal)
    print("plugins answer")


def refuse_free_heads(registry: Registry, scale: tuple, causal: tuple) -> None:
    shape = [Expression(3, free=True), Expression(33), Expression(2, free=True), Expression(64)]
    try:
        drive(
            registry.creators["infimm::SubimageAttention"],
            [shape] * 3,
            [trt.float16] * 3,
            {"scale": scale, "is_causal": causal},
        )
    except Exception as error:
        assert "fixed number of heads" in str(error), error
    else:
        raise AssertionError("a free number of heads was accepted")


def check_ptx(answer: SimpleNamespace, parameters: list[str], sm: int) -> None:
    assert entry_parameters(answer.ptx) == parameters and f".entry {answer.name}(" in answer.ptx
    assert f".target sm_{sm}" in answer.ptx
    assert len(assemble(answer.ptx, sm)) > 1000


if __name__ == "__main__":
    {"names": names, "plugins": plugins}[sys.argv[1]](*([tuple(map(int, sys.argv[2:]))] if sys.argv[2:] else []))
