"""Drives CMake and ninja; CMakeLists.txt has everything about flags and targets, pyproject.toml everything else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))
import find_cuda  # noqa: E402
from build_backend import find_torch, plan_cuda  # noqa: E402


class CMakeBuild(build_ext):
    """One CMake run for all extension modules, installed into the package, and the C++ package beside them."""

    def run(self) -> None:
        """Configures, builds and installs."""
        torch_dir = find_torch()
        if torch_dir is None:
            raise SystemExit("dca_ext needs torch 2.10 or newer to build: pip install torch, then try again.")
        if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name):
            raise SystemExit("dca_ext needs a C++17 compiler to build (Debian, Ubuntu: apt-get install g++).")
        build = Path(self.build_temp).resolve() / "cmake"
        package_parent = ROOT if self.inplace else Path(self.build_lib).resolve()
        # A cache from an earlier run names the tools of a build environment that is gone; compiled objects may stay.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        import pybind11

        cuda = plan_cuda()
        cuda_options = find_cuda.cmake_options(cuda, os.environ)
        jobs = find_cuda.compile_jobs(os.environ, find_cuda.available_memory(), cuda.with_kernels)
        if cuda.note and not cuda.with_kernels:
            print(f"dca_ext: no CUDA kernels are built; {cuda.note}.", flush=True)
        self.cmake(
            "-S", ROOT, "-B", build, "-G", "Ninja",
            "-DDCA_BUILD_PYTHON=ON",
            *cuda_options,
            f"-DDCA_TORCH_DIR={torch_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_INSTALL_LIBDIR=lib",
        )  # fmt: skip
        self.cmake("--build", build, "--parallel", jobs)
        self.cmake("--install", build, "--component", "python", "--prefix", package_parent)
        # The wheel carries the C++ package too: cmake -Ddca_DIR=<what dca_ext.cmake_dir() says>
        self.cmake("--install", build, "--component", "cpp", "--prefix", package_parent / "dca_ext" / "cpp")

    def cmake(self, *arguments: object) -> None:
        """Runs CMake and ends with its message, not with a traceback, if it fails."""
        if subprocess.run(["cmake", *map(str, arguments)], check=False).returncode != 0:
            raise SystemExit("dca_ext: the C++ build failed; the messages above say why.")


setup(ext_modules=[Extension("dca_ext._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
