"""Whether pip builds the CUDA kernels, with which nvcc, and what it installs for that. torch is read, not imported.

nvcc is looked for in this order: CUDACXX, CUDA_HOME, CUDA_PATH, the path, /usr/local/cuda, and NVIDIA's compiler wheels
among the installed packages. Where there is none, those wheels become a build requirement.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: (major, minor)
Version = tuple[int, int]

MINIMUM_NVCC: Version = (12, 4)
#: The wheels of CUDA 12 hold ptxas and headers, but neither nvcc nor the static runtime library.
FIRST_COMPILER_WHEELS: Version = (13, 0)
CUTLASS = "nvidia-cutlass==4.2.0.0"
#: What the largest kernel takes to compile.
BYTES_PER_JOB = 4 << 30

_ON, _OFF = ("ON", "1", "TRUE", "YES"), ("OFF", "0", "FALSE", "NO")


@dataclass(frozen=True)
class CudaPlan:
    """What is to be built. `build` without `nvcc` means that pip has yet to install the compiler wheels."""

    build: bool
    nvcc: Path | None = None
    requirements: tuple[str, ...] = ()
    note: str = ""  # why there is no nvcc, as a clause

    @property
    def with_kernels(self) -> bool:
        """Whether all is there to build CUDA kernels now."""
        return self.build and self.nvcc is not None


def text(version: Version) -> str:
    """12.4 for (12, 4)."""
    return f"{version[0]}.{version[1]}"


def requested(environ: Mapping[str, str]) -> bool | None:
    """DCA_CUDA: True, False, or None where it is not set and torch decides."""
    value = environ.get("DCA_CUDA", "").strip()
    if value.upper() in (*_ON, *_OFF):
        return value.upper() in _ON
    if value:
        raise SystemExit(f"DCA_CUDA must be ON or OFF, or not set; got {value!r}.")
    return None


def torch_cuda_version(torch: Path) -> Version | None:
    """CUDA version that the torch in this folder was built for, or None for a build without CUDA."""
    found = re.search(r"^cuda\b[^=]*=\s*['\"](\d+)\.(\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def driver_cuda_version() -> Version | None:
    """Newest CUDA version that this machine's driver runs, or None where there is no driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def nvcc_version(nvcc: Path) -> Version | None:
    """What `nvcc --version` says, or None if it cannot be run."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else None


def toolkit_nvccs(environ: Mapping[str, str], usual_place: Path = Path("/usr/local/cuda")) -> list[Path]:
    """Every nvcc of an installed toolkit but CUDACXX, the one to prefer first."""
    roots = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    candidates = [root / "bin" / "nvcc" for root in roots]
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    candidates += [Path(on_path)] if on_path else []
    return [nvcc for nvcc in [*candidates, usual_place / "bin" / "nvcc"] if os.access(nvcc, os.X_OK)]


def wheel_nvccs(site_packages: Sequence[Path]) -> list[Path]:
    """Every nvcc of NVIDIA's wheels that has all its parts beside it, each of which is a wheel of its own."""
    parts = ("nvvm/bin/cicc", "include/cuda_runtime.h", "include/crt/host_config.h", "lib/libcudart_static.a")
    roots = [root for folder in site_packages for root in sorted(folder.glob("nvidia/cu[0-9]*"), reverse=True)]
    return [
        root / "bin" / "nvcc"
        for root in roots
        if os.access(root / "bin" / "nvcc", os.X_OK)
        and all((root / part).is_file() for part in parts)
        and any((root / folder / "nv" / "target").is_file() for folder in ("include", "include/cccl"))
    ]


def find_nvcc(environ: Mapping[str, str], candidates: Sequence[Path]) -> tuple[Path | None, str]:
    """CUDACXX, or else the first candidate that is new enough; and, if there is none, why."""
    explicit = environ.get("CUDACXX")
    if explicit:
        path = shutil.which(explicit, path=environ.get("PATH", ""))
        version = nvcc_version(Path(path)) if path else None
        if path and version and version >= MINIMUM_NVCC:
            return Path(path), ""
        got = f"{explicit} of CUDA {text(version)}" if version else explicit
        raise SystemExit(f"CUDACXX must name an nvcc of CUDA {text(MINIMUM_NVCC)} or newer; got {got}.")
    reason = "no nvcc was found"
    for nvcc in candidates:
        version = nvcc_version(nvcc)
        if version and version >= MINIMUM_NVCC:
            return nvcc, ""
        if version:
            reason = f"{nvcc} is of CUDA {text(version)}, older than {text(MINIMUM_NVCC)}"
    return None, reason


def compiler_wheels(version: Version) -> str:
    """The requirement that brings nvcc, its headers and the runtime library, in matching versions."""
    return f"cuda-toolkit[nvcc,cudart,cccl]=={text(version)}.*"


