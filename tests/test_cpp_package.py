"""The C++ example finds dca from outside of the tree, as CMake and as pip installed it, and runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cpp_build import ROOT, build_tree, configure, require_cmake_and_compiler, run

import dca_ext


def build_and_run_example(dca_dir: Path, tmp_path: Path) -> None:
    # The example is copied, so that nothing of this tree is near it.
    source = tmp_path / "example"
    shutil.copytree(ROOT / "examples" / "cpp", source)
    build = tmp_path / "example-build"
    configure(source, build, f"-Ddca_DIR={dca_dir}")
    run("cmake", "--build", build)
    said = run(build / "paged_decode").stdout
    assert f"dca {dca_ext.__version__}, 1000 tokens at once by cpu/" in said
    assert "in pieces, paged: the same (largest difference " in said


def test_example_with_the_installed_tree(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    prefix = tmp_path / "prefix"
    run("cmake", "--install", build_tree(tmp_path_factory), "--prefix", prefix, "--component", "cpp")
    installed = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    headers = {f"include/dca/{path.name}" for path in (ROOT / "csrc" / "include" / "dca").iterdir()}
    assert headers <= installed
    assert {"lib/libdca.a", "lib/cmake/dca/dcaConfig.cmake"} <= installed
    assert str(ROOT) not in "".join(path.read_text() for path in (prefix / "lib" / "cmake" / "dca").iterdir())
    build_and_run_example(prefix / "lib" / "cmake" / "dca", tmp_path)


def test_example_with_the_installed_python_package(tmp_path: Path) -> None:
    require_cmake_and_compiler()
    if dca_ext.build_info()["cuda_architectures"] and shutil.which("nvcc") is None:
        pytest.skip("dca_ext was built with CUDA kernels; to link them CMake needs the CUDA toolkit, which is not here")
    folder = Path(dca_ext.cmake_dir())
    assert (folder / "dcaConfig.cmake").is_file(), "pip install . puts the C++ package into dca_ext"
    build_and_run_example(folder, tmp_path)


def test_package_refuses_another_version(tmp_path: Path) -> None:
    require_cmake_and_compiler()
    source = tmp_path / "source"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(consumer CXX)\nfind_package(dca 99.0 REQUIRED)\n"
    )
    result = configure(source, tmp_path / "build", f"-Ddca_DIR={dca_ext.cmake_dir()}", check=False)
    assert result.returncode != 0
    assert "99.0" in result.stderr
