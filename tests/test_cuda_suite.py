"""The CUDA kernels: on this machine's GPU, or on the CPU where the simulator ptxsim lies beside the clone."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cpp_build import ROOT, configure, has_googletest, require_cmake_and_compiler, run
from cuda_torch import CudaTorch, find_cuda_torch

PTXSIM = Path(os.environ.get("PTXSIM_DIR", ROOT.parent / "shared" / "ptxsim"))

#: What a run without other orders compiles: each kind and each dtype once, one head_dim whose rows are read in two
#: pieces. All: DCA_CUDA_INSTANCES=all.
INSTANCES = (
    "prefill-bf16-64;decode-bf16-64;prefill-fp16-128;decode-fp16-128;sm90-prefill-bf16-64;sm90-prefill-fp16-128;"
    "decode-bf16-64-e4m3;prefill-bf16-64-e4m3;sm90-decode-bf16-64;sm90-decode-bf16-128-e4m3;"
    "sm90-prefill-bf16-64-e4m3;sm90-prefill-bf16-64-three_consumers"
)

#: In the build folder: what nvcc and ptxas said.
COMPILER_LOG = "compiler.log"

#: Orders of warps and of asynchronous copies to run under: at random, as late as is legal, and with a look at races.
MODES = {
    "random": {"PTXSIM_SEED": "1", "PTXSIM_ASYNC": "random"},
    "late": {"PTXSIM_SEED": "2", "PTXSIM_ASYNC": "late"},
    "race": {"PTXSIM_SEED": "3", "PTXSIM_RACE": "1", "PTXSIM_PROXY": "strict"},
}


def cutlass_dir() -> str | None:
    """Folder of CUTLASS's headers: CUTLASS_DIR, or the package nvidia-cutlass."""
    if os.environ.get("CUTLASS_DIR"):
        return os.environ["CUTLASS_DIR"]
    spec = importlib.util.find_spec("cutlass_library")
    locations = spec.submodule_search_locations if spec else None
    return str(Path(locations[0]) / "source" / "include") if locations else None


def has_gpu() -> bool:
    """Whether the driver sees a GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def why_not() -> str:
    """Why the kernels cannot be compiled or run here; empty if they can."""
    if shutil.which("nvcc") is None:
        return "no nvcc: the CUDA kernels cannot be compiled here"
    if not has_gpu() and not (PTXSIM / "run").exists():
        return "no GPU, and no ptxsim to interpret the kernels"
    if cutlass_dir() is None:
        return "no CUTLASS headers: pip install nvidia-cutlass==4.2.0.0, or set CUTLASS_DIR"
    if not has_googletest():
        return "CMake finds no GoogleTest (Debian, Ubuntu: apt-get install libgtest-dev)"
    return ""


def require_cuda_build() -> None:
    """Skips with the reason, or fails with it where DCA_REQUIRE_CUDA_CASES=1 says that the kernels must run."""
    require_cmake_and_compiler()
    if reason := why_not():
        assert os.environ.get("DCA_REQUIRE_CUDA_CASES") != "1", reason
        pytest.skip(reason)


def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build folder with dca_cuda_tests; built by the first who asks, or given by DCA_CUDA_BUILD_DIR."""
    require_cuda_build()
    if os.environ.get("DCA_CUDA_BUILD_DIR"):
        return Path(os.environ["DCA_CUDA_BUILD_DIR"])
    return _cuda_build(tmp_path_factory.getbasetemp() / "cuda-build")


@functools.cache
def _cuda_build(build: Path) -> Path:
    torch = find_cuda_torch()
    with_modules = isinstance(torch, CudaTorch)
    configure(
        ROOT,
        build,
        *(torch.cmake_options() if with_modules else []),
        "-DDCA_CUDA=ON",
        "-DDCA_BUILD_TESTS=ON",
        "-DDCA_BUILD_BENCH=ON",
        "-DDCA_CUDA_STATIC_RUNTIME=OFF",  # the simulator takes the place of the runtime library
        f"-DDCA_CUDA_ARCHITECTURES={os.environ.get('DCA_CUDA_ARCHITECTURES', '80;90a')}",
        f"-DDCA_CUDA_INSTANCES={os.environ.get('DCA_CUDA_INSTANCES', INSTANCES)}",
        f"-DCUTLASS_DIR={cutlass_dir()}",
    )
    targets = ["dca_cuda_tests", "dca_bench", *(["_core", "_dca_torch"] if with_modules else [])]
    said = run("cmake", "--build", build, "--parallel", "2", "--target", *targets).stdout
    (build / COMPILER_LOG).write_text(said)
    return build


def run_kernels(build: Path, program: str, *arguments: str, **settings: str) -> str:
    """Runs a program of the build on the GPU, or under the simulator; returns what it printed."""
    command = [str(build / program), *arguments]
    environment = {**os.environ, **settings}
    if not has_gpu():
        command.insert(0, str(PTXSIM / "run"))
        environment["PTXSIM_BUILD"] = str(build / "ptxsim")
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout


def count_cases(output: str) -> int:
    """Kernel cases that the test program compared with the reference."""
    match = re.search(r"(\d+) kernel cases compared with the reference", output)
    return int(match.group(1)) if match else 0


@pytest.mark.parametrize("mode", MODES)
def test_kernels_match_the_reference(
    mode: str, tmp_path_factory: pytest.TempPathFactory, record_kernel_cases: dict[str, int]
) -> None:
    build = cuda_build(tmp_path_factory)
    output = run_kernels(build, "tests/cpp/cuda/dca_cuda_tests", "--gtest_brief=1", **MODES[mode])
    record_kernel_cases[mode] = count_cases(output)
    assert record_kernel_cases[mode] > 0, "no kernel case ran"


def test_products_on_hopper_are_asynchronous(tmp_path_factory: pytest.TempPathFactory) -> None:
    """ptxas makes wgmma wait for each other, with no more than a remark, where registers of theirs are used between."""
    log = cuda_build(tmp_path_factory) / COMPILER_LOG
    if not log.exists():
        pytest.skip("the build of DCA_CUDA_BUILD_DIR has no log of its compiler")
    said = log.read_text()
    assert re.search(r"Compiling entry function '\w*sm90\w*prefill_kernel", said), "the log is not that of ptxas -v"
    assert "serialized" not in said


def test_values_in_device_memory_are_checked_on_request(tmp_path_factory: pytest.TempPathFactory) -> None:
    build = cuda_build(tmp_path_factory)
    run_kernels(build, "tests/cpp/cuda/dca_cuda_tests", "--gtest_filter=CudaCheckedValues*", DCA_CHECK="1")


@pytest.mark.parametrize(
    "operation", ["prefill", "decode", "append", "merge", "decode --cache-dtype=e4m3", "append --cache-dtype=e4m3"]
)
def test_bench_verifies_on_cuda(operation: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    build = cuda_build(tmp_path_factory)
    shape = ["--batch=2", "--heads=4", "--kv-heads=2", "--head-dim=64", "--seqlen=96", "--chunk-len=32"]
    small = ["--max-position=48", "--dtype=bf16", "--repeat=1", "--warmup=0", "--copy-mib=1", "--timing=events"]
    output = run_kernels(build, "bench/cpp/dca_bench", *operation.split(), "--device=cuda", *shape, *small, "--verify")
    assert "max error" in output
