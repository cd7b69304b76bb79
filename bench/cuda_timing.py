"""Times of work on a CUDA device, and what the device can do at best."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Mapping

import torch

GIB = 2**30


class CacheFlush:
    """Empties the L2 cache by reading a buffer of four times its size.

    Reading, since lines that were written would have to go back to memory while the next kernel runs. It also takes so
    long that the host has queued the timed work before the device gets there.
    """

    def __init__(self) -> None:
        size = max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 64 * 2**20)
        self.buffer = torch.zeros(size // 4, dtype=torch.float32, device="cuda")
        self.sum = torch.zeros((), dtype=torch.float32, device="cuda")

    def __call__(self) -> None:
        """Queues the reads."""
        torch.sum(self.buffer, dim=0, out=self.sum)


def alternating_seconds(
    calls: Mapping[str, Callable[[], object]], rounds: int, flush: CacheFlush
) -> dict[str, list[float]]:
    """Seconds of each call in each round. The calls take turns, so that a clock that drifts meets all of them."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            flush()
            start.record()
            call()
            stop.record()
            stop.synchronize()
            seconds[name].append(start.elapsed_time(stop) / 1e3)
    return seconds


def rounds_for(calls: Mapping[str, Callable[[], object]], flush: CacheFlush, *, most: int, budget_s: float) -> int:
    """Rounds that fit into budget_s seconds, at least 3; the calls are warm after it."""
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    once = alternating_seconds(calls, 1, flush)
    return max(3, min(most, int(budget_s / max(1e-6, sum(times[0] for times in once.values())))))


def as_graph(call: Callable[[], object]) -> Callable[[], None]:
    """A call that replays what `call` puts on the device, without its work on the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are loaded and plans made before the capture, which allows neither
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# --- Ceilings ---------------------------------------------------------------------------------------------------------


def copy_bandwidth(trials: int = 9) -> tuple[float, int]:
    """Bytes/s, read plus written, of a 4 GiB copy (less where memory is short), and the bytes of the buffer."""
    size = min(4 * GIB, torch.cuda.mem_get_info()[0] // 3)
    source = torch.empty(size // 4, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for trial in range(trials + 1):
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        if trial > 0:
            best = min(best, start.elapsed_time(stop) / 1e3)
    size = source.numel() * 4
    del source, target
    torch.cuda.empty_cache()
    return 2 * size / best, size


def matmul_rate(dtype: torch.dtype, trials: int = 9) -> float:
    """FLOP/s of torch's product of two random 8192 x 8192 matrices: the median, since a hot device is the usual one."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for trial in range(trials + 3):
        start.record()
        torch.mm(a, b, out=out)
        stop.record()
        stop.synchronize()
        if trial >= 3:
            times.append(start.elapsed_time(stop) / 1e3)
    return 2 * n**3 / statistics.median(times)


def device_facts() -> dict[str, object]:
    """What the results depend on, as far as torch and nvidia-smi say."""
    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, object] = {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "memory_gib": round(properties.total_memory / GIB, 2),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    names = ["driver_version", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "clocks.mem", "power.limit"]
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        facts |= dict(zip(names, (value.strip() for value in answer.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        facts["nvidia-smi"] = "did not answer"
    return facts
