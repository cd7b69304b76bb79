"""The operators: Dual Chunk Attention over whole sequences and over KV caches, its segments, and their merge.

Shapes, as in the flash-attention family; head_dim is contiguous, all other strides are free:

    q                    (batch, seqlen_q, num_heads, head_dim), or ragged (total_q, num_heads, head_dim)
    k, v                 (batch, seqlen_k, num_heads_kv, head_dim), or ragged (total_k, num_heads_kv, head_dim)
    k_cache, v_cache     (batch, slots, num_heads_kv, head_dim), or pages (num_pages, page_size, num_heads_kv, head_dim)
    rotary_cos, _sin     (>= max_position + 1, rotary_dim / 2), float32, contiguous; row p belongs to position p
    out                  like q
    lse                  (batch, num_heads, seqlen_q), or ragged (num_heads, total_q); float32, natural logarithm

    k_scale, v_scale     of float8_e4m3fn caches: a float, or float32 () or (1,), or (num_heads_kv,): one for all KV
                         heads or one for each; of int8 caches: float32, shaped like the cache without head_dim

q, k, v and caches share one dtype (float32, bfloat16 or float16) and one device; num_heads is a multiple of
num_heads_kv. Both caches may hold 8-bit numbers instead, half the size of bfloat16: an element x then means x * scale.

- float8_e4m3fn: the scales are given and stay as they are, None is 1; see `kv_cache_scale`. On CUDA head_dim must be a
  multiple of 16.
- int8, on the CPU only: each slot and KV head has a scale, which appending writes beside the numbers: the largest
  magnitude of the row / 127. The number is x / scale, rounded to nearest even. A row of zeros has scale 0; one with a
  NaN or an infinity has scale NaN and numbers 0, so that it stays NaN for every query that sees it.

Operators that write take caches that are tensors of their own: none expanded, not one for both, and with torch.compile
before torch 2.13 no views of one tensor, whose copies inductor mixed up. They belong to no autograd graph.

Rows that see no key give out = 0 and lse = -inf. Work is that of causal attention: 4 * head_dim * num_heads FLOP per
visible key.

Errors common to all: ValueError for a shape, dtype, device, stride or number that cannot be, and, on the CPU or with
the environment variable DCA_CHECK=1, for values in length tensors, page tables and scale tensors; TypeError for an
argument of the wrong kind; RuntimeError for a device that this build has no kernels for. Nothing has been written when
they are raised. Backward raises NotImplementedError, and so do calls with tangents of forward-mode AD in grad mode.

Source: An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models" (arXiv 2402.17463), section 3.
`dca_ext.reference` holds the same functions in readable torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dca_ext.arguments import (
    require_bools,
    require_borders,
    require_config,
    require_int,
    require_no_grad_of_caches,
    require_no_tangents,
    require_number_or_none,
    require_pair,
    require_tensors,
    require_tensors_or_none,
    split_lengths,
    split_scales,
    split_written_scales,
)
from dca_ext.config import DCAConfig
from dca_ext.operators import call

SEGMENTS = ("intra", "successive", "inter")


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal self-attention over whole sequences; q and k come unrotated.

    Allocates one rotated copy of k besides out and lse.

    Args:
        q: (batch, seqlen, num_heads, head_dim).
        k: (batch, seqlen, num_heads_kv, head_dim).
        v: like k.
        rotary_cos: (>= max_position + 1, rotary_dim / 2), float32.
        rotary_sin: like rotary_cos.
        config: the chunk geometry.
        softmax_scale: factor on the logits; default 1 / sqrt(head_dim).
        temperature: (batch,), float32: one more factor per sequence, in place of ``config.temperature``.
        interleaved: rotary pairs are (2c, 2c + 1) instead of (c, c + rotary_dim / 2).
        return_lse: also return lse (batch, num_heads, seqlen).

    Returns:
        out, or (out, lse).
    """
    require_tensors(q=q, k=k, v=v)
    if q.dim() == 4 and k.dim() == 4 and k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"k must have q's batch size and length {tuple(q.shape[:2])}; got {tuple(k.shape[:2])}; for queries at the "
            "end of longer keys use dca_attention_with_kvcache"
        )
    k = rotate_keys(k, rotary_cos, rotary_sin, config, interleaved=interleaved)
    return _attention(
        q,
        k,
        v,
        rotary_cos,
        rotary_sin,
        config,
        cache_seqlens=k.shape[1],
        softmax_scale=softmax_scale,
        temperature=temperature,
        interleaved=interleaved,
        return_lse=return_lse,
    )


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
) -> Tensor | tuple[Tensor, Tensor]:
    """`dca_attention` over ragged sequences, one behind the other.

    Args:
        q: (total, num_heads, head_dim).
        k: (total, num_heads_kv, head_dim).
        v: like k.
        cu_seqlens_q: (batch + 1,), int32, on q's device: sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        max_seqlen_q: at least the longest sequence.
        rotary_cos: (>= max_position + 1, rotary_dim / 2), float32.
        rotary_sin: like rotary_cos.
        config: the chunk geometry.
        softmax_scale: factor on the logits; default 1 / sqrt(head_dim).
        temperature: (batch,), float32: one more factor per sequence, in place of ``config.temperature``.
        interleaved: rotary pairs are (2c, 2c + 1) instead of (c, c + rotary_dim / 2).
        return_lse: also return lse (num_heads, total).

    Returns:
        out, or (out, lse).
    """
    require_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    require_no_tangents(k)
    require_int("max_seqlen_q", max_seqlen_q)
    require_config(config)
    require_bools(interleaved=interleaved)
    if q.dim() == 3 and k.dim() == 3 and k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have as many rows as q ({q.shape[0]}); got {k.shape[0]}")
    k = call(
        torch.ops.dca_ext.rotate_keys,
        k,
        rotary_cos,
        rotary_sin,
        config.chunk_len,
        config.max_position,
        cu_seqlens_q,
        max_seqlen_q,
        None,
        0,
        None,
        interleaved,
    )
    return _attention(
        q,
        k,
        v,
        rotary_cos,
        rotary_sin,
        config,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        keys_are_ragged=True,
        softmax_scale=softmax_scale,
        temperature=temperature,
        interleaved=interleaved,
        return_lse=return_lse,
    )


