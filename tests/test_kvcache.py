"""Attention over caches: decode, several tokens at once, chunked prefill; contiguous, paged, left-padded, ragged."""

import math

import pytest
import torch
from oracle import (
    DTYPES,
    SMALL,
    Cache,
    assert_close,
    assert_lse_close,
    attend_in_low_precision,
    empty_cache,
    multiplies,
    ragged_borders,
    random_rows,
    tables,
)

from dca_ext import (
    DCAConfig,
    dca_attention,
    dca_attention_with_kvcache,
    reference,
    rotate_and_append_kv,
    rotate_keys,
)

N, P = SMALL.chunk_len, SMALL.max_position
HEADS, KV_HEADS, DIM = 6, 2, 32


def rows(batch, seqlen, dtype=torch.float32, heads=HEADS, heads_kv=KV_HEADS):
    q = random_rows(batch, seqlen, heads, DIM, dtype=dtype)
    return q, *(random_rows(batch, seqlen, heads_kv, DIM, dtype=dtype) for _ in range(2))


def fill(cache: Cache, k, v, cos, sin, **kwargs):
    """Writes whole sequences k, v (batch, seqlen, heads, dim) into an empty cache."""
    rotate_and_append_kv(k, v, cache.k, cache.v, cos, sin, SMALL, cache_seqlens=0, **cache.layout, **kwargs)


