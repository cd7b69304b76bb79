"""Chunk geometries that the benchmarks use, and rotary tables for them."""

from __future__ import annotations

import torch
from torch import Tensor

from dca_ext import DCAConfig

#: The geometries of models trained at 4k, at 8k (the paper's form) and at 128k.
CONFIGS = {
    config.chunk_len: config
    for config in (
        DCAConfig.from_pretraining_length(4096),
        DCAConfig.paper(8192),
        DCAConfig.from_pretraining_length(131072),
    )
}


def config_for(chunk_len: int) -> DCAConfig:
    """The usual geometry of that chunk length; max_position is 6/5 of it where none is usual."""
    return CONFIGS.get(chunk_len) or DCAConfig(chunk_len, min(chunk_len + chunk_len // 5, 2 * chunk_len - 1))


def rotary_tables(config: DCAConfig, head_dim: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """float32 cos and sin, (max_position + 1, head_dim / 2), at base 10000."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(config.max_position + 1, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)
