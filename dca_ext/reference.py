"""Dual Chunk Attention in plain torch: slow, exact, and meant to be read as the specification.

Every function has the signature and the meaning of its fused counterpart in `dca_ext.functional`, with one more
keyword: ``compute_dtype`` (default float64), in which all arithmetic is done. Outputs of attention have q's dtype
unless another one, ``out_dtype``, says otherwise. Nothing here is differentiable on purpose, fast, or used by the fused
operators.

The method (An et al. 2024, arXiv 2402.17463), with n = chunk_len and P = max_position; i is the position of a query
and j <= i that of a key:

    segment      condition                      key position   query position          causal mask
    intra        i div n == j div n             j mod n        i mod n                 j <= i
    successive   (i div n) - (j div n) == 1     j mod n        min(i mod n + n, P)     none
    inter        (i div n) - (j div n) >= 2     j mod n        P                       none

    logit(i, j) = softmax_scale * temperature * <rope(q_i, query position), rope(k_j, key position)>

and one softmax over all j <= i. The log-sum-exp (LSE) is the natural logarithm, scale and temperature inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dca_ext.config import DCAConfig

SEGMENTS = ("intra", "successive", "inter")

#: Query rows worked on at a time, so that the logits of long sequences fit in memory.
_ROWS_PER_BLOCK = 256


# --- The geometry -----------------------------------------------------------------------------------------------------


def key_position(j: Tensor, config: DCAConfig) -> Tensor:
    """Rotary position of keys at positions ``j`` (any shape, int64)."""
    return j % config.chunk_len


def query_position(i: Tensor, segment: str, config: DCAConfig) -> Tensor:
    """Rotary position of queries at positions ``i`` (any shape, int64) against the keys of ``segment``."""
    if segment == "intra":
        return i % config.chunk_len
    if segment == "successive":
        return (i % config.chunk_len + config.chunk_len).clamp(max=config.max_position)
    return torch.full_like(i, config.max_position)


def segment_mask(i: Tensor, j: Tensor, segment: str, config: DCAConfig) -> Tensor:
    """Which keys ``j`` (seqlen_k,) the queries ``i`` (seqlen_q,) see in ``segment``: bool (seqlen_q, seqlen_k)."""
    i, j = i[:, None], j[None, :]
    chunks_apart = torch.div(i, config.chunk_len, rounding_mode="floor") - torch.div(
        j, config.chunk_len, rounding_mode="floor"
    )
    causal = (j <= i) & (i >= 0) & (j >= 0)
    if segment == "intra":
        return causal & (chunks_apart == 0)
    if segment == "successive":
        return causal & (chunks_apart == 1)
    return causal & (chunks_apart >= 2)


def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates ``x`` (seqlen, heads, head_dim) at ``positions`` (seqlen,) by table rows ``cos``, ``sin`` (rows, R / 2).

    The first R channels turn: pairs (c, c + R / 2), or (2c, 2c + 1) when interleaved. The rest passes through.
    """
    cos = cos.to(x.dtype)[positions][:, None, :]
    sin = sin.to(x.dtype)[positions][:, None, :]
    rotary_dim = 2 * cos.shape[-1]
    turning, passing = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turning.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, passing), dim=-1)