@pytest.mark.parametrize("page_size", [None, 1, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_rotated_keys_and_values_and_nothing_else(dtype, page_size):
    cos, sin = tables(SMALL, DIM)
    cache, expected = (empty_cache(2, 70, KV_HEADS, DIM, dtype, page_size=page_size) for _ in range(2))
    expected.page_table = cache.page_table
    lengths = torch.tensor([0, 31], dtype=torch.int32)
    _, k, v = rows(2, 13, dtype)
    for target, append in ((cache, rotate_and_append_kv), (expected, reference.rotate_and_append_kv)):
        append(k, v, target.k, target.v, cos, sin, SMALL, cache_seqlens=lengths, **target.layout)
    assert torch.equal(cache.v.isnan(), expected.v.isnan())
    assert torch.equal(cache.v.nan_to_num(), expected.v.nan_to_num())
    assert torch.equal(cache.k.isnan(), expected.k.isnan())
    # One rounding of a float32 rotation: at most an ulp from the rounding of the exact one.
    difference = (cache.k.double() - expected.k.double()).nan_to_num().abs()
    assert (difference <= 1.01 * torch.finfo(dtype).eps * expected.k.double().nan_to_num().abs() + 1e-6).all()
    assert not cache.k.isnan().all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate_keys_is_what_append_writes(interleaved):
    cos, sin = tables(SMALL, DIM)
    lengths, leftpad = torch.tensor([5, 39], dtype=torch.int32), torch.tensor([2, 7], dtype=torch.int32)
    cache = empty_cache(2, 90, KV_HEADS, DIM, torch.bfloat16)
    _, k, v = rows(2, 50, torch.bfloat16)
    where = dict(cache_seqlens=lengths, cache_leftpad=leftpad, interleaved=interleaved)
    rotate_and_append_kv(k, v, cache.k, cache.v, cos, sin, SMALL, **where)
    rotated = rotate_keys(k, cos, sin, SMALL, **where)
    for b, n in enumerate(lengths.tolist()):
        assert torch.equal(cache.k[b, n : n + 50], rotated[b])
    by_int = rotate_keys(k[:1], cos, sin, SMALL, cache_seqlens=5, cache_leftpad=leftpad[:1], interleaved=interleaved)
    assert torch.equal(by_int, rotated[:1])
    twin = empty_cache(2, 90, KV_HEADS, DIM, torch.bfloat16)
    reference.rotate_and_append_kv(k, v, twin.k, twin.v, cos, sin, SMALL, **where)
    torch.testing.assert_close(cache.k, twin.k, rtol=1e-2, atol=1e-2, equal_nan=True)
    torch.testing.assert_close(cache.v, twin.v, rtol=0, atol=0, equal_nan=True)


def test_keys_in_front_of_the_first_position_are_copied():
    cos, sin = tables(SMALL, DIM)
    _, k, _ = rows(2, 20)
    leftpad = torch.tensor([3, 11], dtype=torch.int32)
    rotated = rotate_keys(k, cos, sin, SMALL, cache_leftpad=leftpad)
    for b, pad in enumerate(leftpad.tolist()):
        assert torch.equal(rotated[b, : pad + 1], k[b, : pad + 1])  # position 0 turns by nothing as well
        assert not torch.equal(rotated[b, pad + 1], k[b, pad + 1])
    torch.testing.assert_close(rotated, reference.rotate_keys(k, cos, sin, SMALL, cache_leftpad=leftpad))


@pytest.mark.parametrize("seqlen", [1, N - 1, N, N + 1, 2 * N - 1, 2 * N, 2 * N + 1, P + 1, P + 2, 3 * N + 5])
@pytest.mark.parametrize("step", [1, 3, 17])
def test_prefill_equals_any_split_into_chunks(seqlen, step):
    cos, sin = tables(SMALL, DIM)
    q, k, v = rows(2, seqlen)
    whole = dca_attention(q, k, v, cos, sin, SMALL)
    cache = empty_cache(2, seqlen + 3, KV_HEADS, DIM, torch.float32)
    parts = []
    for begin in range(0, seqlen, step):
        part = slice(begin, begin + step)
        parts.append(
            dca_attention_with_kvcache(
                q[:, part], cache.k, cache.v, cos, sin, SMALL, k=k[:, part], v=v[:, part], cache_seqlens=begin
            )
        )
    assert_close(torch.cat(parts, dim=1), whole.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 2, 5, 16, 45, 130])
@pytest.mark.parametrize("page_size", [None, 1, 16, 33])
def test_against_the_oracle(seqlen_q, dtype, page_size):
    """From the cache's own rounded keys; every sequence with its own length and left padding."""
    cos, sin = tables(SMALL, DIM)
    total, leftpad = torch.tensor([130, 203, 141], dtype=torch.int32), torch.tensor([0, 9, 3], dtype=torch.int32)
    cache = empty_cache(3, 210, KV_HEADS, DIM, dtype, page_size=page_size)
    q = random_rows(3, seqlen_q, HEADS, DIM, dtype=dtype)
    _, k, v = rows(3, 203, dtype)
    for b, n in enumerate(total.tolist()):  # left padding and everything behind the last token stays NaN
        pad = int(leftpad[b])
        one = (
            Cache(cache.k, cache.v, cache.page_table[b : b + 1])
            if page_size
            else Cache(cache.k[b : b + 1], cache.v[b : b + 1])
        )
        rotate_and_append_kv(
            k[b : b + 1, : n - pad], v[b : b + 1, : n - pad], one.k, one.v, cos, sin, SMALL,
            cache_seqlens=pad, cache_leftpad=leftpad[b : b + 1], **one.layout,
        )  # fmt: skip
    out, lse = dca_attention_with_kvcache(
        q,
        cache.k,
        cache.v,
        cos,
        sin,
        SMALL,
        cache_seqlens=total,
        cache_leftpad=leftpad,
        return_lse=True,
        **cache.layout,
    )
    expected, expected_lse = reference.dca_attention_with_kvcache(
        q, cache.k, cache.v, cos, sin, SMALL, cache_seqlens=total, cache_leftpad=leftpad, return_lse=True,
        out_dtype=torch.float64, **cache.layout,
    )  # fmt: skip
    baseline = torch.zeros_like(out)
    for b, n in enumerate((total - leftpad).tolist()):
        rotated = rotate_keys(k[b : b + 1, :n], cos, sin, SMALL)[0]
        positions = torch.arange(n - seqlen_q, n)
        baseline[b] = attend_in_low_precision(q[b], rotated, v[b, :n], positions, cos, sin, SMALL, 1 / math.sqrt(DIM))
    assert_close(out, expected, baseline)
    # The keys are the cache's own: only queries may still be rounded, where the machine multiplies bfloat16.
    assert_lse_close(lse, expected_lse, dtype=dtype if multiplies(dtype) else torch.float32)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 256])
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_the_number_of_splits_does_not_matter(num_splits, seqlen_q):
    cos, sin = tables(SMALL, DIM)
    q, k, v = rows(2, 300)
    cache = empty_cache(2, 300, KV_HEADS, DIM, torch.float32)
    fill(cache, k, v, cos, sin)
    out, lse = dca_attention_with_kvcache(
        q[:, -seqlen_q:], cache.k, cache.v, cos, sin, SMALL, cache_seqlens=300, num_splits=num_splits, return_lse=True
    )
    expected, expected_lse = reference.dca_attention_with_kvcache(
        q[:, -seqlen_q:], cache.k, cache.v, cos, sin, SMALL, cache_seqlens=300, return_lse=True, out_dtype=torch.float64
    )
    assert_close(out, expected)
    assert_lse_close(lse, expected_lse)


