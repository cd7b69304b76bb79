"""How far one prefill raises the resident size of this process (Linux)."""

from __future__ import annotations

from pathlib import Path

from benchmark_results import Row
from cpu_cases import Case, Inputs

from dca_ext import dca_attention


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
    return int(line.split()[1]) / 2**10


def peak_memory(case: Case) -> Row:
    """MiB that one prefill adds at its peak, out included, and how much of that out and the rotated copy of K need."""
    x = Inputs(case)
    q, k, v = x.q, x.k_unrotated, x.v
    dca_attention(q[:, :64], k[:, :64], v[:, :64], x.cos, x.sin, case.config)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_mib("VmRSS")
    dca_attention(q, k, v, x.cos, x.sin, case.config)
    needed = (q.numel() + k.numel()) * q.element_size() / 2**20
    return {**case.to_dict(), "added_mib": resident_mib("VmHWM") - before, "out_and_rotated_k_mib": needed}
