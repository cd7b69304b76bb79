"""The source distribution holds what `pip install` needs: what CMake and setuptools read, and what the tests read."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from cpp_build import ROOT

#: Folders that go in whole, and files beside them.
FOLDERS = ("cmake", "csrc", "dca_ext", "docs", "examples", "tests")
FILES = {"CHANGELOG.md", "CMakeLists.txt", "LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}

#: What building and running leaves in a tree.
LEFT_BEHIND = (".*", "build", "dist", "cpp", "results", "__pycache__", "*.egg-info", "*.so")


def copy_of_the_tree(target: Path) -> Path:
    """As a clean clone has it: in a used tree setuptools would go by what the last build has noted down."""
    for name in (*FOLDERS, "bench"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, target)
    return target


def ignored(folder: str, names: list[str]) -> set[str]:
    # tests/cpp is source; dca_ext/cpp is the C++ package that an editable install puts there.
    left_behind = {name for name in names if any(fnmatch(name, pattern) for pattern in LEFT_BEHIND)}
    return left_behind if Path(folder) == ROOT / "dca_ext" else left_behind - {"cpp"}


def test_source_distribution_is_complete(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or newer builds dca_ext")
    tree = copy_of_the_tree(tmp_path / "tree")
    build = "import sys; sys.path.insert(0, 'cmake'); import build_backend; build_backend.build_sdist('..')"
    result = subprocess.run([sys.executable, "-B", "-c", build], cwd=tree, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("dca_ext-*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    wanted = (path.relative_to(tree) for folder in FOLDERS for path in (tree / folder).rglob("*") if path.is_file())
    assert FILES | {str(path) for path in wanted} <= inside