def test_rows_without_keys_and_left_padding_give_zero_and_minus_infinity():
    """Queries that reach into the left padding, a sequence without tokens, and one that is all padding."""
    cos, sin = tables(SMALL, DIM)
    cache = empty_cache(3, 20, KV_HEADS, DIM, torch.float32)
    _, k, v = rows(1, 4)
    leftpad = torch.tensor([6, 0, 8], dtype=torch.int32)
    rotate_and_append_kv(k, v, cache.k[:1], cache.v[:1], cos, sin, SMALL, cache_seqlens=6, cache_leftpad=leftpad[:1])
    q = random_rows(3, 7, HEADS, DIM)
    out, lse = dca_attention_with_kvcache(
        q, cache.k, cache.v, cos, sin, SMALL, cache_seqlens=torch.tensor([10, 0, 8], dtype=torch.int32),
        cache_leftpad=leftpad, return_lse=True,
    )  # fmt: skip
    assert (out[0, :3] == 0).all()
    assert lse[0, :, :3].isneginf().all()
    assert (out[1:] == 0).all()
    assert lse[1:].isneginf().all()
    alone = dca_attention_with_kvcache(q[:1, 3:], cache.k[:1, 6:], cache.v[:1, 6:], cos, sin, SMALL, cache_seqlens=4)
    torch.testing.assert_close(out[:1, 3:], alone)


def test_a_left_padded_batch_equals_single_sequences():
    cos, sin = tables(SMALL, DIM)
    lengths = [1, N, 2 * N + 1, 95]
    width = max(lengths)
    q, k, v = rows(4, width)
    leftpad = torch.tensor([width - n for n in lengths], dtype=torch.int32)
    cache = empty_cache(4, width + 4, KV_HEADS, DIM, torch.float32)
    out = dca_attention_with_kvcache(
        q, cache.k, cache.v, cos, sin, SMALL, k=k, v=v, cache_seqlens=0, cache_leftpad=leftpad
    )
    for b, n in enumerate(lengths):
        alone = dca_attention(*(x[b : b + 1, width - n :] for x in (q, k, v)), cos, sin, SMALL)
        assert_close(out[b : b + 1, width - n :], alone.double())
        assert (out[b, : width - n] == 0).all()


def test_ragged_queries_mix_prefill_and_decode_in_one_batch():
    cos, sin = tables(SMALL, DIM)
    new, before = [60, 1, 0, 5, 1], torch.tensor([0, 120, 33, 41, 0], dtype=torch.int32)
    cu_seqlens = ragged_borders(*new)
    cache = empty_cache(5, 140, KV_HEADS, DIM, torch.float32, page_size=16)
    twin = empty_cache(5, 140, KV_HEADS, DIM, torch.float32)
    for b, n in enumerate(before.tolist()):
        _, k, v = rows(1, n)
        for target, view in (
            (cache, Cache(cache.k, cache.v, cache.page_table[b : b + 1])),
            (twin, Cache(twin.k[b : b + 1], twin.v[b : b + 1])),
        ):
            assert target is not None
            fill(view, k, v, cos, sin)
    q, k, v = (x[0] for x in rows(1, sum(new)))
    exact = Cache(cache.k.clone(), cache.v.clone(), cache.page_table)
    where = dict(k=k, v=v, cache_seqlens=before, cu_seqlens_q=cu_seqlens, max_seqlen_q=60, return_lse=True)
    out, lse = dca_attention_with_kvcache(q, cache.k, cache.v, cos, sin, SMALL, **where, **cache.layout)
    expected, expected_lse = reference.dca_attention_with_kvcache(
        q, exact.k, exact.v, cos, sin, SMALL, **where, **exact.layout, out_dtype=torch.float64
    )
    assert_close(out, expected)
    assert_lse_close(lse, expected_lse)
    assert lse.shape == (HEADS, sum(new))
    for b, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        one = slice(begin, end)
        alone, alone_lse = dca_attention_with_kvcache(
            q[None, one], twin.k[b : b + 1], twin.v[b : b + 1], cos, sin, SMALL, k=k[None, one], v=v[None, one],
            cache_seqlens=before[b : b + 1], return_lse=True,
        )  # fmt: skip
        torch.testing.assert_close(out[one], alone[0])
        torch.testing.assert_close(lse[:, one], alone_lse[0])


