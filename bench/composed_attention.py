"""Dual Chunk Attention composed of ordinary attention calls: what the fused kernels are measured against.

Per chunk of queries one causal call over its own keys, one call over the chunk before and one over all chunks before
that, each with the queries rotated for that segment; then the merge of the three by their log-sum-exp (LSE). This is
the arithmetic of An et al. 2024 (arXiv 2402.17463), section 3, and what an implementation without own kernels does.

Shapes: q and out (batch, seqlen, heads, head_dim), k and v (batch, seqlen, kv_heads, head_dim), LSE (batch, heads,
seqlen) in natural logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dca_ext import DCAConfig
from dca_ext.reference import SEGMENTS, query_position, rope

#: (q, k, v, causal) -> out, LSE. Causal means that row i sees the keys up to i; q and k are then equally long.
Attend = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]

#: (out, LSE) of disjoint keys -> out over their union.
Merge = Callable[[Sequence[tuple[Tensor, Tensor]]], Tensor]

#: Rows rotated at a time: the float32 copies stay small beside the tensors.
_ROWS_PER_BLOCK = 8192


def rotated_queries(q: Tensor, cos: Tensor, sin: Tensor, config: DCAConfig) -> dict[str, Tensor]:
    """Segment -> q of whole sequences rotated for that segment, in float32, rounded once to q's dtype."""
    rotated = {segment: torch.empty_like(q) for segment in SEGMENTS}
    for begin in range(0, q.shape[1], _ROWS_PER_BLOCK):
        rows = slice(begin, min(begin + _ROWS_PER_BLOCK, q.shape[1]))
        positions = torch.arange(rows.start, rows.stop, device=q.device)
        for segment, result in rotated.items():
            result[:, rows] = rope(q[:, rows].float(), query_position(positions, segment, config), cos, sin)
    return rotated


def composed_attention(
    q: dict[str, Tensor], k: Tensor, v: Tensor, config: DCAConfig, attend: Attend, merge: Merge
) -> Tensor:
    """Attention over rotated keys of whole sequences; q comes from `rotated_queries`."""
    out = torch.empty_like(q["intra"])
    n = config.chunk_len
    for begin in range(0, k.shape[1], n):
        rows = slice(begin, min(begin + n, k.shape[1]))
        parts = [attend(q["intra"][:, rows], k[:, rows], v[:, rows], True)]
        if begin >= n:
            keys = slice(begin - n, begin)
            parts.append(attend(q["successive"][:, rows], k[:, keys], v[:, keys], False))
        if begin >= 2 * n:
            keys = slice(0, begin - n)
            parts.append(attend(q["inter"][:, rows], k[:, keys], v[:, keys], False))
        out[:, rows] = merge(parts) if len(parts) > 1 else parts[0][0]
    return out


def merge_in_torch(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The merge in torch's own operations, with float32 weights."""
    lse = torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), dim=0)
    merged = torch.zeros_like(parts[0][0], dtype=lse.dtype)
    for out, part_lse in parts:
        merged.addcmul_(out.to(lse.dtype), torch.exp(part_lse - lse).transpose(1, 2)[..., None])
    return merged.to(parts[0][0].dtype)


def per_head(attend: Attend) -> Attend:
    """The same attention, one call per query head."""

    def attend_per_head(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        group = q.shape[2] // k.shape[2]
        heads = [
            attend(
                q[:, :, h : h + 1], k[:, :, h // group : h // group + 1], v[:, :, h // group : h // group + 1], causal
            )
            for h in range(q.shape[2])
        ]
        return torch.cat([out for out, _ in heads], dim=2), torch.cat([lse for _, lse in heads], dim=1)

    return attend_per_head


def exact_attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention in float64 with all logits in memory; out and LSE stay float64."""
    group = q.shape[2] // k.shape[2]
    queries = q.double().transpose(1, 2)
    keys, values = (x.double().repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    logits = queries @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        unseen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(unseen, -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    return (torch.exp(logits - lse[..., None]) @ values).transpose(1, 2), lse
