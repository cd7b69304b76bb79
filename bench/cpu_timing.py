"""Times of calls on the CPU, and what they depend on: the machine, its memory, the versions in use."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dca_ext

#: Of all that torch finds out about a CPU, what attention kernels care about.
_FEATURES = ("avx2", "fma3", "f16c", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "sve", "bf16")


def seconds_of(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternating_pairs(
    first: Callable[[], object], second: Callable[[], object], pairs: int
) -> list[tuple[float, float]]:
    """Seconds of first and second, called in turn: A B A B ..."""
    return [(seconds_of(first), seconds_of(second)) for _ in range(pairs)]


def pairs_within(budget_s: float, pair_s: float, wanted: int) -> int:
    """Pairs that fit into a budget, at most those wanted; 0 where not even three (or all that are wanted) fit.

    Short calls get more than are wanted, up to 99 pairs or 0.3 seconds: they cost nothing, and scatter most.
    """
    pair_s = max(pair_s, 1e-9)
    wanted = max(wanted, min(99, int(0.3 / pair_s)))
    fitting = min(wanted, int(budget_s / pair_s))
    return fitting if fitting >= min(3, wanted) else 0


def available_bytes() -> float:
    """Memory that can be had without swapping; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(text for text in lines if text.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")
    return 1024.0 * int(line.split()[1])


def cpu_name() -> str:
    """Model name as the system or torch gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return str(_capabilities().get("cpu_name") or platform.processor() or platform.machine())


def _capabilities() -> dict[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()  # absent from older versions of torch


def cpu_facts() -> dict[str, Any]:
    """What the results depend on: processor, memory, builds and versions."""
    capabilities = _capabilities()
    return {
        "machine": cpu_name(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [name for name in _FEATURES if capabilities.get(name)],
        "l2_bytes": capabilities.get("l2_cache_size"),
        "available_gib": round(available_bytes() / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "transformers": _version("transformers"),
        "dca_ext": dca_ext.__version__,
        "build": dca_ext.build_info(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
