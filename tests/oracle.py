"""The error rule, the rounding baseline it is measured by, and inputs that hide poison where nothing may look."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import dca_ext
from dca_ext import DCAConfig, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn

#: Geometries (chunk_len, max_position): the paper's Figure 2, no local window, the smallest, a usual ratio, an odd one.
FIGURE_2 = DCAConfig(6, 9)
SMALL = DCAConfig(40, 48)


def tables(config: DCAConfig, rotary_dim: int, *, scale: float = 1.0, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """float32 cos and sin, (max_position + 1, rotary_dim / 2)."""
    frequencies = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(config.max_position + 1, dtype=torch.float64)[:, None] * frequencies
    return (scale * angles.cos()).float(), (scale * angles.sin()).float()


def random_rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values in a tensor that is not contiguous in any dimension but the last; what lies between is NaN."""
    *rows, dim = shape
    storage = torch.full((*rows, dim + 8), math.nan, dtype=dtype)
    storage[..., :dim] = torch.randn(*shape).to(dtype)
    return storage[..., :dim]


# --- The rule ---------------------------------------------------------------------------------------------------------


def ulp(x: float, dtype: torch.dtype) -> float:
    """Spacing of dtype's numbers at x."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(x, torch.finfo(dtype).tiny)))


def assert_close(out: Tensor, oracle: Tensor, baseline: Tensor | None = None) -> None:
    """max |error| <= 1e-5 * max |out| in float32, else 2 * max |baseline error| + 2 ulp of max |out|.

    out, oracle (float64) and baseline have equal shapes; NaN and infinities must be in the same places.
    """
    assert out.shape == oracle.shape
    actual = out.double()
    assert torch.equal(actual.isnan(), oracle.isnan()), "NaN in other places"
    assert torch.equal(actual.isinf(), oracle.isinf()), "infinities in other places"
    if oracle.numel() == 0:
        return
    largest = oracle.abs().max().item()
    error = (actual - oracle).abs().max().item()
    if out.dtype == torch.float32:
        allowed = 1e-5 * largest
    else:
        assert baseline is not None, "low precision needs the baseline"
        allowed = 2 * (baseline.double() - oracle).abs().max().item() + 2 * ulp(largest, out.dtype)
    assert error <= allowed, f"max error {error:.3e}, allowed {allowed:.3e}"


def multiplies(dtype: torch.dtype) -> bool:
    """Whether prefill tiles on this CPU multiply numbers of ``dtype`` themselves, so that queries are rounded to it."""
    return dtype == torch.bfloat16 and dca_ext.build_info()["cpu_isa"].endswith("bf16")


def assert_lse_close(
    lse: Tensor, oracle: Tensor, baseline: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> None:
    """-inf in the same places, and 1e-3 absolute elsewhere.

    In low precision the keys' one rounding moves the logits themselves, by at most their size times 2^-9 or so. Where
    queries are rounded, 1e-3 comes on top of twice the error of the ``baseline``, of the same shape.
    """
    assert lse.shape == oracle.shape
    assert lse.dtype == torch.float32
    assert torch.equal(lse.isneginf(), oracle.isneginf()), "rows without keys differ"
    seen = ~oracle.isneginf()
    allowed = 1e-3 if dtype == torch.float32 else 1e-3 + 4 * torch.finfo(dtype).eps
    if not seen.any():
        return
    if baseline is not None:
        allowed += 2 * (baseline.double() - oracle.double())[seen].abs().max().item()
    assert (lse.double() - oracle.double())[seen].abs().max().item() <= allowed


def attend_in_low_precision(
    q: Tensor,
    k_rotated: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    config: DCAConfig,
    scale: float,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The baseline for one sequence: q (rows, H, D) rotated in float32 and rounded, products of rounded inputs, float32
    softmax, weights rounded; k_rotated and v (keys, H_kv, D) as they are in the cache. lse (H, rows)."""
    dtype = q.dtype
    group = q.shape[1] // k_rotated.shape[1]
    keys = k_rotated.float().repeat_interleave(group, 1).permute(1, 2, 0)
    values = v.float().repeat_interleave(group, 1).transpose(0, 1)
    j = torch.arange(keys.shape[-1])
    logits = torch.full((q.shape[1], q.shape[0], keys.shape[-1]), -math.inf)
    for segment in reference.SEGMENTS:
        at = reference.query_position(positions.clamp(min=0), segment, config)
        q_rotated = reference.rope(q.float(), at, cos, sin).to(dtype).float().transpose(0, 1)
        seen = reference.segment_mask(positions, j, segment, config)
        logits = torch.where(seen, scale * (q_rotated @ keys), logits)
    weights = logits.softmax(-1).nan_to_num().to(dtype).float()
    out = (weights @ values).transpose(0, 1).to(dtype)
    return (out, logits.logsumexp(-1)) if return_lse else out


def baseline_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, config: DCAConfig, scale: float | None = None
) -> Tensor:
    """The baseline for whole sequences: q, k, v (batch, seqlen, heads, D), unrotated, in the dtype."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    positions = torch.arange(q.shape[1])
    out = torch.empty(q.shape, dtype=q.dtype)
    for b in range(q.shape[0]):
        k_rotated = reference.rope(k[b].float(), positions % config.chunk_len, cos, sin).to(k.dtype)
        out[b] = attend_in_low_precision(q[b], k_rotated, v[b], positions, cos, sin, config, scale)
    return out


# --- Caches with poison -----------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """A KV cache in one of its layouts; what no token owns is NaN, and unused page ids are out of range.

    int8 has no NaN: there it is -128, which no append writes, with scales of NaN.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def layout(self) -> dict[str, Tensor]:
        return {} if self.page_table is None else {"page_table": self.page_table}

    def sequence(self, b: int) -> Cache:
        """Of sequence b alone."""
        if self.page_table is not None:
            return replace(self, page_table=self.page_table[b : b + 1])
        parts = (None if x is None else x[b : b + 1] for x in (self.k, self.v, self.page_table, *self.scales.values()))
        return Cache(*parts)

    @property
    def scales(self) -> dict[str, Tensor]:
        return {} if self.k_scale is None or self.v_scale is None else dict(k_scale=self.k_scale, v_scale=self.v_scale)


def empty_cache(
    batch: int, slots: int, heads: int, dim: int, dtype: torch.dtype, *, page_size: int | None = None
) -> Cache:
    """Contiguous, or in pages of page_size slots handed out in a random order with pages of nobody between them."""
    table = None
    blocks = batch
    if page_size is not None:
        pages_each = -(-slots // page_size)
        blocks, slots = batch * pages_each + 3, page_size
        table = torch.full((batch, pages_each + 2), 2**30, dtype=torch.int32)
        table[:, :pages_each] = torch.randperm(blocks)[: batch * pages_each].reshape(batch, pages_each)
    k = torch.full((blocks, slots, heads, dim), -128 if dtype == torch.int8 else math.nan, dtype=dtype)
    if dtype != torch.int8:
        return Cache(k, k.clone(), table)
    # Heads first and with gaps: the scales of a cache may have any strides.
    scales = [torch.full((heads, blocks, slots, 3), math.nan)[..., 1].permute(1, 2, 0) for _ in range(2)]
    return Cache(k, k.clone(), table, *scales)


def ragged_borders(*lengths: int) -> Tensor:
    """cu_seqlens of sequences of these lengths, int32 (batch + 1)."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