def plan_cuda(
    environ: Mapping[str, str],
    torch: Path | None,
    candidates: Sequence[Path],
    driver: Callable[[], Version | None] = driver_cuda_version,
) -> CudaPlan:
    """Decides from DCA_CUDA, the torch that is built against (None: pip has yet to install one) and every nvcc here."""
    wanted = requested(environ)
    torch_cuda = torch_cuda_version(torch) if torch else None
    if wanted is False or (wanted is None and torch and not torch_cuda):
        return CudaPlan(build=False)
    cutlass = () if environ.get("CUTLASS_DIR") else (CUTLASS,)
    nvcc, reason = find_nvcc(environ, candidates)
    if nvcc:
        return CudaPlan(True, nvcc, cutlass)
    if wanted is None and not torch:
        return CudaPlan(build=False)
    driver_cuda = driver()
    if wanted is None and driver_cuda is None:
        # The usual torch is a CUDA build, on machines without a GPU too: they should not download a compiler for it.
        note = f"{reason}, and this machine has no NVIDIA driver: DCA_CUDA=ON builds them for another machine"
        return CudaPlan(build=False, note=note)
    wheels = torch_cuda or FIRST_COMPILER_WHEELS
    if wheels < FIRST_COMPILER_WHEELS:
        # The kernels bring their own runtime library, so that a newer one than torch's does, if the driver runs it. A
        # machine that builds for others has none; there DCA_CUDA=ON says that the others have a new one.
        if not (driver_cuda >= FIRST_COMPILER_WHEELS if driver_cuda else wanted):
            note = (
                f"{reason} for torch's CUDA {text(wheels)}, and NVIDIA's wheels, which hold an nvcc from CUDA "
                f"{text(FIRST_COMPILER_WHEELS)} on, would need a newer driver: install CUDA toolkit "
                f"{text(MINIMUM_NVCC)} or newer"
            )
            if wanted:
                raise SystemExit(f"DCA_CUDA=ON: {note}.")
            return CudaPlan(build=False, note=note)
        wheels = FIRST_COMPILER_WHEELS
    note = f"{reason}: install CUDA toolkit {text(MINIMUM_NVCC)} or newer, or pip install '{compiler_wheels(wheels)}'"
    return CudaPlan(True, None, (*cutlass, compiler_wheels(wheels)), note)


def cmake_options(plan: CudaPlan, environ: Mapping[str, str]) -> list[str]:
    """The options that carry out a plan, once pip has installed its requirements.

    A compiler that is still missing ends the build only if DCA_CUDA=ON asked for it: where pip installs no build
    requirements, or torch was one itself, what can be built is.
    """
    if plan.build and not plan.with_kernels and requested(environ):
        raise SystemExit(f"DCA_CUDA=ON: {plan.note}.")
    if not plan.build or plan.nvcc is None:
        return ["-DDCA_CUDA=OFF"]
    # With an nvcc that we have not seen, a spill makes a kernel slower; that is no reason to have none.
    options = ["-DDCA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={plan.nvcc}", "-DDCA_CUDA_ALLOW_SPILLS=ON"]
    root = plan.nvcc.parent.parent
    runtime = root / "lib" / "libcudart_static.a"
    if runtime.is_file() and not (root / "lib64").exists():
        # Wheels: their nvcc looks for libraries in lib64 only, and CMake tries it out by linking a program. And CMake's
        # CUDAToolkit takes the folder of libraries from CUDA_CUDART, which it looks for as libcudart.so alone.
        options.append(f'-DCMAKE_CUDA_FLAGS={environ.get("CUDAFLAGS", "")} "-L{runtime.parent}"')
        options.append(f"-DCUDA_CUDART={runtime}")
    for name in ("DCA_CUDA_ARCHITECTURES", "DCA_CUDA_INSTANCES"):
        values = re.findall(r"[^\s,;]+", environ.get(name, ""))
        options += [f"-D{name}={';'.join(values)}"] if values else []
    return options


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> int | None:
    """Bytes that processes can still take, a container's limit included; None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    amounts = [int(found[1]) * 1024] if found else []
    if limit.is_file() and limit.read_text().strip().isdigit():
        amounts.append(int(limit.read_text()))
    return min(amounts, default=None)


def compile_jobs(environ: Mapping[str, str], memory: int | None, with_cuda: bool, cpus: int | None = None) -> int:
    """How many files to compile at a time: MAX_JOBS, or what the processors and, for kernels, the memory allow."""
    jobs = environ.get("MAX_JOBS", "").strip()
    if jobs:
        if not jobs.isdecimal() or int(jobs) < 1:
            raise SystemExit(f"MAX_JOBS must be a positive integer; got {jobs!r}.")
        return int(jobs)
    if cpus is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not with_cuda or memory is None:
        return cpus
    return max(1, min(cpus, memory // BYTES_PER_JOB))
