"""Maps folders to packages; all metadata is in pyproject.toml.

``kernels/<op>`` installs as ``infimm_fast.kernels.<op>`` and ``export/<target>`` as ``infimm_fast.export.<target>``.
Neither root folder is a package itself: an importable ``kernels`` would shadow Hugging Face's package of that name.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def _map_folders() -> dict[str, str]:
    """Return the package -> folder mapping, with folders relative to the checkout."""
    mapping = {name: name.replace(".", "/") for name in find_packages(include=["infimm_fast", "infimm_fast.*"])}
    for parent in ("kernels", "export"):
        for init in sorted((ROOT / parent).glob("*/__init__.py")):
            mapping[f"infimm_fast.{parent}.{init.parent.name}"] = f"{parent}/{init.parent.name}"
    for name in find_packages(include=["benchmarks", "benchmarks.*"]):
        mapping[f"infimm_fast.{name}"] = name.replace(".", "/")
    return mapping


PACKAGES = _map_folders()

setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "infimm_fast": ["py.typed"],
        "infimm_fast.export.to_onnx": ["*.json"],
        "infimm_fast.export.to_tensorrt": ["*.json"],
        "infimm_fast.export.to_kernels": ["*.cpp"],
    },
)
