"""Scales for KV caches of 8-bit floating point. Those of int8 caches are written with the rows."""

from __future__ import annotations

import torch
from torch import Tensor


def kv_cache_scale(x: Tensor, *, margin: float = 2.0) -> Tensor:
    """A scale per KV head for a float8_e4m3fn cache: margin * (largest magnitude of the head in ``x``) / 448.

    448 is the largest number of float8_e4m3fn; what a call appends beyond 448 * scale is cut off there. The margin is
    for what ``x`` does not show: rotation makes an element of a key up to sqrt(2) times larger, and later tokens may be
    larger than these. A margin of 2 costs next to nothing: all numbers move down one exponent of 15, and only those
    below 1/14000 of the largest get coarser.

    Take it from a prompt, say, and keep it for as long as the cache: what is in the cache was divided by it.

    Args:
        x: sample keys (rotated or not) or values, (..., num_heads_kv, head_dim), in any floating dtype.
        margin: at least 1.

    Returns:
        (num_heads_kv,), float32, on x's device. 1 for a head whose values are all 0, or so small that their scale would
        round to 0.

    Raises:
        TypeError: if x is not a tensor.
        ValueError: if x has fewer than two dimensions, no elements or no floating dtype, or if margin is below 1.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must have shape (..., num_heads_kv, head_dim) with elements in it; got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating dtype; got {x.dtype}")
    if not margin >= 1:
        raise ValueError(f"margin must be at least 1; got {margin}")
    x = x.detach().float() if x.element_size() == 1 else x.detach()
    others = [d for d in range(x.dim()) if d != x.dim() - 2]
    largest = torch.maximum(x.amax(others), -x.amin(others)).float()  # of a long prompt abs() would be a copy
    scale = margin / torch.finfo(torch.float8_e4m3fn).max * largest
    return torch.where(scale == 0, 1.0, scale)
