"""Where a command's model runs, and in which dtype, if the user does not say."""

from __future__ import annotations

from typing import Any

import torch


def pick_device(name: str | None) -> torch.device:
    """The device called ``name`` (cpu, cuda or cuda:N); None: cuda where the CUDA kernels are built and there is one.

    Raises ValueError, one sentence, for other names and for a device that is not there.
    """
    from dca_ext import build_info

    if name is None:
        with_kernels = build_info()["cuda_architectures"] and torch.cuda.is_available()
        return torch.device("cuda" if with_kernels else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {name}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees no CUDA device here")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device must name one of {torch.cuda.device_count()} CUDA devices, from 0; got {name}")
    return device


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is multiplied in hardware, else float32; a CPU that emulates it is slower, not faster."""
    if device.type == "cuda":
        return torch.bfloat16
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32
