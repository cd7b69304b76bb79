"""What pip is asked for and what CMake is told, decided on folders that only look like torch, toolkits and wheels."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
from cpp_build import ROOT

CUTLASS = "nvidia-cutlass==4.2.0.0"
WHEELS = "cuda-toolkit[nvcc,cudart,cccl]=={}.*"


@pytest.fixture
def find_cuda(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    return importlib.import_module("find_cuda")


def torch_folder(tmp_path: Path, cuda: str | None) -> Path:
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "version.py").write_text(
        "from typing import Optional\n\n__all__ = ['__version__', 'cuda', 'hip']\n__version__ = '2.13.0'\n"
        f"debug = False\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
    )
    return folder


def nvcc(root: Path, version: str) -> Path:
    file = root / "bin" / "nvcc"
    file.parent.mkdir(parents=True)
    file.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    file.chmod(0o755)
    return file


def compiler_wheels(site_packages: Path, major: str = "13", version: str = "13.0") -> Path:
    root = site_packages / "nvidia" / f"cu{major}"
    for part in (
        *("nvvm/bin/cicc", "include/cuda_runtime.h", "include/crt/host_config.h"),
        *("include/nv/target", "lib/libcudart_static.a"),
    ):
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        (root / part).touch()
    return nvcc(root, version)


def no_driver() -> None:
    return None


@pytest.mark.parametrize(("written", "version"), [("13.0", (13, 0)), ("12.8", (12, 8)), (None, None)])
def test_cuda_version_is_read_out_of_torch(find_cuda, tmp_path, written, version):
    assert find_cuda.torch_cuda_version(torch_folder(tmp_path, written)) == version


def test_cuda_version_of_the_torch_installed_here(find_cuda):
    import torch

    version = find_cuda.torch_cuda_version(Path(torch.__file__).parent)
    assert (f"{version[0]}.{version[1]}" if version else None) == torch.version.cuda


def test_toolkits_in_order(find_cuda, tmp_path):
    home, path, usual = (nvcc(tmp_path / name, "13.0") for name in ("home", "path", "usual"))
    environ = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "path" / "bin")}
    assert find_cuda.toolkit_nvccs(environ, tmp_path / "usual") == [home, path, usual]
    assert find_cuda.toolkit_nvccs({"CUDA_PATH": str(tmp_path / "path")}, tmp_path / "usual") == [path, usual]
    assert find_cuda.toolkit_nvccs({"CUDA_HOME": str(tmp_path), "PATH": str(tmp_path)}, tmp_path / "none") == []


def test_wheels_only_if_all_their_parts_are_there(find_cuda, tmp_path):
    compiler = compiler_wheels(tmp_path)
    assert find_cuda.wheel_nvccs([tmp_path / "empty", tmp_path]) == [compiler]
    (tmp_path / "nvidia" / "cu13" / "lib" / "libcudart_static.a").unlink()
    assert find_cuda.wheel_nvccs([tmp_path]) == []


def test_the_first_nvcc_that_is_new_enough(find_cuda, tmp_path):
    old, new = nvcc(tmp_path / "old", "12.3"), nvcc(tmp_path / "new", "12.4")
    newer = nvcc(tmp_path / "newer", "13.0")
    assert find_cuda.find_nvcc({}, [old, new, newer]) == (new, "")
    assert find_cuda.find_nvcc({"CUDACXX": str(newer)}, [new]) == (newer, "")
    assert find_cuda.find_nvcc({}, [old]) == (None, f"{old} is of CUDA 12.3, older than 12.4")
    assert find_cuda.find_nvcc({}, [tmp_path / "none"]) == (None, "no nvcc was found")


@pytest.mark.parametrize(("name", "got"), [("old/bin/nvcc", "of CUDA 12.3."), ("clang++", "clang++.")])
def test_cudacxx_that_is_no_such_nvcc_ends_the_build(find_cuda, tmp_path, name, got):
    nvcc(tmp_path / "old", "12.3")
    with pytest.raises(SystemExit, match=r"^CUDACXX must name an nvcc of CUDA 12.4 or newer; got .*" + got):
        find_cuda.find_nvcc({"CUDACXX": str(tmp_path / name)}, [])


@pytest.mark.parametrize(
    ("switch", "torch_cuda", "toolkit", "driver", "requirements", "builds"),
    [
        # Unset: as torch was built.
        (None, None, "13.0", None, [], False),
        (None, "13.0", "13.0", None, [CUTLASS], True),
        (None, "12.8", "12.8", None, [CUTLASS], True),
        (None, "13.2", None, (13, 0), [CUTLASS, WHEELS.format("13.2")], True),
        (None, "13.0", "12.3", (13, 0), [CUTLASS, WHEELS.format("13.0")], True),
        (None, "13.0", None, None, [], False),  # a machine without a GPU, with the usual torch
        # There are no wheels of an nvcc 12; those of 13 do where the driver is new enough.
        (None, "12.8", None, (13, 0), [CUTLASS, WHEELS.format("13.0")], True),
        (None, "12.8", None, (12, 9), [], False),
        (None, "12.8", None, None, [], False),
        # On request.
        ("ON", None, "13.0", None, [CUTLASS], True),
        ("on", None, None, None, [CUTLASS, WHEELS.format("13.0")], True),
        ("1", "12.8", None, None, [CUTLASS, WHEELS.format("13.0")], True),
        ("OFF", "13.0", "13.0", (13, 0), [], False),
        ("0", "13.0", None, (13, 0), [], False),
    ],
)
def test_requirements(find_cuda, tmp_path, switch, torch_cuda, toolkit, driver, requirements, builds):
    environ = {} if switch is None else {"DCA_CUDA": switch}
    candidates = [nvcc(tmp_path / "toolkit", toolkit)] if toolkit else []
    plan = find_cuda.plan_cuda(environ, torch_folder(tmp_path, torch_cuda), candidates, lambda: driver)
    assert list(plan.requirements) == requirements
    assert plan.build == builds
    assert plan.with_kernels == (builds and requirements == [CUTLASS])
    plan = find_cuda.plan_cuda({**environ, "CUTLASS_DIR": "x"}, tmp_path / "torch", candidates, lambda: driver)
    assert list(plan.requirements) == [name for name in requirements if name != CUTLASS]


def test_requirements_where_torch_is_one_of_them(find_cuda, tmp_path):
    compiler = nvcc(tmp_path, "13.0")
    assert find_cuda.plan_cuda({}, None, [], no_driver).requirements == ()
    assert find_cuda.plan_cuda({}, None, [compiler], no_driver).requirements == (CUTLASS,)
    assert WHEELS.format("13.0") in find_cuda.plan_cuda({"DCA_CUDA": "ON"}, None, [], no_driver).requirements


def test_messages(find_cuda, tmp_path):
    torch = torch_folder(tmp_path, "12.8")
    with pytest.raises(SystemExit, match=r"^DCA_CUDA must be ON or OFF, or not set; got 'maybe'\.$"):
        find_cuda.plan_cuda({"DCA_CUDA": "maybe"}, torch, [], no_driver)
    with pytest.raises(SystemExit, match=r"^DCA_CUDA=ON: no nvcc was found for torch's CUDA 12.8, .* newer driver: .*"):
        find_cuda.plan_cuda({"DCA_CUDA": "ON"}, torch, [], lambda: (12, 8))
    assert "install CUDA toolkit 12.4 or newer" in find_cuda.plan_cuda({}, torch, [], lambda: (12, 8)).note
    assert "this machine has no NVIDIA driver" in find_cuda.plan_cuda({}, torch, [], no_driver).note


def test_cmake_options(find_cuda, tmp_path):
    plan = find_cuda.CudaPlan(build=True, nvcc=nvcc(tmp_path / "toolkit", "13.0"))
    environ = {"DCA_CUDA_ARCHITECTURES": "80, 90", "DCA_CUDA_INSTANCES": "decode-bf16-64;prefill-bf16-64"}
    assert find_cuda.cmake_options(plan, {}) == [
        "-DDCA_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={plan.nvcc}",
        "-DDCA_CUDA_ALLOW_SPILLS=ON",
    ]
    assert find_cuda.cmake_options(plan, environ)[3:] == [
        "-DDCA_CUDA_ARCHITECTURES=80;90",
        "-DDCA_CUDA_INSTANCES=decode-bf16-64;prefill-bf16-64",
    ]
    assert find_cuda.cmake_options(find_cuda.CudaPlan(build=False), environ) == ["-DDCA_CUDA=OFF"]


def test_cmake_is_told_where_the_wheels_keep_their_libraries(find_cuda, tmp_path):
    plan = find_cuda.CudaPlan(build=True, nvcc=compiler_wheels(tmp_path))
    library = tmp_path / "nvidia" / "cu13" / "lib"
    assert find_cuda.cmake_options(plan, {"CUDAFLAGS": "-O2"})[3:] == [
        f'-DCMAKE_CUDA_FLAGS=-O2 "-L{library}"',
        f"-DCUDA_CUDART={library}/libcudart_static.a",
    ]


def test_wheels_that_are_still_missing_end_the_build_only_on_request(find_cuda, tmp_path):
    plan = find_cuda.plan_cuda({}, torch_folder(tmp_path, "13.0"), [], lambda: (13, 0))
    assert find_cuda.cmake_options(plan, {}) == ["-DDCA_CUDA=OFF"]
    with pytest.raises(SystemExit, match=r"^DCA_CUDA=ON: no nvcc was found: .* or pip install '.*==13\.0\.\*'\.$"):
        find_cuda.cmake_options(plan, {"DCA_CUDA": "ON"})


@pytest.mark.parametrize(
    ("environ", "memory_gb", "with_cuda", "jobs"),
    [
        ({}, 64, True, 8),
        ({}, 15, True, 3),
        ({}, 1, True, 1),
        ({}, 1, False, 8),
        ({"MAX_JOBS": "2"}, 64, True, 2),
        ({"MAX_JOBS": "2"}, 64, False, 2),
    ],
)
def test_jobs(find_cuda, environ, memory_gb, with_cuda, jobs):
    assert find_cuda.compile_jobs(environ, memory_gb << 30, with_cuda, cpus=8) == jobs


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_jobs_must_be_a_number(find_cuda, jobs):
    with pytest.raises(SystemExit, match=f"MAX_JOBS must be a positive integer; got '{jobs}'"):
        find_cuda.compile_jobs({"MAX_JOBS": jobs}, None, with_cuda=False)


def test_memory_of_the_machine_and_of_a_container(find_cuda, tmp_path):
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       16384 kB\nMemAvailable:    8192 kB\n")
    assert find_cuda.available_memory(meminfo, limit) == 8192 * 1024
    limit.write_text("max\n")
    assert find_cuda.available_memory(meminfo, limit) == 8192 * 1024
    limit.write_text("4096\n")
    assert find_cuda.available_memory(meminfo, limit) == 4096
    assert find_cuda.available_memory(tmp_path / "none", limit) is None


def test_the_backend_asks_for_torch_cutlass_and_the_compiler(find_cuda, tmp_path, monkeypatch):
    pytest.importorskip("setuptools", minversion="77", reason="the backend runs where pip installs setuptools")
    site_packages = tmp_path / "site-packages"
    site_packages.mkdir()
    torch = torch_folder(site_packages, "13.0")
    header = torch / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    for name in ("DCA_TORCH_DIR", "DCA_CUDA", "CUDACXX", "CUTLASS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "build_backend", raising=False)
    backend = importlib.import_module("build_backend")
    monkeypatch.setattr(find_cuda, "toolkit_nvccs", lambda environ: [])
    folders = [site_packages]
    monkeypatch.setattr(backend, "site_packages", lambda: folders)

    monkeypatch.setenv("DCA_CUDA", "ON")
    assert backend.get_requires_for_build_wheel() == [CUTLASS, WHEELS.format("13.0")]
    monkeypatch.setenv("DCA_CUDA", "OFF")
    assert backend.get_requires_for_build_editable() == []
    folders.clear()
    assert backend.get_requires_for_build_wheel() == ["torch>=2.10"]
    folders.append(site_packages)
    monkeypatch.delenv("DCA_CUDA")
    compiler = compiler_wheels(site_packages)
    assert backend.get_requires_for_build_wheel() == [CUTLASS]
    assert backend.plan_cuda().nvcc == compiler
    assert os.access(compiler, os.X_OK)
