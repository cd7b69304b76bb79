"""The Python whose torch is a CUDA build, where DCA_CUDA_TORCH names one: on a simulated GPU it holds CUDA tensors."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from dataclasses import dataclass

_QUESTION = """
import importlib.util, json
import torch, pybind11
print(json.dumps({
    "cuda": torch.version.cuda,
    "torch_dir": next(iter(importlib.util.find_spec("torch").submodule_search_locations)),
    "pybind11_dir": pybind11.get_cmake_dir(),
    "has_transformers": importlib.util.find_spec("transformers") is not None,
}))
"""


@dataclass(frozen=True)
class CudaTorch:
    """An interpreter and what a build for it needs."""

    python: str
    torch_dir: str
    pybind11_dir: str

    def cmake_options(self) -> list[str]:
        """For the Python modules of this interpreter."""
        return [
            "-DDCA_BUILD_PYTHON=ON",
            f"-DPython_EXECUTABLE={self.python}",
            f"-DDCA_TORCH_DIR={self.torch_dir}",
            f"-Dpybind11_DIR={self.pybind11_dir}",
        ]


@functools.cache
def find_cuda_torch() -> CudaTorch | str:
    """It, or why there is none."""
    python = os.environ.get("DCA_CUDA_TORCH")
    if not python:
        return "DCA_CUDA_TORCH names no Python whose torch is a CUDA build, for tests on a simulated GPU"
    answer = subprocess.run([python, "-c", _QUESTION], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return f"DCA_CUDA_TORCH={python}: {answer.stderr.strip().splitlines()[-1]}"
    facts = json.loads(answer.stdout.splitlines()[-1])
    if facts["cuda"] is None or not facts["cuda"].startswith("13."):
        return f"DCA_CUDA_TORCH={python}: its torch was built for CUDA {facts['cuda']}, the simulator is of CUDA 13"
    if not facts["has_transformers"]:
        return f"DCA_CUDA_TORCH={python}: it has no transformers"
    return CudaTorch(python, facts["torch_dir"], facts["pybind11_dir"])