# --- One sequence -----------------------------------------------------------------------------------------------------


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    config: DCAConfig,
    scale: float | Tensor,
    *,
    segments: Sequence[str] = SEGMENTS,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence: unrotated q (seqlen_q, H, D) at ascending logical ``q_positions`` over rotated k and v
    (seqlen_k, H_kv, D) at positions 0, 1, ... -> out (seqlen_q, H, D), lse (H, seqlen_q), in q's dtype.

    Rows that see no key give 0 and -inf.
    """
    seqlen_q, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    out = torch.zeros(seqlen_q, num_heads, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.full((num_heads, seqlen_q), -math.inf, dtype=q.dtype, device=q.device)
    if k.shape[0] == 0:
        return out, lse
    k_heads = k.repeat_interleave(group, dim=1).permute(1, 2, 0)  # (H, D, seqlen_k)
    v_heads = v.repeat_interleave(group, dim=1).transpose(0, 1)  # (H, seqlen_k, D)
    for start in range(0, seqlen_q, _ROWS_PER_BLOCK):
        rows = slice(start, start + _ROWS_PER_BLOCK)
        i = q_positions[rows]
        seen_by_last = max(0, min(int(i[-1]) + 1, k.shape[0]))
        j = torch.arange(seen_by_last, device=q.device)  # no row of the block sees a key behind these
        logits = torch.full((num_heads, len(i), len(j)), -math.inf, dtype=q.dtype, device=q.device)
        for segment in segments:
            seen = segment_mask(i, j, segment, config)
            columns = seen.any(dim=0).nonzero().flatten()
            if len(columns) == 0:
                continue
            part = slice(int(columns[0]), int(columns[-1]) + 1)  # a segment's keys lie side by side
            positions = query_position(i.clamp(min=0), segment, config)
            q_rotated = rope(q[rows], positions, cos, sin, interleaved).transpose(0, 1)
            segment_logits = scale * (q_rotated @ k_heads[..., part])
            logits[..., part] = torch.where(seen[:, part], segment_logits, logits[..., part])
        block_lse = torch.logsumexp(logits, dim=-1)
        # A row without keys has lse -inf; exp(-inf - 0) = 0 gives its zeros, where -inf - -inf would give NaN.
        weights = torch.exp(logits - block_lse.clamp(min=torch.finfo(q.dtype).min)[..., None])
        out[rows] = _weighted_sum(weights, v_heads[:, : len(j)], logits > -math.inf).transpose(0, 1)
        lse[:, rows] = block_lse
    return out, lse


def _weighted_sum(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """weights (H, rows, keys) @ v (H, keys, D), each row over the keys that it has seen (H, rows, keys).

    Values that a row does not see may be anything, and 0 * NaN is NaN: what is not finite is added key by key.
    """
    finite = v.isfinite()
    total = weights @ torch.where(finite, v, 0)
    for j in (~finite.all(dim=-1) & seen.any(dim=1)).any(dim=0).nonzero().flatten().tolist():
        terms = weights[:, :, j, None] * torch.where(finite[:, j], 0, v[:, j])[:, None, :]
        total += torch.where(seen[:, :, j, None], terms, 0)
    return total


# --- The operators ----------------------------------------------------------------------------------------------------


def dca_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    config: DCAConfig,
    *,
    softmax_scale: float | None = None,
    temperature: Tensor | None = None,
    interleaved: bool = False,
    return_lse: bool = False,
    compute_dtype: torch.dtype = torch.float64,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal self-attention over whole sequences; see `dca_ext.dca_attention`."""
    batch, seqlen = q.shape[:2]
    lengths = [seqlen] * batch
    factors = _temperatures(temperature, config, lengths)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.empty(batch, q.shape[2], seqlen, dtype=torch.float32, device=q.device)
    positions = torch.arange(seqlen, device=q.device)
    for b in range(batch):
        k_rotated = rope(k[b].to(compute_dtype), key_position(positions, config), rotary_cos, rotary_sin, interleaved)
        out_b, lse_b = attend(
            q[b].to(compute_dtype),
            k_rotated,
            v[b].to(compute_dtype),
            positions,
            rotary_cos,
            rotary_sin,
            config,
            _scale(softmax_scale, q) * factors[b],
            interleaved=interleaved,
        )
        out[b], lse[b] = out_b, lse_b
    return (out, lse) if return_lse else out


