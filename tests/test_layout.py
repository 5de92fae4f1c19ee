"""The shape of the code: which part may import which, how long a function may be, how many values a call may pass."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCTS = [
    path
    for folder in ("infimm_fast", "kernels", "export", "benchmarks", "tools", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# The arrows of DESIGN.md: a part imports from itself and from those before it.
PARTS = (
    ("infimm_fast.errors", "infimm_fast.dtypes", "infimm_fast.folders", "infimm_fast.images"),
    ("infimm_fast.kernels",),
    ("infimm_fast.models", "infimm_fast.integrations", "infimm_fast.registration"),
    ("infimm_fast.export",),
    ("infimm_fast.benchmarks",),
    ("infimm_fast.cli",),
)
MOST_LINES = 90
MOST_POSITIONAL = 8


def module_of(path):
    """Return the name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "infimm_fast" else ("infimm_fast", *parts))


def part_of(module):
    """Return the index of the part that a module belongs to, or None for the package itself."""
    for index, names in enumerate(PARTS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return index
    return None


def imports_of(tree):
    """Yield the modules that a file imports anywhere, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path):
    return ast.parse(path.read_text(), str(path))


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in PRODUCTS if part_of(module_of(p)) is not None], ids=relative)
def test_imports_go_one_way(path):
    own = part_of(module_of(path))
    for module in imports_of(parse(path)):
        other = part_of(module)
        assert other is None or other <= own, f"{relative(path)} imports {module}"


def test_an_op_imports_no_other_op():
    for path in (p for p in PRODUCTS if relative(p).startswith("kernels/")):
        own = ("infimm_fast.kernels", f"infimm_fast.kernels.{path.parent.name}", "infimm_fast.kernels.common")
        for module in imports_of(parse(path)):
            if module.startswith("infimm_fast.kernels"):
                assert module.startswith(own[1:]) or path.parent.name == "common", f"{relative(path)} imports {module}"


def test_products_import_no_test():
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"pytest", "tests"}
    for path in PRODUCTS:
        if path.name.startswith("test_"):
            continue
        found = {module.partition(".")[0] for module in imports_of(parse(path))} & helpers
        assert not found, f"{relative(path)} imports {found}"


@pytest.mark.parametrize("path", [*PRODUCTS, *TESTS], ids=relative)
def test_functions_are_short_and_calls_cannot_be_mixed_up(path):
    tree = parse(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES, f"{relative(path)}: {node.name} has {lines} lines, {MOST_LINES} are allowed"
        if isinstance(node, ast.Call) and not _is_launch(node.func):
            values = [value for value in node.args if not isinstance(value, ast.Starred)]
            assert len(values) <= MOST_POSITIONAL, (
                f"{relative(path)}:{node.lineno} passes {len(values)} values by position, {MOST_POSITIONAL} are allowed"
            )


def _is_launch(function):
    """Whether a call starts a kernel, ``kernel[grid](...)``, or a torch operator, whose order a test of its own checks."""
    return isinstance(function, ast.Subscript) or ast.unparse(function).startswith("torch.ops.")


def test_the_rules_notice_what_they_forbid(tmp_path):
    code = "def long():\n" + "    x = 1\n" * 90 + "\nf(1, 2, 3, 4, 5, 6, 7, 8, 9)\n"
    for text in (code.partition("\nf(")[0], code[code.index("\nf(") :]):
        path = ROOT / "tests" / "not_there.py"
        with pytest.raises(AssertionError), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "read_text", lambda self, text=text: text)
            test_functions_are_short_and_calls_cannot_be_mixed_up(path)
