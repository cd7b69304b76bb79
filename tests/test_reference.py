"""The specification itself: against the paper's figure, against plain causal attention, and against a scalar loop."""

import cmath
import math

import pytest
import torch
from oracle import FIGURE_2, tables

from dca_ext import DCAConfig, _core, reference


def distances(config, seqlen):
    """Relative rotary position of every pair, (seqlen, seqlen); -1 where the key is not seen."""
    i = torch.arange(seqlen)
    result = torch.full((seqlen, seqlen), -1)
    for segment in reference.SEGMENTS:
        seen = reference.segment_mask(i, i, segment, config)
        relative = reference.query_position(i, segment, config)[:, None] - reference.key_position(i, config)
        result = torch.where(seen, relative, result)
    return result


def test_paper_figure_2():
    d = distances(FIGURE_2, 12)
    assert d[7, :8].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert d[11].tolist() == [9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0]


def test_inter_segment_row():
    d = distances(DCAConfig(4, 6), 14)
    assert d[13].tolist() == [6, 5, 4, 3, 6, 5, 4, 3, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(("n", "p"), [(1, 1), (2, 3), (4, 4), (5, 7), (6, 9), (7, 13)])
def test_every_key_is_seen_once_and_no_distance_exceeds_max_position(n, p):
    d = distances(DCAConfig(n, p), 5 * n + 3)
    causal = torch.ones_like(d).tril().bool()
    assert torch.equal(d >= 0, causal)
    assert d.max() <= p
    exact = torch.arange(len(d))[:, None] - torch.arange(len(d))
    assert torch.equal(d[: p + 1], torch.where(causal, exact, -1)[: p + 1])  # plain causal up to row P
    assert not torch.equal(d[p + 1], torch.where(causal, exact, -1)[p + 1])  # and not beyond


@pytest.mark.parametrize(("n", "p"), [(1, 1), (4, 4), (5, 7), (6, 9)])
def test_the_kernels_geometry_is_the_specifications(n, p):
    geometry, config = _core.ChunkGeometry(n, p), DCAConfig(n, p)
    i = torch.arange(4 * n + 2)
    assert [geometry.key_position(j) for j in i.tolist()] == reference.key_position(i, config).tolist()
    for segment in reference.SEGMENTS:
        positions = [geometry.query_position(x, segment) for x in i.tolist()]
        assert positions == reference.query_position(i, segment, config).tolist()
        seen = reference.segment_mask(i, i, segment, config)
        for row in i.tolist():
            assert [geometry.segment_of(row, j) == segment for j in range(row + 1)] == seen[row, : row + 1].tolist()
    for row in i.tolist():
        walked = [j for _, begin, end in geometry.walk(row, row + 1) for j in range(begin, end)]
        assert sorted(walked) == list(range(row + 1))


def test_against_a_scalar_loop_over_complex_numbers():
    """Every pair by itself, in Python floats: rotation is multiplication by e^(i p theta)."""
    config, heads, dim = DCAConfig(5, 7), 2, 4
    seqlen = 19
    cos, sin = tables(config, dim)
    q, k, v = (torch.randn(1, seqlen, heads, dim, dtype=torch.float64) for _ in range(3))
    out, lse = reference.dca_attention(q, k, v, cos, sin, config, return_lse=True)

    def turned(x, position):
        pairs = [complex(x[c], x[c + 2]) for c in range(2)]
        return [z * complex(cos[position, c], sin[position, c]) for c, z in enumerate(pairs)]

    for h in range(heads):
        for i in range(seqlen):
            logits = []
            for j in range(i + 1):
                apart = i // 5 - j // 5
                position = i % 5 if apart == 0 else min(i % 5 + 5, 7) if apart == 1 else 7
                a, b = turned(q[0, i, h].tolist(), position), turned(k[0, j, h].tolist(), j % 5)
                logits.append(sum((x * y.conjugate()).real for x, y in zip(a, b, strict=True)) / math.sqrt(dim))
            total = sum(cmath.exp(x).real for x in logits)
            assert lse[0, h, i].item() == pytest.approx(math.log(total), abs=1e-6)
            for c in range(dim):
                expected = sum(math.exp(x) * v[0, j, h, c].item() for j, x in enumerate(logits)) / total
                assert out[0, i, h, c].item() == pytest.approx(expected, abs=1e-9)


def test_equals_torch_sdpa_while_the_sequence_is_short():
    config = DCAConfig(16, 24)
    seqlen = config.max_position + 1
    cos, sin = tables(config, 8)
    q = torch.randn(2, seqlen, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(2, seqlen, 2, 8, dtype=torch.float64) for _ in range(2))
    positions = torch.arange(seqlen)
    plain_q, plain_k = (torch.stack([reference.rope(x, positions, cos, sin) for x in t]) for t in (q, k))
    expected = torch.nn.functional.scaled_dot_product_attention(
        plain_q.transpose(1, 2), plain_k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(reference.dca_attention(q, k, v, cos, sin, config), expected)


def test_interleaved_pairs_are_a_permutation_of_halves():
    cos, sin = tables(SMALLEST, 6)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    positions = torch.tensor([0, 1, 3])
    order = [0, 3, 1, 4, 2, 5, 6, 7]  # channel pairs (c, c + 3) side by side; 6 and 7 pass through
    interleaved = reference.rope(x[..., order], positions, cos, sin, interleaved=True)
    torch.testing.assert_close(interleaved, reference.rope(x, positions, cos, sin)[..., order])


def test_blocks_of_rows_without_keys_are_zero():
    cos, sin = tables(FIGURE_2, 4)
    q, k = torch.randn(300, 1, 4), torch.randn(3, 1, 4)
    out, lse = reference.attend(q, k, k, torch.arange(-297, 3), cos, sin, FIGURE_2, 1.0)
    assert (out[:297] == 0).all()
    assert lse[:, :297].isneginf().all()
    assert lse[:, 297:].isfinite().all()


SMALLEST = DCAConfig(2, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_reach_the_rows_that_see_them_and_no_others(value):
    q, k, v = torch.randn(1, 20, 4, 8), torch.randn(1, 20, 2, 8), torch.randn(1, 20, 2, 8)
    cos, sin = tables(FIGURE_2, 8)
    expected = reference.dca_attention(q, k, v, cos, sin, FIGURE_2)
    expected[0, 13:, 2:, 5] = value  # query heads 2 and 3 belong to KV head 1
    v[0, 13, 1, 5] = value
    out = reference.dca_attention(q, k, v, cos, sin, FIGURE_2)
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_outputs_have_the_dtype_asked_for():
    q, k, v = (torch.randn(1, 9, heads, 8).bfloat16() for heads in (4, 2, 2))
    cos, sin = tables(FIGURE_2, 8)
    rotated, borders = reference.rotate_keys(k, cos, sin, FIGURE_2), torch.tensor([0, 4, 9])
    for asked, expected in ((None, torch.bfloat16), (torch.float64, torch.float64)):
        for out in (
            reference.dca_attention(q, k, v, cos, sin, FIGURE_2, out_dtype=asked),
            reference.dca_attention_varlen(q[0], k[0], v[0], borders, 5, cos, sin, FIGURE_2, out_dtype=asked),
            reference.dca_attention_with_kvcache(q, rotated, v, cos, sin, FIGURE_2, cache_seqlens=9, out_dtype=asked),
        ):
            assert out.dtype == expected