def dca_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    config: DCAConfig,
    *,
    softmax_scale: float | None = None,
    temperature: Tensor | None = None,
    interleaved: bool = False,
    return_lse: bool = False,
    compute_dtype: torch.dtype = torch.float64,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`dca_attention` over ragged sequences (total, heads, head_dim); see `dca_ext.dca_attention_varlen`."""
    borders = cu_seqlens_q.tolist()
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32, device=q.device)
    for b, (begin, end) in enumerate(pairwise(borders)):
        rows = slice(begin, end)
        result = dca_attention(
            q[None, rows],
            k[None, rows],
            v[None, rows],
            rotary_cos,
            rotary_sin,
            config,
            softmax_scale=softmax_scale,
            temperature=None if temperature is None else temperature[b : b + 1],
            interleaved=interleaved,
            return_lse=True,
            compute_dtype=compute_dtype,
            out_dtype=out_dtype,
        )
        out[rows], lse[:, rows] = result[0][0], result[1][0]
    return (out, lse) if return_lse else out


def rotate_keys(
    k: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    config: DCAConfig,
    *,
    cache_seqlens: int | Tensor = 0,
    cache_leftpad: Tensor | None = None,
    interleaved: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """k (batch, seqlen, H_kv, D) rotated at (position mod chunk_len); see `dca_ext.rotate_keys`."""
    out = torch.empty_like(k)
    before = _per_sequence(cache_seqlens, k.shape[0])
    leftpad = _per_sequence(0 if cache_leftpad is None else cache_leftpad, k.shape[0])
    for b in range(k.shape[0]):
        positions = torch.arange(k.shape[1], device=k.device) + before[b] - leftpad[b]
        # Padding in front of the first token has no position; whatever is written there is never read.
        positions = key_position(positions.clamp(min=0), config)
        out[b] = rope(k[b].to(compute_dtype), positions, rotary_cos, rotary_sin, interleaved)
    return out


def rotate_and_append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    config: DCAConfig,
    *,
    cache_seqlens: int | Tensor,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    interleaved: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> None:
    """Writes rotated k, and v, behind the ``cache_seqlens`` slots in use; see `dca_ext.rotate_and_append_kv`."""
    sequences = _query_rows(k, cu_seqlens_q)
    before = _per_sequence(cache_seqlens, len(sequences))
    for b, rows in enumerate(sequences):
        k_b, v_b = (k[b], v[b]) if cu_seqlens_q is None else (k[rows], v[rows])
        pad = None if cache_leftpad is None else cache_leftpad[b : b + 1]
        k_rotated = rotate_keys(
            k_b[None].to(compute_dtype),
            rotary_cos,
            rotary_sin,
            config,
            cache_seqlens=before[b],
            cache_leftpad=pad,
            interleaved=interleaved,
            compute_dtype=compute_dtype,
        )[0]
        for r in range(k_b.shape[0]):
            entry = _slot(before[b] + r, b, page_table, k_cache)
            _store(k_rotated[r], k_cache, k_scale, entry)
            _store(v_b[r].to(compute_dtype), v_cache, v_scale, entry)


def dca_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    config: DCAConfig,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    page_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    softmax_scale: float | None = None,
    temperature: Tensor | None = None,
    num_splits: int = 0,
    interleaved: bool = False,
    return_lse: bool = False,
    segments: Sequence[str] = SEGMENTS,
    compute_dtype: torch.dtype = torch.float64,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over cached, rotated keys, q ending at the last cached token; see
    `dca_ext.dca_attention_with_kvcache`. ``num_splits`` is accepted and means nothing here."""
    sequences = _query_rows(q, cu_seqlens_q)
    total = _per_sequence(cache_seqlens, len(sequences))
    if k is not None and v is not None:
        rotate_and_append_kv(
            k,
            v,
            k_cache,
            v_cache,
            rotary_cos,
            rotary_sin,
            config,
            cache_seqlens=cache_seqlens,
            cache_leftpad=cache_leftpad,
            page_table=page_table,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            k_scale=k_scale,
            v_scale=v_scale,
            interleaved=interleaved,
            compute_dtype=compute_dtype,
        )
        total = [n + (rows.stop - rows.start) for n, rows in zip(total, sequences, strict=True)]
    leftpad = _per_sequence(0 if cache_leftpad is None else cache_leftpad, len(sequences))
    kv_lens = [n - pad for n, pad in zip(total, leftpad, strict=True)]
    factors = _temperatures(temperature, config, kv_lens)

    ragged = cu_seqlens_q is not None
    lse_shape = (q.shape[1], q.shape[0]) if ragged else (q.shape[0], q.shape[2], q.shape[1])
    out = torch.zeros(*q.shape[:-1], v_cache.shape[-1], dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.full(lse_shape, -math.inf, dtype=torch.float32, device=q.device)
    for b, rows in enumerate(sequences):
        slots = range(leftpad[b], total[b])
        keys = _meaning(k_cache, k_scale, b, slots, page_table, compute_dtype)
        values = _meaning(v_cache, v_scale, b, slots, page_table, compute_dtype)
        q_b = q[rows] if ragged else q[b]
        positions = torch.arange(kv_lens[b] - q_b.shape[0], kv_lens[b], device=q.device)
        out_b, lse_b = attend(
            q_b.to(compute_dtype),
            keys,
            values,
            positions,
            rotary_cos,
            rotary_sin,
            config,
            _scale(softmax_scale, q) * factors[b],
            segments=segments,
            interleaved=interleaved,
        )
        if ragged:
            out[rows], lse[:, rows] = out_b.to(out.dtype), lse_b.to(lse.dtype)
        else:
            out[b], lse[b] = out_b.to(out.dtype), lse_b.to(lse.dtype)
    return (out, lse) if return_lse else out


def dca_segment_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    config: DCAConfig,
    *,
    segment: str,
    cache_seqlens: int | Tensor,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """One segment alone over rotated keys -> (out, lse); see `dca_ext.dca_segment_attention`."""
    result = dca_attention_with_kvcache(
        q,
        k_cache,
        v_cache,
        rotary_cos,
        rotary_sin,
        config,
        cache_seqlens=cache_seqlens,
        segments=(segment,),
        return_lse=True,
        **kwargs,  # type: ignore[arg-type]
    )
    return result[0], result[1]


def merge_attention_states(
    outs: Sequence[Tensor] | Tensor,
    lses: Sequence[Tensor] | Tensor,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint key sets from the attention over each; see
    `dca_ext.merge_attention_states`."""
    stacked_lse = torch.stack(tuple(lses)).to(compute_dtype)
    lse = torch.logsumexp(stacked_lse, dim=0)
    # (..., heads, seqlen) -> (..., seqlen, heads, 1), the layout of out
    weights = torch.exp(stacked_lse - lse.clamp(min=torch.finfo(compute_dtype).min)).transpose(-1, -2)[..., None]
    parts = torch.stack(tuple(outs)).to(compute_dtype)
    out = torch.where(weights > 0, weights * parts, 0).sum(dim=0)
    return out.to(outs[0].dtype), lse.to(torch.float32)


# --- Reading the arguments --------------------------------------------------------------------------------------------


def _scale(softmax_scale: float | None, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale


def _temperatures(temperature: Tensor | None, config: DCAConfig, kv_lens: Sequence[int]) -> list[float]:
    """One factor on the logits per sequence."""
    if temperature is not None:
        return [float(t) for t in temperature.tolist()]
    if config.temperature == "none":
        return [1.0] * len(kv_lens)
    assert config.original_max_position_embeddings is not None
    original = config.original_max_position_embeddings
    return [max(1.0, 0.1 * math.log(max(n, 1) / original) + 1.0) ** 2 for n in kv_lens]


def _per_sequence(lengths: int | Tensor, batch: int) -> list[int]:
    return [lengths] * batch if isinstance(lengths, int) else [int(n) for n in lengths.tolist()]


def _query_rows(q: Tensor, cu_seqlens_q: Tensor | None) -> list[slice]:
    """The rows of each sequence: of its own batch entry, or of the ragged first dimension."""
    if cu_seqlens_q is None:
        return [slice(0, q.shape[1])] * q.shape[0]
    borders = cu_seqlens_q.tolist()
    return [slice(begin, end) for begin, end in pairwise(borders)]


def _slot(slot: int, b: int, page_table: Tensor | None, cache: Tensor) -> tuple[int, int]:
    """Index of cache slot ``slot`` of sequence ``b`` in the first two dimensions of the cache."""
    if page_table is None:
        return b, slot
    page_size = cache.shape[1]
    return int(page_table[b, slot // page_size]), slot % page_size


def _gather(cache: Tensor, b: int, slots: range, page_table: Tensor | None) -> Tensor:
    """The slots of one sequence, (len(slots), H_kv, D); of scales (len(slots), H_kv)."""
    if page_table is None:
        return cache[b, slots.start : slots.stop]
    entries = torch.arange(slots.start, slots.stop, device=cache.device)
    pages = page_table[b].long()[entries // cache.shape[1]]
    return cache[pages, entries % cache.shape[1]]


def _per_head(scale: float | Tensor | None, like: Tensor) -> Tensor:
    """The scale of a cache for rows (..., H_kv, D) like these."""
    return torch.as_tensor(1.0 if scale is None else scale, dtype=like.dtype, device=like.device).reshape(-1, 1)


def _meaning(
    cache: Tensor,
    scale: float | Tensor | None,
    b: int,
    slots: range,
    page_table: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What the slots of one sequence stand for, (len(slots), H_kv, D): elements times their scale."""
    rows = _gather(cache, b, slots, page_table).to(dtype)
    if cache.dtype == torch.int8:
        assert isinstance(scale, Tensor)
        return rows * _gather(scale, b, slots, page_table).to(dtype)[..., None]
    return rows * _per_head(scale, rows)


def _store(rows: Tensor, cache: Tensor, scale: float | Tensor | None, entry: tuple[int, int]) -> None:
    """Writes rows (H_kv, D) to one slot of the cache, and of an int8 cache their scales beside them."""
    if cache.dtype == torch.int8:
        assert isinstance(scale, Tensor)
        cache[entry], scale[entry] = _quantize(rows)
        return
    rows = rows / _per_head(scale, rows)
    if cache.dtype == torch.float8_e4m3fn:  # it ends at its largest number, where torch makes NaN
        largest = torch.finfo(cache.dtype).max
        rows = rows.clamp(-largest, largest)
    cache[entry] = rows.to(cache.dtype)


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., D) as whole numbers in [-127, 127], int8 (..., D), and their scales, float32 (...).

    Zeros have scale 0. A NaN or an infinity makes the scale NaN, and the numbers 0.
    """
    largest = rows.abs().amax(dim=-1)
    scale = torch.where(largest.isfinite(), largest / 127, math.nan).float()
    numbers = torch.round(rows / scale.to(rows.dtype)[..., None]).clamp(-127, 127)
    return torch.where(scale[..., None] > 0, numbers, 0).to(torch.int8), scale
