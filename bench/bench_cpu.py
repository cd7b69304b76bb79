"""CPU attention against torch's: prefill, decode, and how memory grows.

    python bench/bench_cpu.py                       # SmolLM2's shape: 9 query heads, 3 KV heads, head_dim 64
    python bench/bench_cpu.py --json results.json

Prefill compares `dca_attention` (key rotation included) with torch SDPA, causal, on K and V repeated and transposed
beforehand; the work is the same: 4 * head_dim * heads * sum(i + 1) FLOP. Decode compares one token against a cache with
SDPA and enable_gqa; bytes are those of K and V. Calls alternate, so that a machine whose speed drifts slows both; the
ratio is the median of the ratios of neighbours. Memory is how far one prefill raises the resident size (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F

import dca_ext
from dca_ext import DCAConfig, dca_attention, dca_attention_with_kvcache

CONFIG = DCAConfig(2560, 3072)


def tables(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (max_position + 1, head_dim / 2) cos and sin at base 10000."""
    angles = torch.arange(CONFIG.max_position + 1)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return angles.cos(), angles.sin()


def inputs(args: argparse.Namespace, seqlen: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (1, seqlen, heads, head_dim)."""
    torch.manual_seed(0)
    shapes = [(1, seqlen, heads, args.head_dim) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    q, k, v = (torch.randn(shape, dtype=torch.float32).to(getattr(torch, args.dtype)) for shape in shapes)
    return q, k, v


def alternate(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> dict[str, float]:
    """Medians of both in seconds, and the median of ours / theirs over neighbours."""

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    seconds(ours), seconds(theirs)
    timed = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    return {
        "ours_s": statistics.median(a for a, _ in timed),
        "torch_s": statistics.median(b for _, b in timed),
        "ratio": statistics.median(a / b for a, b in timed),
    }


def prefill(args: argparse.Namespace, seqlen: int) -> dict[str, float]:
    """One row of the prefill table."""
    q, k, v = inputs(args, seqlen)
    cos, sin = tables(args.head_dim)
    group = args.heads // args.kv_heads
    plain = [x.transpose(1, 2).contiguous() for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))]
    row = alternate(
        lambda: dca_attention(q, k, v, cos, sin, CONFIG),
        lambda: F.scaled_dot_product_attention(*plain, is_causal=True),
        args.pairs,
    )
    flop = 4 * args.head_dim * args.heads * seqlen * (seqlen + 1) / 2
    return row | {
        "seqlen": seqlen,
        "ours_gflops": flop / row["ours_s"] / 1e9,
        "torch_gflops": flop / row["torch_s"] / 1e9,
    }


def decode(args: argparse.Namespace, seqlen: int) -> dict[str, float]:
    """One row of the decode table."""
    q, k, v = inputs(args, seqlen)
    cos, sin = tables(args.head_dim)
    q = q[:, -1:]
    plain = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    row = alternate(
        lambda: dca_attention_with_kvcache(q, k, v, cos, sin, CONFIG, cache_seqlens=seqlen),
        lambda: F.scaled_dot_product_attention(*plain, enable_gqa=True),
        args.pairs,
    )
    size = 2 * k.numel() * k.element_size()
    return row | {"seqlen": seqlen, "ours_gbs": size / row["ours_s"] / 1e9, "torch_gbs": size / row["torch_s"] / 1e9}


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
    return int(line.split()[1]) / 2**10


def peak_memory(args: argparse.Namespace, seqlen: int) -> dict[str, float]:
    """MiB that one prefill adds to the resident size at its peak, out included."""
    q, k, v = inputs(args, seqlen)
    cos, sin = tables(args.head_dim)
    dca_attention(q[:, :64], k[:, :64], v[:, :64], cos, sin, CONFIG)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_mib("VmRSS")
    dca_attention(q, k, v, cos, sin, CONFIG)
    needed = (q.numel() + k.numel()) * q.element_size() / 2**20
    return {"seqlen": seqlen, "added_mib": resident_mib("VmHWM") - before, "out_and_rotated_k_mib": needed}


def print_table(title: str, rows: list[dict[str, float]]) -> None:
    """Prints rows under their keys."""
    print(f"\n{title}\n  " + "".join(f"{key:>24}" for key in rows[0]))
    for row in rows:
        print(
            "  " + "".join(f"{value:>24.4g}" if isinstance(value, float) else f"{value:>24}" for value in row.values())
        )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--prefill", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--decode", type=int, nargs="*", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--memory", type=int, nargs="*", default=[4096, 8192, 16384])
    parser.add_argument("--pairs", type=int, default=9, help="alternating pairs of calls behind each median")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Runs what the command line asks for."""
    args = parse()
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors",
        "build": dca_ext.build_info(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "shape": {name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim", "dtype")},
        "prefill": [prefill(args, n) for n in args.prefill],
        "decode": [decode(args, n) for n in args.decode],
        "memory": [peak_memory(args, n) for n in args.memory],
    }
    print(json.dumps({key: results[key] for key in ("machine", "torch", "threads", "date", "shape")}))
    for title in ("prefill", "decode", "memory"):
        if results[title]:
            print_table(title, results[title])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
