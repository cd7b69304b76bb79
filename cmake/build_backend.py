"""setuptools' build backend, with two additions: what is a build requirement depends on what is there already.

pip builds in an environment of its own, which would download torch (gigabytes) just for its headers. That environment's
interpreter is the one that pip installs into, so its site-packages can be looked at, and the torch found there used.
If that torch is a CUDA build, the CUDA kernels are built too, and find_cuda.py says what they need.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from pathlib import Path

import find_cuda
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)


def site_packages() -> list[Path]:
    """Folders of packages: of the environment that is being installed into, then of the build environment."""
    folders = [sysconfig.get_paths()[key] for key in ("purelib", "platlib")]
    # A virtual environment that sees the system's packages, and an interpreter with user packages.
    folders += [*site.getsitepackages(), site.getusersitepackages(), *sys.path]
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]


def find_torch() -> Path | None:
    """Folder of the package torch to build against, or None."""
    candidates = [Path(os.environ["DCA_TORCH_DIR"])] if os.environ.get("DCA_TORCH_DIR") else []
    candidates += [folder / "torch" for folder in site_packages()]
    return next((folder for folder in candidates if (folder / "include/torch/csrc/stable/library.h").is_file()), None)


def plan_cuda() -> find_cuda.CudaPlan:
    """Whether CUDA kernels are built, with which nvcc, and what pip must install for it."""
    candidates = [*find_cuda.toolkit_nvccs(os.environ), *find_cuda.wheel_nvccs(site_packages())]
    return find_cuda.plan_cuda(os.environ, find_torch(), candidates)


def _requirements(requirements: list[str]) -> list[str]:
    if sys.version_info < (3, 10):  # noqa: UP036  (this is what tells the user of an older one)
        raise SystemExit(f"dca_ext needs Python 3.10 or newer; this is {sys.version.split()[0]}.")
    torch = [] if find_torch() else ["torch>=2.10"]
    return [*requirements, *torch, *plan_cuda().requirements]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:  # noqa: D103
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:  # noqa: D103
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))
