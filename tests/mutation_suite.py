"""What a mutation is, and how a suite of them is run; mutations_cpu.py and mutations_cuda.py hold the suites."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """One edit: `old` stands `occurrences` times in `file`, and all of them become `new`."""

    name: str
    file: str
    old: str
    new: str
    modes: tuple[str, ...] = ()  #: red in one of them is enough; of the suite's first mode if empty
    occurrences: int = 1
    tests: str = "*"  #: a filter of GoogleTest


@dataclass(frozen=True)
class Suite:
    """Mutations of one backend."""

    mutations: Sequence[Mutation]
    unchanged: Sequence[Mutation]  #: edits of nothing, whose tests must be green in every mode
    modes: Sequence[str]  #: ways to run the tests, the usual one first
    build: Callable[[Path, Path], None]  #: of a tree, into a build folder
    run_tests: Callable[[Path, Mutation, str], bool]  #: build folder, mutation, mode -> whether they are green


def build_program(tree: Path, build: Path, target: str, options: Sequence[str]) -> None:
    """Configures, and builds one target."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", tree, "-B", build, *generator, *options],
        ["cmake", "--build", build, "--parallel", str(os.cpu_count()), "--target", target],
    ):
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise SystemExit(f"the build failed:\n{result.stdout[-4000:]}{result.stderr[-2000:]}")


def is_green(command: Sequence[str], tests: str, environment: Mapping[str, str]) -> bool:
    """Runs a program of GoogleTest up to its first failure. A crash, or half an hour, is as red as a failure.

    Tests that this machine cannot run (exit code 77) see nothing.
    """
    command = [*command, "--gtest_brief=1", "--gtest_fail_fast", f"--gtest_filter={tests}"]
    try:
        result = subprocess.run(command, capture_output=True, env=dict(environment), check=False, timeout=1800)
    except subprocess.TimeoutExpired:
        return False
    return result.returncode in (0, 77)


def copy_tree(tree: Path) -> None:
    """What CMake needs for the C++ tests."""
    tree.mkdir()
    for name in ("csrc", "cmake", "tests/cpp"):
        shutil.copytree(ROOT / name, tree / name)
    (tree / "dca_ext").mkdir()
    shutil.copy(ROOT / "dca_ext/version.py", tree / "dca_ext")
    shutil.copy(ROOT / "CMakeLists.txt", tree)


def stale(mutations: Sequence[Mutation], tree: Path = ROOT) -> list[str]:
    """Says of which mutations the source has not what they replace."""
    complaints = []
    for mutation in mutations:
        path = tree / mutation.file
        count = path.read_text().count(mutation.old) if path.exists() else 0
        if count != mutation.occurrences:
            complaints.append(f"{mutation.name}: {mutation.file} has {count} times: {mutation.old}")
    return complaints


def survivors(suite: Suite, chosen: Sequence[Mutation]) -> list[str]:
    """Names of the mutations that no test saw."""
    names = []
    with tempfile.TemporaryDirectory() as folder:
        tree, build = Path(folder) / "tree", Path(folder) / "build"
        copy_tree(tree)
        if complaints := stale(chosen, tree):  # before anything takes time
            raise SystemExit("\n".join(complaints))
        suite.build(tree, build)
        for mode in suite.modes:
            if not all(suite.run_tests(build, nothing, mode) for nothing in suite.unchanged):
                raise SystemExit(f"the tests are red without a mutation, in mode {mode}")
        for number, mutation in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {mutation.name} ... ", end="", flush=True)
            path = tree / mutation.file
            text = path.read_text()
            path.write_text(text.replace(mutation.old, mutation.new))
            suite.build(tree, build)
            modes = mutation.modes or suite.modes[:1]
            red = next((mode for mode in modes if not suite.run_tests(build, mutation, mode)), None)
            path.write_text(text)
            print(f"red ({red})" if red else "GREEN: no test sees it", flush=True)
            if red is None:
                names.append(mutation.name)
    return names