def test_pages_may_be_shared():
    """A prefix cached once serves two sequences that continue differently."""
    cos, sin = tables(SMALL, DIM)
    prefix, page_size = 96, 16
    cache = empty_cache(1, 160, KV_HEADS, DIM, torch.float32, page_size=page_size)
    _, k, v = rows(1, prefix)
    fill(cache, k, v, cos, sin)
    table = cache.page_table.expand(2, -1).clone()
    used = set(cache.page_table[0, : prefix // page_size].tolist())
    table[1, prefix // page_size] = next(
        p for p in range(cache.k.shape[0]) if p not in set(cache.page_table[0].tolist())
    )
    assert table[1, prefix // page_size].item() not in used
    q, k_new, v_new = rows(2, 3)
    out = dca_attention_with_kvcache(
        q, cache.k, cache.v, cos, sin, SMALL, k=k_new, v=v_new, cache_seqlens=prefix, page_table=table
    )
    for b in range(2):
        whole = dca_attention(
            torch.cat([torch.zeros(1, prefix, HEADS, DIM), q[b : b + 1]], 1),
            torch.cat([k, k_new[b : b + 1]], 1),
            torch.cat([v, v_new[b : b + 1]], 1),
            cos, sin, SMALL,
        )  # fmt: skip
        assert_close(out[b : b + 1], whole[:, prefix:].double())


@pytest.mark.parametrize("layout", ["heads_first", "sliced"])
def test_caches_may_have_any_strides(layout):
    """The layout of transformers' caches, (batch, heads, slots, dim), and a slice of a larger buffer."""
    cos, sin = tables(SMALL, DIM)
    q, k, v = rows(2, 100)
    if layout == "heads_first":
        k_cache, v_cache = (torch.full((2, KV_HEADS, 110, DIM), math.nan).transpose(1, 2) for _ in range(2))
    else:
        k_cache, v_cache = (torch.full((2, 220, KV_HEADS + 1, 2 * DIM), math.nan)[:, ::2, 1:, DIM:] for _ in range(2))
    out = dca_attention_with_kvcache(q, k_cache, v_cache, cos, sin, SMALL, k=k, v=v, cache_seqlens=0)
    assert_close(out, dca_attention(q, k, v, cos, sin, SMALL).double())


def test_keys_in_the_cache_do_not_depend_on_temperature():
    config = DCAConfig(N, P, "yarn", 10)
    cos, sin = tables(SMALL, DIM)
    q, k, v = rows(1, 100)
    caches = []
    for c in (config, SMALL):
        cache = empty_cache(1, 100, KV_HEADS, DIM, torch.float32)
        dca_attention_with_kvcache(q, cache.k, cache.v, cos, sin, c, k=k, v=v, cache_seqlens=0)
        caches.append(cache.k)
    assert torch.equal(*caches)


def test_yarn_counts_the_keys_of_each_sequence():
    """More than the pretraining length, fewer, more with padding but fewer without, and none."""
    config = DCAConfig(N, P, "yarn", 90)
    cos, sin = tables(SMALL, DIM)
    cache = empty_cache(4, 130, KV_HEADS, DIM, torch.float32)
    q, k, v = rows(4, 120)
    fill(cache, k, v, cos, sin)
    lengths, leftpad = (torch.tensor(x, dtype=torch.int32) for x in ([120, 30, 120, 0], [0, 0, 40, 0]))
    where = dict(cache_seqlens=lengths, cache_leftpad=leftpad, return_lse=True)
    out, lse = dca_attention_with_kvcache(q[:, :5], cache.k, cache.v, cos, sin, config, **where)
    expected, expected_lse = reference.dca_attention_with_kvcache(
        q[:, :5], cache.k, cache.v, cos, sin, config, out_dtype=torch.float64, **where
    )
    assert_close(out, expected)
    assert_lse_close(lse, expected_lse)


def test_prefill_equals_decode_with_a_passed_temperature():
    cos, sin = tables(SMALL, DIM)
    q, k, v = rows(1, 60)
    temperature = torch.tensor([1.37])
    whole = dca_attention(q, k, v, cos, sin, SMALL, temperature=temperature)
    cache = empty_cache(1, 60, KV_HEADS, DIM, torch.float32)
    steps = [
        dca_attention_with_kvcache(
            q[:, i : i + 1], cache.k, cache.v, cos, sin, SMALL, k=k[:, i : i + 1], v=v[:, i : i + 1], cache_seqlens=i,
            temperature=temperature,
        )
        for i in range(60)
    ]  # fmt: skip
    assert_close(torch.cat(steps, 1), whole.double())


def test_lengths_as_int_and_as_tensor_agree():
    cos, sin = tables(SMALL, DIM)
    q, k, v = rows(2, 77)
    cache = empty_cache(2, 100, KV_HEADS, DIM, torch.float32)
    fill(cache, k, v, cos, sin)
    by_tensor = dca_attention_with_kvcache(
        q[:, -1:], cache.k, cache.v, cos, sin, SMALL, cache_seqlens=torch.full((2,), 77, dtype=torch.int32)
    )
    assert torch.equal(
        by_tensor, dca_attention_with_kvcache(q[:, -1:], cache.k, cache.v, cos, sin, SMALL, cache_seqlens=77)
    )
