"""Arrows between layers point one way: CMake refuses a wrong include, and modules import only what lies below them."""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path

import pytest
from cpp_build import ROOT, configure, require_cmake_and_compiler

PACKAGE = ROOT / "dca_ext"

# --- C++ --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What CMake needs of this tree, configured once, to be spoiled."""
    require_cmake_and_compiler()
    copy = tmp_path_factory.mktemp("layers") / "tree"
    for folder in ("csrc", "cmake"):
        shutil.copytree(ROOT / folder, copy / folder)
    (copy / "dca_ext").mkdir()
    shutil.copy(PACKAGE / "version.py", copy / "dca_ext")
    shutil.copy(ROOT / "CMakeLists.txt", copy)
    configure(copy, copy / "build")
    return copy


@pytest.mark.parametrize(
    ("file", "include"),
    [
        ("cpu/attention.cpp", "<torch/csrc/stable/tensor.h>"),
        ("cpu/micro_kernels.inc", "<cute/tensor.hpp>"),
        ("cpu/rotate.cpp", '"../reference/reference.h"'),
        ("dispatch/api.cpp", '"../torch/tensor_args.h"'),
        ("dispatch/checks.h", "<pybind11/pybind11.h>"),
        ("include/dca/params.h", '"../../cpu/threading.h"'),
        ("include/dca/dca.h", '"backends.h"'),
        ("reference/reference.cpp", '"../cpu/cache_rows.h"'),
        ("kernels/sm80/mainloop.h", "<torch/csrc/stable/tensor.h>"),
        ("kernels/common/softmax.h", '"../../cpu/combine.h"'),
        ("python/core_module.cpp", "<torch/extension.h>"),
        ("torch/operators.cpp", "<ATen/ATen.h>"),
        ("torch/operators.cpp", "<torch/torch.h>"),
    ],
)
def test_a_wrong_include_fails_the_configuration(file: str, include: str, tree: Path) -> None:
    path = tree / "csrc" / file
    text = path.read_text()
    path.write_text(f"{text}\n#include {include}\n")
    result = configure(tree, tree / "build", check=False)
    path.write_text(text)
    assert result.returncode != 0
    message = " ".join(result.stderr.split())  # CMake wraps its lines
    assert f"csrc/{file} includes {include[1:-1]}, which the layer csrc/{file.split('/')[0]} must not see" in message


# --- Python -----------------------------------------------------------------------------------------------------------

#: What each module may import of the package. A module that is not here is new: give it its place.
ALLOWED = {
    "version": set(),
    "config": set(),
    "arguments": {"config"},
    "operators": {"installation"},
    "scales": set(),
    "installation": {"_core"},
    "reference": {"config"},
    "rotary": {"config"},
    "cache": {"config"},
    "functional": {"config", "arguments", "operators"},
    "dca_cache": {"config", "functional", "scales"},
    "attention": {"config", "functional", "rotary", "cache", "dca_cache"},
    "patch": {"config", "attention", "cache", "rotary"},
    "cli": {"", "cli", "_core"},  # "": the public names
    "__main__": {"cli"},
    "__init__": {
        *("config", "version", "attention", "dca_cache", "functional", "installation", "patch", "rotary", "scales"),
    },
}

#: Third-party packages that only some may know; all may know torch, except those in WITHOUT_TORCH.
OWNERS = {
    "transformers": {"rotary", "cache", "dca_cache", "attention", "patch", "cli"},
    **{name: {"cli"} for name in ("gguf", "matplotlib", "rich", "safetensors", "tokenizers")},
}
WITHOUT_TORCH = {"version", "config", "installation", "__main__"}


def modules() -> dict[str, ast.Module]:
    """Path within the package -> syntax tree."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in files}


def layer_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all imported modules, wherever the import stands; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_layers(names: set[str]) -> set[str]:
    """Layers of dca_ext among imported names; "" for the package's public names."""
    layers = set()
    known = {layer_of(file) for file in modules()} | {"_core"}
    for name in names:
        parts = name.split(".")
        if parts[0] == "dca_ext" and len(parts) > 1:
            layers.add(parts[1] if parts[1] in known else "")
    return layers


@pytest.mark.parametrize("file", modules())
def test_modules_import_only_lower_layers(file: str) -> None:
    layer = layer_of(file)
    assert layer in ALLOWED, f"dca_ext/{file} has no place in tests/test_layers.py yet"
    names = imported(modules()[file])
    assert own_layers(names) <= ALLOWED[layer] | {layer}
    for name in {name.split(".")[0] for name in names}:
        assert layer in OWNERS.get(name, {layer}), f"dca_ext/{file} must not know {name}"
    if layer in WITHOUT_TORCH:
        assert not {name for name in names if name.split(".")[0] == "torch"}


def test_config_needs_nothing_but_the_standard_library() -> None:
    assert {name.split(".")[0] for name in imported(modules()["config.py"])} <= set(sys.stdlib_module_names)


def test_the_check_sees_wrong_imports() -> None:
    source = "def f():\n    from dca_ext.cli import demo\n    from dca_ext import functional, DCAConfig"
    names = imported(ast.parse(source))
    assert own_layers(names) == {"cli", "functional", ""}
