"""``dca-ext info``: versions, what was built, the hardware, and which kernel would run for a given shape."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

from dca_ext.cli.arguments import INT_MAX, integer, positive_int

#: Distributions whose versions matter when something behaves oddly; "-" stands for those that are not installed.
_DISTRIBUTIONS = ("transformers", "safetensors", "gguf", "numpy")

#: Of all that torch finds out about a CPU, what attention kernels care about.
_CPU_FEATURES = ("avx2", "fma3", "f16c", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")


def add_parser(subparsers: Any) -> None:
    """Adds ``info`` and its options."""
    parser = subparsers.add_parser(
        "info",
        help="show versions, what was built, the hardware, and which kernel would run",
        description="Show versions, what was built, the hardware, and which attention kernel would run for a shape.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    shape = parser.add_argument_group("shape", "of the attention call whose kernel to name")
    shape.add_argument("--seqlen-q", type=integer(0, INT_MAX), default=4096, help="queries; default: 4096")
    shape.add_argument("--seqlen-k", type=integer(0, INT_MAX), help="keys; default: as many as queries")
    shape.add_argument("--heads", type=positive_int, help="query heads; default: 9")
    shape.add_argument("--kv-heads", type=positive_int, help="key and value heads; default: 3, or --heads if given")
    shape.add_argument("--head-dim", type=positive_int, default=64, help="default: 64")
    shape.add_argument("--chunk-len", type=positive_int, default=2560, help="default: 2560")
    shape.add_argument("--max-position", type=positive_int, help="default: 6/5 of --chunk-len")
    shape.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="default: float32"
    )
    shape.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")


def run(args: argparse.Namespace) -> int:
    """Carries out ``info`` -> exit status; 1 if no kernel takes the shape."""
    kernel = _kernel(args)
    report = {"versions": _versions(), "build": _build(), "hardware": _hardware(), "kernel": kernel}
    print(json.dumps(report, indent=2) if args.json else "\n".join(_lines(report)))
    if "error" in kernel:
        print(f"dca-ext info: {kernel['error']}", file=sys.stderr)
        return 1
    return 0


def _versions() -> dict[str, str]:
    """Versions by package. torch's own says more than its package's: the CUDA version that it was built for."""
    import torch

    import dca_ext

    versions = {"dca_ext": dca_ext.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "-"
    return versions


def _build() -> dict[str, Any]:
    """What `dca_ext.build_info` says, but for the version, which stands with the other versions."""
    import dca_ext

    return {key: value for key, value in dca_ext.build_info().items() if key != "version"}


def _hardware() -> dict[str, Any]:
    import torch

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older versions of torch
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "cpu_features": [name for name in _CPU_FEATURES if capabilities.get(name)],
        "gpus": _gpus(),
    }


def _gpus() -> list[str]:
    """One line per GPU that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        lines.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}")
    return lines


def _kernel(args: argparse.Namespace) -> dict[str, Any]:
    """The shape that was asked about, with the ``name`` of the kernel that would run, or the ``error`` that says why
    none would."""
    from dca_ext import _core

    # ChunkLlama's geometry, chunk_len 5c/8 and max_position 3c/4, where its bounds allow it.
    bound = min(args.chunk_len * 6 // 5, 2 * args.chunk_len - 1, INT_MAX)
    max_position = max(args.chunk_len, bound) if args.max_position is None else args.max_position
    shape = {
        "seqlen_q": args.seqlen_q,
        "seqlen_k": args.seqlen_q if args.seqlen_k is None else args.seqlen_k,
        "num_heads": 9 if args.heads is None else args.heads,
        "num_heads_kv": args.kv_heads or args.heads or 3,
        "head_dim": args.head_dim,
        "chunk_len": args.chunk_len,
        "max_position": max_position,
        "dtype": args.dtype,
        "device": args.device,
    }
    try:
        return {**shape, "name": _core.describe_kernel(**shape)}
    except (ValueError, RuntimeError) as error:
        return {**shape, "error": str(error)}


def _lines(report: dict[str, Any]) -> list[str]:
    """The report as indented text, one value per line."""
    lines = []
    for heading, values in report.items():
        lines.append(heading)
        width = max((len(key) for key in values), default=0)
        lines += [f"  {key.replace('_', ' '):<{width}}  {_text(value)}" for key, value in values.items()]
    return lines


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_text(inner) for inner in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, "") else str(value)