def rotate_keys(
    k: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    config: DCAConfig,
    *,
    cache_seqlens: int | Tensor = 0,
    cache_leftpad: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """k (batch, seqlen, num_heads_kv, head_dim) rotated at (position mod chunk_len), for caches that others own.

    Args:
        k: (batch, seqlen, num_heads_kv, head_dim).
        rotary_cos: (>= max_position + 1, rotary_dim / 2), float32.
        rotary_sin: like rotary_cos.
        config: the chunk geometry.
        cache_seqlens: slots cached before these keys, left padding included: an int, or int32 (batch,).
        cache_leftpad: (batch,), int32: unused slots in front of each sequence. Keys in front of position 0 are copied.
        interleaved: rotary pairs are (2c, 2c + 1) instead of (c, c + rotary_dim / 2).

    Returns:
        Contiguous, like k: rotation in float32, one rounding to k's dtype.
    """
    require_tensors(k=k, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    require_no_tangents(k)
    require_tensors_or_none(cache_leftpad=cache_leftpad)
    require_config(config)
    require_bools(interleaved=interleaved)
    lengths, length = split_lengths(cache_seqlens)
    return call(
        torch.ops.dca_ext.rotate_keys,
        k,
        rotary_cos,
        rotary_sin,
        config.chunk_len,
        config.max_position,
        None,
        0,
        lengths,
        length,
        cache_leftpad,
        interleaved,
    )


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
) -> None:
    """Writes k, rotated at (position mod chunk_len), and v into the caches, in one pass.

    Args:
        k: new keys (batch, seqlen, num_heads_kv, head_dim), or ragged (total, num_heads_kv, head_dim).
        v: like k.
        k_cache: (batch, slots, num_heads_kv, head_dim), or pages (num_pages, page_size, num_heads_kv, head_dim).
            Mutated.
        v_cache: like k_cache. Mutated.
        rotary_cos: (>= max_position + 1, rotary_dim / 2), float32.
        rotary_sin: like rotary_cos.
        config: the chunk geometry.
        cache_seqlens: slots in use before the call, left padding included: an int, or int32 (batch,). Row r of
            sequence b goes to slot cache_seqlens[b] + r.
        cache_leftpad: (batch,), int32: unused slots in front of each sequence.
        page_table: (batch, max_pages), int32: slot s lies in page page_table[b, s // page_size] at s % page_size.
        cu_seqlens_q: (batch + 1,), int32: borders of ragged k and v.
        max_seqlen_q: with cu_seqlens_q: at least the longest sequence.
        k_scale: of a float8_e4m3fn k_cache: a float, or float32 (), (1,) or (num_heads_kv,). What is written is the
            rotated key / k_scale, rounded once to nearest even; beyond +-448 it becomes +-448, and NaN stays NaN.
            Of an int8 k_cache: float32, shaped like it without head_dim, any strides. Mutated: the new rows' scales.
        v_scale: of a float8_e4m3fn or int8 v_cache, likewise.
        interleaved: rotary pairs are (2c, 2c + 1) instead of (c, c + rotary_dim / 2).

    Raises:
        ValueError: among others, for scales with caches of other dtypes, for scales of a float8_e4m3fn cache that are
            not finite and above 0, and for an int8 cache without scales.
        NotImplementedError: if k, v or a cache requires grad and grad mode is on: no gradient flows into a cache.
    """
    require_tensors(k=k, v=v, k_cache=k_cache, v_cache=v_cache, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    require_tensors_or_none(cache_leftpad=cache_leftpad, page_table=page_table)
    require_config(config)
    require_borders(cu_seqlens_q, max_seqlen_q)
    require_bools(interleaved=interleaved)
    require_no_tangents(k, v)
    require_no_grad_of_caches(k_cache, v_cache)
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise NotImplementedError(
            "dca_ext::rotate_and_append_kv has no backward; run it under torch.no_grad() or detach k and v"
        )
    lengths, length = split_lengths(cache_seqlens)
    call(
        torch.ops.dca_ext.rotate_and_append_kv,
        k,
        v,
        k_cache,
        v_cache,
        rotary_cos,
        rotary_sin,
        config.chunk_len,
        config.max_position,
        cu_seqlens_q,
        max_seqlen_q or 0,
        lengths,
        length,
        cache_leftpad,
        page_table,
        *split_written_scales(k_scale, v_scale, k_cache, v_cache),
        interleaved,
    )


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over cached, rotated keys; the last query of a sequence is its last cached token.

    Any number of query rows: decode, multi-token verification, chunked prefill, several turns, and, with ragged q,
    prefill and decode in one batch. With k and v it first does what `rotate_and_append_kv` does, in one operator, so
    that what the attention refuses leaves the caches as they were.

    Args:
        q: unrotated (batch, seqlen_q, num_heads, head_dim), or ragged (total_q, num_heads, head_dim).
        k_cache: (batch, slots, num_heads_kv, head_dim), or pages (num_pages, page_size, num_heads_kv, head_dim).
        v_cache: like k_cache.
        rotary_cos: (>= max_position + 1, rotary_dim / 2), float32.
        rotary_sin: like rotary_cos.
        config: the chunk geometry.
        k: new keys, as many rows as q, unrotated: written to the caches (which are mutated) before attending.
        v: like k.
        cache_seqlens: slots in use, left padding included: an int, or int32 (batch,) on q's device. With k and v those
            before the call; without, all of them, these queries' included.
        cu_seqlens_q: (batch + 1,), int32: borders of ragged q (and k, v).
        max_seqlen_q: with cu_seqlens_q: at least the longest sequence.
        page_table: (batch, max_pages), int32: slot s lies in page page_table[b, s // page_size] at s % page_size.
        cache_leftpad: (batch,), int32: slots in front of each sequence that are not its tokens; slot s is position
            s - cache_leftpad[b].
        k_scale: of a float8_e4m3fn k_cache: a float, or float32 (), (1,) or (num_heads_kv,): a cached element x means
            x * k_scale. New keys are divided by it. Of an int8 k_cache: float32, shaped like it without head_dim, any
            strides: mutated where new keys are written.
        v_scale: of a float8_e4m3fn or int8 v_cache, likewise.
        softmax_scale: factor on the logits; default 1 / sqrt(head_dim).
        temperature: (batch,), float32: one more factor per sequence, in place of ``config.temperature``.
        num_splits: parts into which the keys of a query tile are split; 0 chooses. More parts fill more processors.
        interleaved: rotary pairs are (2c, 2c + 1) instead of (c, c + rotary_dim / 2).
        return_lse: also return lse.

    Returns:
        out, or (out, lse).
    """
    require_pair("k", k, "v", v)
    require_tensors_or_none(k=k, v=v)
    return _attention(
        q,
        k_cache,
        v_cache,
        rotary_cos,
        rotary_sin,
        config,
        appended=None if k is None or v is None else (k, v),
        cache_seqlens=cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        page_table=page_table,
        cache_leftpad=cache_leftpad,
        k_scale=k_scale,
        v_scale=v_scale,
        softmax_scale=softmax_scale,
        temperature=temperature,
        num_splits=num_splits,
        interleaved=interleaved,
        return_lse=return_lse,
    )


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
) -> tuple[Tensor, Tensor]:
    """One segment alone over cached, rotated keys -> (out, lse); nothing is appended.

    `merge_attention_states` of the three segments is `dca_attention_with_kvcache`. Arguments and shapes are as there.

    Args:
        q: unrotated (batch, seqlen_q, num_heads, head_dim), or ragged (total_q, num_heads, head_dim).
        k_cache: (batch, slots, num_heads_kv, head_dim), or pages (num_pages, page_size, num_heads_kv, head_dim).
        v_cache: like k_cache.
        rotary_cos: (>= max_position + 1, rotary_dim / 2), float32.
        rotary_sin: like rotary_cos.
        config: the chunk geometry.
        segment: "intra" (the query's own chunk), "successive" (the one before) or "inter" (all before that).
        cache_seqlens: slots in use, left padding and these queries included: an int, or int32 (batch,).
        cu_seqlens_q: (batch + 1,), int32: borders of ragged q.
        max_seqlen_q: with cu_seqlens_q: at least the longest sequence.
        page_table: (batch, max_pages), int32.
        cache_leftpad: (batch,), int32.
        k_scale: of a float8_e4m3fn k_cache: a float, or float32 (), (1,) or (num_heads_kv,). Of an int8 k_cache:
            float32, shaped like it without head_dim, any strides.
        v_scale: of a float8_e4m3fn or int8 v_cache, likewise.
        softmax_scale: factor on the logits; default 1 / sqrt(head_dim).
        temperature: (batch,), float32: one more factor per sequence, in place of ``config.temperature``.
        num_splits: parts into which the keys of a query tile are split; 0 chooses.
        interleaved: rotary pairs are (2c, 2c + 1) instead of (c, c + rotary_dim / 2).

    Returns:
        out and lse; rows that see no key of this segment give 0 and -inf.
    """
    if segment not in SEGMENTS:
        raise ValueError(f"segment must be one of {', '.join(SEGMENTS)}; got {segment!r}")
    result = _attention(
        q,
        k_cache,
        v_cache,
        rotary_cos,
        rotary_sin,
        config,
        segment=SEGMENTS.index(segment),
        cache_seqlens=cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        page_table=page_table,
        cache_leftpad=cache_leftpad,
        k_scale=k_scale,
        v_scale=v_scale,
        softmax_scale=softmax_scale,
        temperature=temperature,
        num_splits=num_splits,
        interleaved=interleaved,
        return_lse=True,
    )
    return result[0], result[1]


def merge_attention_states(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """The attention over the union of N disjoint key sets from the attention over each, with float32 weights.

    Args:
        outs: N equal shapes (batch, seqlen, num_heads, head_dim) or ragged (total, num_heads, head_dim), as a list or
            stacked in dimension 0.
        lses: N equal shapes (batch, num_heads, seqlen) or ragged (num_heads, total), float32.

    Returns:
        out in outs' dtype, and lse. Parts at -inf carry no weight; where all are, out is 0 and lse is -inf.
    """
    parts = [_parts("outs", outs), _parts("lses", lses)]
    if not parts[0] or len(parts[0]) != len(parts[1]):
        raise ValueError(
            f"outs and lses must have the same number of parts, at least one; got {len(parts[0])} and {len(parts[1])}"
        )
    for name, part in zip(("outs", "lses"), parts, strict=True):
        require_tensors(**{f"{name}[{i}]": t for i, t in enumerate(part)})
    require_no_tangents(*parts[0], *parts[1])
    return call(torch.ops.dca_ext.merge_attention_states, *parts)


# --- What they share --------------------------------------------------------------------------------------------------


def _parts(name: str, parts: Sequence[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(parts, list | tuple):
        return list(parts)
    if not isinstance(parts, Tensor):
        raise TypeError(f"{name} must be a list of tensors, or one stacked in dimension 0; got {type(parts).__name__}")
    if parts.dim() == 0:
        raise ValueError(f"{name} must be stacked in dimension 0, if it is one tensor; got shape ()")
    return list(parts.unbind(0))


class _NoBackward(torch.autograd.Function):
    """Identity on out and lse that ties them to what appending and attending took out of the graph."""

    @staticmethod
    def forward(ctx: object, out: Tensor, lse: Tensor, *sources: Tensor) -> tuple[Tensor, Tensor]:
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError("dca_ext::append_and_attend has no backward; run it under torch.no_grad()")


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    config: DCAConfig,
    *,
    appended: tuple[Tensor, Tensor] | None = None,
    segment: int = -1,
    cache_seqlens: int | Tensor = 0,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    keys_are_ragged: bool = False,
    page_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    softmax_scale: float | None = None,
    temperature: Tensor | None = None,
    num_splits: int = 0,
    interleaved: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The one call of the attention operators: all of the above differ only in what they fill in."""
    require_tensors(q=q, k_cache=k, v_cache=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    require_tensors_or_none(temperature=temperature, cache_leftpad=cache_leftpad, page_table=page_table)
    require_config(config)
    require_borders(cu_seqlens_q, max_seqlen_q)
    require_number_or_none("softmax_scale", softmax_scale)
    require_int("num_splits", num_splits)
    require_bools(interleaved=interleaved, return_lse=return_lse)
    require_no_tangents(q, k, v, temperature, *(appended or ()))
    geometry = (rotary_cos, rotary_sin, config.chunk_len, config.max_position)
    rows = (cu_seqlens_q, max_seqlen_q or 0)
    layout = (*split_lengths(cache_seqlens), cache_leftpad, page_table)
    yarn = temperature is None and config.temperature == "yarn"
    original = (config.original_max_position_embeddings or 0) if yarn else 0
    options = (softmax_scale, temperature, original, num_splits, interleaved, return_lse)
    if appended is None:
        key_rows = rows if keys_are_ragged else (None, 0)
        read = split_scales(k_scale, v_scale, k, v)
        out, lse = call(
            torch.ops.dca_ext.attention, q, k, v, *geometry, segment, *rows, *key_rows, *layout, *read, *options
        )
    else:
        require_no_grad_of_caches(k, v)
        written = split_written_scales(k_scale, v_scale, k, v)
        out, lse = _append_and_attend(q, *appended, k, v, *geometry, *rows, *layout, *written, *options)
    return (out, lse) if return_lse else out


def _append_and_attend(*arguments: object) -> tuple[Tensor, Tensor]:
    """Torch takes no autograd formula for an operator that mutates, so that its results are tied to its inputs here."""
    if not torch.is_grad_enabled():
        return call(torch.ops.dca_ext.append_and_attend, *arguments)
    differentiable = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    if not differentiable:
        return call(torch.ops.dca_ext.append_and_attend, *arguments)
    with torch.no_grad():
        out, lse = call(torch.ops.dca_ext.append_and_attend, *arguments)
    return _NoBackward.apply(out, lse, *differentiable)
