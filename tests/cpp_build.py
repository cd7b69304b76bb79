"""One CMake build of this tree with C++ tests and benchmark, shared by the tests that need it; and what CMake says."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# cmake and ninja come with the extra `test`, into this environment's folder of scripts, which need not be on the path.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def run(*command: object, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command; if it fails, the test fails with all that the command said."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, check=False)
    if check and result.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def require_cmake_and_compiler() -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake: pip install cmake")
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name):
        pytest.skip("no C++ compiler (Debian, Ubuntu: apt-get install g++)")


def configure(source: Path, build: Path, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    return run("cmake", "-S", source, "-B", build, *generator, *options, check=check)


@functools.cache
def has_googletest() -> bool:
    """Whether CMake finds GoogleTest, asked in a project of one line."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        (source / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.18)\nproject(probe CXX)\nfind_package(GTest REQUIRED)\n"
        )
        return configure(source, Path(folder) / "build", check=False).returncode == 0


def build_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder: library, benchmark, and C++ tests where there is GoogleTest. Built by the first who asks."""
    require_cmake_and_compiler()
    return _build_tree(tmp_path_factory.getbasetemp() / "cpp-build")


@functools.cache
def _build_tree(build: Path) -> Path:
    tests = "ON" if has_googletest() else "OFF"
    configure(ROOT, build, f"-DDCA_BUILD_TESTS={tests}", "-DDCA_BUILD_BENCH=ON", "-DCMAKE_INSTALL_LIBDIR=lib")
    run("cmake", "--build", build, "--parallel", str(os.cpu_count() or 1))
    return build
