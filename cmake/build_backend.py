"""setuptools' build backend, with one addition: torch is a build requirement only where there is none to build with.

pip builds in an environment of its own, which would download torch (gigabytes) just for its headers. That environment's
interpreter is the one that pip installs into, so its site-packages can be looked at, and the torch found there used.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)


def find_torch() -> Path | None:
    """Folder of the package torch in the environment that is being installed into, or None."""
    candidates = [Path(os.environ["DCA_TORCH_DIR"])] if os.environ.get("DCA_TORCH_DIR") else []
    candidates += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("purelib", "platlib")]
    # A virtual environment that sees the system's packages, and an interpreter with user packages.
    candidates += [Path(folder) / "torch" for folder in [*site.getsitepackages(), site.getusersitepackages()]]
    spec = importlib.util.find_spec("torch")  # the build environment's own, if torch was a build requirement
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent)
    return next((folder for folder in candidates if (folder / "include/torch/csrc/stable/library.h").is_file()), None)


def _requirements(requirements: list[str]) -> list[str]:
    if sys.version_info < (3, 10):  # noqa: UP036  (this is what tells the user of an older one)
        raise SystemExit(f"dca_ext needs Python 3.10 or newer; this is {sys.version.split()[0]}.")
    return requirements if find_torch() else [*requirements, "torch>=2.10"]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:  # noqa: D103
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:  # noqa: D103
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))
