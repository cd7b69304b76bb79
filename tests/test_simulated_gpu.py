"""The torch face of the CUDA kernels on a simulated GPU: test_gpu.py, and programs that users run.

The simulator ptxsim stands in for the CUDA runtime of a torch that was built with CUDA (tests/simulated_gpu/run.py).
That takes a Python with such a torch, named by DCA_CUDA_TORCH; on a machine with a GPU test_gpu.py itself runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cpp_build import ROOT
from cuda_torch import CudaTorch, find_cuda_torch
from test_cuda_suite import MODES, PTXSIM, cuda_build, has_gpu

RUN = ROOT / "tests" / "simulated_gpu" / "run.py"


@pytest.fixture(scope="module")
def torch_with_cuda() -> CudaTorch:
    if has_gpu():
        pytest.skip("this machine has a GPU: pytest -m gpu")
    if not (PTXSIM / "run").exists():
        pytest.skip("no ptxsim to simulate a GPU with")
    found = find_cuda_torch()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def build(torch_with_cuda: CudaTorch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_build(tmp_path_factory)


@pytest.fixture(scope="module")
def site(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package dca_ext as that Python imports it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "dca_ext", folder / "dca_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for module in (*build.glob("_core*.so"), *build.glob("_dca_torch*.so")):
        shutil.copy(module, folder / "dca_ext")
    return folder


@pytest.fixture
def run_on_gpu(torch_with_cuda: CudaTorch, build: Path, site: Path):
    """Runs a program; returns what it printed."""

    def run(*arguments: object, **settings: str) -> str:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{site}{os.pathsep}{RUN.parent}",
            "PYTHONUTF8": "1",
            "PTXSIM_BUILD": str(build / "ptxsim"),
            **settings,
        }
        command = [torch_with_cuda.python, str(RUN), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        # One line for each file of torch's kernels, which come as machine code.
        errors = [line for line in result.stderr.splitlines() if not line.startswith("ptxsim: ")]
        assert result.returncode == 0, result.stdout[-6000:] + "\n".join(errors)[-4000:]
        return result.stdout

    return run


@pytest.mark.parametrize("mode", MODES)
def test_operators_and_models_on_cuda_tensors(run_on_gpu, mode: str) -> None:
    """Kernels that the build leaves out, of a head_dim or a dtype, are skipped; most must run."""
    out = run_on_gpu(
        *("-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no_such_kernel"),
        *("-c", ROOT / "pyproject.toml", "--rootdir", ROOT, ROOT / "tests" / "test_gpu.py"),
        **MODES[mode],
    )
    print(out)
    closing = re.search(r"(\d+) passed(?:, (\d+) skipped)?", out.splitlines()[-1])
    assert closing, out
    assert int(closing[1]) >= 3 * int(closing[2] or 0), out


def test_the_demo_runs(run_on_gpu, tmp_path: Path) -> None:
    out = run_on_gpu(
        *("-m", "dca_ext", "demo", "--tiny", "--device", "cuda", "--prompts", 1, "--windows", 1),
        *("--output-dir", tmp_path / "demo"),
    )
    assert "Act 1 took" in out
    assert (tmp_path / "demo" / "figures.json").exists()


def test_continuous_batching_runs(run_on_gpu) -> None:
    out = run_on_gpu(ROOT / "examples" / "continuous_batching.py")
    answers = [line for line in out.splitlines() if " answer " in line]
    assert len(answers) == 4
    assert all(line.endswith(", as model.generate") for line in answers), out


def test_the_gpu_is_named(run_on_gpu) -> None:
    out = run_on_gpu("-m", "dca_ext", "info", "--device", "cuda", "--dtype", "bfloat16")
    assert "compute capability 9.0" in out
    assert "cuda/sm90/prefill/bf16/64" in out


STEPS = f"""
import sys

sys.path.insert(0, {str(ROOT / "bench")!r})
import cache_steps

small = dict(hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
cache_steps.SHAPES["smollm2"] |= small | dict(vocab_size=32)
sys.exit(cache_steps.main(["--random=smollm2", "--tokens=40", "--steps=1", "--dtype=bfloat16", "--device=cuda"]))
"""


def test_steps_over_each_cache(run_on_gpu, tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text(STEPS)
    out = run_on_gpu(tmp_path / "steps.py")
    assert "DCA, DCACache, float8_e4m3fn" in out
    assert "int8" not in out
