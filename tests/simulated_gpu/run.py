"""Runs a Python program on a simulated GPU: a CUDA build of torch over ptxsim.

    python tests/simulated_gpu/run.py [-m MODULE | SCRIPT] [ARGUMENTS ...]
    PYTHONPATH=site python tests/simulated_gpu/run.py -m dca_ext demo --tiny --device cuda

`python` is one whose torch is a CUDA build. dca_ext must have been built with -DDCA_CUDA_STATIC_RUNTIME=OFF, so that
the simulator can take the runtime's place, and with PTX. This project's kernels are interpreted; torch's own run on the
CPU (torch_operators.py); times mean nothing. PTXSIM_DIR is the simulator (default: shared/ptxsim beside the clone),
PTXSIM_BUILD where it is built (default: build/simulated_gpu of the clone); it has variables of its own for orders of
warps and copies.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PTXSIM = Path(os.environ.get("PTXSIM_DIR", ROOT.parent / "shared" / "ptxsim"))
READY = "DCA_SIMULATED_GPU"


def build_libraries(folder: Path) -> dict[str, Path]:
    """The simulator, and the two libraries that torch wants beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([PTXSIM / "run"], env={**os.environ, "PTXSIM_BUILD": str(folder)}, check=True)
    driver, graphs = folder / "driver" / "libcuda.so.1", folder / "libgraphs.so"
    driver.parent.mkdir(exist_ok=True)
    shared = ["-shared", "-Xcompiler", "-fPIC", "-cudart", "none"]
    beside = ["-L", folder, "-lptxsim", "-Xlinker", "-soname,libcuda.so.1,--no-as-needed,-rpath," + str(folder)]
    for command in (
        ["nvcc", *shared, HERE / "driver.cpp", "-o", driver, *beside],
        ["nvcc", *shared, HERE / "graphs.cpp", "-o", graphs],
    ):
        subprocess.run(list(map(str, command)), check=True)
    return {"graphs": graphs, "runtime": folder / "libcudart.so.13", "driver": driver}


def start_again() -> None:
    """This program once more, with the simulator in front of the CUDA libraries."""
    folder = Path(os.environ.get("PTXSIM_BUILD", ROOT / "build" / "simulated_gpu")).resolve()
    libraries = build_libraries(folder)
    environment = {
        **os.environ,
        READY: "1",
        "LD_PRELOAD": ":".join(map(str, libraries.values())),
        "LD_LIBRARY_PATH": f"{libraries['driver'].parent}:{folder}",
    }
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def main() -> None:
    """Prepares the first time, runs the second."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    if os.environ.get(READY) != "1":
        start_again()
    sys.path[0] = str(HERE)
    import torch_operators

    torch_operators.install()
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
