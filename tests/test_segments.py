"""The three segments alone, and the merged softmax that joins them."""

import math

import pytest
import torch
from oracle import DTYPES, SMALL, assert_close, assert_lse_close, empty_cache, ragged_borders, random_rows, tables

from dca_ext import (
    dca_attention_with_kvcache,
    dca_segment_attention,
    merge_attention_states,
    reference,
    rotate_and_append_kv,
)

SEGMENTS = ("intra", "successive", "inter")
HEADS, KV_HEADS, DIM, SEQLEN = 4, 2, 32, 211


@pytest.fixture
def filled():
    cos, sin = tables(SMALL, DIM)
    cache = empty_cache(2, 220, KV_HEADS, DIM, torch.float32)
    k, v = (random_rows(2, SEQLEN, KV_HEADS, DIM) for _ in range(2))
    rotate_and_append_kv(k, v, cache.k, cache.v, cos, sin, SMALL, cache_seqlens=0)
    return random_rows(2, SEQLEN, HEADS, DIM), cache, cos, sin


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("seqlen_q", [1, 30, SEQLEN])
def test_each_segment_against_the_oracle(filled, segment, seqlen_q):
    q, cache, cos, sin = filled
    arguments = (q[:, -seqlen_q:], cache.k, cache.v, cos, sin, SMALL)
    out, lse = dca_segment_attention(*arguments, segment=segment, cache_seqlens=SEQLEN)
    expected, expected_lse = reference.dca_segment_attention(
        *arguments, segment=segment, cache_seqlens=SEQLEN, out_dtype=torch.float64
    )
    assert_close(out, expected)
    assert_lse_close(lse, expected_lse)
    if seqlen_q == SEQLEN:
        without_keys = {"intra": 0, "successive": SMALL.chunk_len, "inter": 2 * SMALL.chunk_len}[segment]
        assert int(lse.isneginf()[0, 0].sum()) == without_keys


@pytest.mark.parametrize("segment", SEGMENTS)
def test_segments_take_what_the_whole_takes(segment):
    """Ragged queries over pages with left padding, a scale, temperatures and interleaved pairs, all at once."""
    cos, sin = tables(SMALL, DIM)
    cache = empty_cache(2, SEQLEN + 9, KV_HEADS, DIM, torch.float32, page_size=16)
    k, v = (random_rows(2, SEQLEN, KV_HEADS, DIM) for _ in range(2))
    options = dict(page_table=cache.page_table, cache_leftpad=torch.tensor([7, 0], dtype=torch.int32), interleaved=True)
    rotate_and_append_kv(k, v, cache.k, cache.v, cos, sin, SMALL, cache_seqlens=0, **options)
    options |= dict(cu_seqlens_q=ragged_borders(30, 4), max_seqlen_q=30)
    options |= dict(softmax_scale=0.4, temperature=torch.tensor([0.7, 1.3]))
    arguments = (random_rows(34, HEADS, DIM), cache.k, cache.v, cos, sin, SMALL)
    out, lse = dca_segment_attention(*arguments, segment=segment, cache_seqlens=SEQLEN, **options)
    expected, expected_lse = reference.dca_segment_attention(
        *arguments, segment=segment, cache_seqlens=SEQLEN, out_dtype=torch.float64, **options
    )
    assert_close(out, expected)
    assert_lse_close(lse, expected_lse)
    with pytest.raises(ValueError, match="num_splits must be between 0"):
        dca_segment_attention(*arguments, segment=segment, cache_seqlens=SEQLEN, num_splits=-1, **options)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_the_merge_of_the_segments_is_the_whole(filled, num_splits):
    q, cache, cos, sin = filled
    arguments = (q, cache.k, cache.v, cos, sin, SMALL)
    parts = [
        dca_segment_attention(*arguments, segment=s, cache_seqlens=SEQLEN, num_splits=num_splits) for s in SEGMENTS
    ]
    out, lse = merge_attention_states([p[0] for p in parts], [p[1] for p in parts])
    whole, whole_lse = dca_attention_with_kvcache(*arguments, cache_seqlens=SEQLEN, return_lse=True)
    assert_close(out, whole.double())
    assert_lse_close(lse, whole_lse.double())
    two_of_three, _ = merge_attention_states([p[0] for p in parts[:2]], [p[1] for p in parts[:2]])
    assert (two_of_three - whole).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (7, 3, 16)], ids=["uniform", "ragged"])
@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_merge_against_the_oracle(dtype, shape, num_parts):
    outs = torch.randn(num_parts, *shape).to(dtype)
    lses = 4 * torch.randn(num_parts, *shape[:-3], shape[-2], shape[-3])
    lses[0, ..., 0] = -math.inf  # a part without keys, whose out must not matter
    outs[0].select(-3, 0).fill_(math.nan)
    out, lse = merge_attention_states(outs, lses)
    expected, expected_lse = reference.merge_attention_states(outs.double(), lses)
    assert out.dtype == dtype
    # float32 weights and sums, one rounding: the float64 result to half an ulp and a little.
    torch.testing.assert_close(out.double(), expected, rtol=0.51 * torch.finfo(dtype).eps + 2e-6, atol=2e-6)
    torch.testing.assert_close(lse, expected_lse)
    listed = merge_attention_states(list(outs), list(lses))
    assert torch.equal(out, listed[0])
    assert torch.equal(lse, listed[1])


def test_merge_of_nothing_but_empty_parts_is_zero():
    out, lse = merge_attention_states(torch.full((2, 1, 3, 2, 8), math.nan), torch.full((2, 1, 2, 3), -math.inf))
    assert (out == 0).all()
    assert lse.isneginf().all()


def test_merge_weights_are_not_rounded_to_bfloat16():
    """Equal parts of ones: rounded weights would miss 1 by up to 0.3 %."""
    lses = torch.tensor([0.0, -0.4, -1.1, -2.3]).reshape(4, 1, 1, 1)
    out, _ = merge_attention_states(torch.ones(4, 1, 1, 1, 8, dtype=torch.bfloat16), lses)
    assert (out == 1).all()


def test_merge_accepts_parts_with_any_strides():
    outs, lses = torch.randn(3, 2, 6, 4, 8), torch.randn(3, 2, 4, 6)
    expected = merge_attention_states(outs, lses)
    strided = merge_attention_states(
        [o.transpose(0, 1).contiguous().transpose(0, 1) for o in outs], [x.mT.contiguous().mT for x in lses]
    )
    assert torch.equal(strided[0], expected[0])
    assert torch.equal(strided[1], expected[1])
