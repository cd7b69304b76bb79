"""What is installed: the build, this machine as the build sees it, and the C++ package inside the wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def not_built(missing: str) -> ImportError:
    """The error for a package without its compiled parts: a fresh clone, or the repository's folder on sys.path."""
    return ImportError(
        f"dca_ext was not built: {Path(__file__).resolve().parent} holds no {missing} library; install it with "
        "`pip install .` from the repository, and do not import it from the repository's own folder unless it was "
        "installed with -e"
    )


def build_info() -> dict[str, Any]:
    """What was built and what runs here.

    Returns:
        version: of dca_ext.
        compiler: that built the CPU kernels.
        cpu_instruction_sets: compiled micro-kernels, best first.
        cpu_isa: the set in use on this machine; the environment variable DCA_CPU_ISA forces one.
        cuda_architectures: compiled CUDA architectures; empty for a build without CUDA kernels.
        cpu_threads: threads of the torch-free library's pool (calls from torch use torch's own).

    Raises:
        ImportError: if the package was not built.
    """
    try:
        from dca_ext import _core
    except ImportError as error:
        raise not_built("_core") from error
    info = dict(_core.build_info())
    for key in ("cpu_instruction_sets", "cuda_architectures"):
        info[key] = [name.strip() for name in info[key].split(",") if name.strip()]
    return info


def cmake_dir() -> str:
    """Folder of dcaConfig.cmake, for ``cmake -Ddca_DIR=...`` and then ``find_package(dca)``."""
    return str(Path(__file__).resolve().parent / "cpp" / "lib" / "cmake" / "dca")
