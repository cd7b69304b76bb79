"""dca_attention and dca_attention_varlen against the oracle."""

import math

import pytest
import torch
from oracle import (
    DTYPES,
    FIGURE_2,
    SMALL,
    assert_close,
    assert_lse_close,
    baseline_attention,
    ragged_borders,
    random_rows,
    tables,
)

from dca_ext import DCAConfig, dca_attention, dca_attention_varlen, reference

N, P = SMALL.chunk_len, SMALL.max_position
BORDERS = [1, 2, N - 1, N, N + 1, P + 1, P + 2, 2 * N - 1, 2 * N, 2 * N + 1, 3 * N, 127, 128, 129, 211]


def run_and_compare(config, batch, seqlen, heads, heads_kv, dim, dtype, rotary_dim=None, **kwargs):
    cos, sin = tables(config, rotary_dim or dim)
    q = random_rows(batch, seqlen, heads, dim, dtype=dtype)
    k, v = (random_rows(batch, seqlen, heads_kv, dim, dtype=dtype) for _ in range(2))
    out, lse = dca_attention(q, k, v, cos, sin, config, return_lse=True, **kwargs)
    expected, expected_lse = reference.dca_attention(
        q, k, v, cos, sin, config, return_lse=True, out_dtype=torch.float64, **kwargs
    )
    assert out.dtype == dtype
    assert_close(out, expected, baseline_attention(q, k, v, cos, sin, config) if dtype != torch.float32 else None)
    assert_lse_close(lse, expected_lse, dtype=dtype)


@pytest.mark.parametrize("seqlen", BORDERS)
def test_lengths_at_every_border(seqlen):
    run_and_compare(SMALL, 1, seqlen, 2, 1, 64, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "heads_kv", "dim"), [(4, 4, 64), (8, 2, 128), (8, 1, 96), (3, 1, 80), (2, 2, 20), (1, 1, 2)]
)
def test_heads_and_dtypes(heads, heads_kv, dim, dtype):
    run_and_compare(SMALL, 2, 203, heads, heads_kv, dim, dtype)


@pytest.mark.parametrize(
    "config",
    [
        DCAConfig(1, 1),
        DCAConfig(2, 3),
        FIGURE_2,
        DCAConfig(40, 40),
        DCAConfig(40, 79),
        DCAConfig(128, 160),
        DCAConfig(136, 200),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_lengths(config, dtype):
    run_and_compare(config, 1, 331, 4, 2, 32, dtype)


def test_a_chunk_longer_than_the_sequence_is_plain_causal_attention():
    run_and_compare(DCAConfig(20240, 24288), 1, 300, 2, 1, 64, torch.float32)


def test_a_published_geometry():
    run_and_compare(DCAConfig.from_pretraining_length(1024), 1, 2 * 640 + 700, 3, 1, 64, torch.float32)


def test_partial_and_no_rotation():
    run_and_compare(SMALL, 1, 150, 2, 1, 64, torch.float32, rotary_dim=24)
    cos = torch.empty(SMALL.max_position + 1, 0)
    q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
    out = dca_attention(q, k, v, cos, cos, SMALL)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_interleaved_pairs():
    run_and_compare(SMALL, 1, 150, 2, 1, 64, torch.float32, interleaved=True)
    cos, sin = tables(SMALL, 64)
    q, k, v = (random_rows(150, heads, 64) for heads in (2, 1, 1))
    arguments = (q, k, v, ragged_borders(90, 60), 90, cos, sin, SMALL)
    expected = reference.dca_attention_varlen(*arguments, interleaved=True, out_dtype=torch.float64)
    assert_close(dca_attention_varlen(*arguments, interleaved=True), expected)


def test_scale_and_temperature_multiply_the_logits():
    temperature = torch.tensor([0.5, 1.7])
    run_and_compare(SMALL, 2, 150, 2, 1, 64, torch.float32, softmax_scale=0.3, temperature=temperature)
    cos, sin = tables(SMALL, 16)
    q, k, v = (torch.randn(2, 90, 2, 16) for _ in range(3))
    by_hand = torch.cat(
        [
            dca_attention(q[b : b + 1] * t, k[b : b + 1], v[b : b + 1], cos, sin, SMALL)
            for b, t in enumerate(temperature)
        ]
    )
    torch.testing.assert_close(dca_attention(q, k, v, cos, sin, SMALL, temperature=temperature), by_hand)


def test_yarn_temperature_grows_with_the_keys_and_an_argument_overrides_it():
    config = DCAConfig(40, 48, "yarn", 50)
    cos, sin = tables(config, 16)
    q, k, v = (torch.randn(1, 200, 2, 16) for _ in range(3))
    factor = (0.1 * math.log(200 / 50) + 1) ** 2
    assert factor > 1.25
    expected = dca_attention(q, k, v, cos, sin, SMALL, softmax_scale=factor / math.sqrt(16))
    torch.testing.assert_close(dca_attention(q, k, v, cos, sin, config), expected)
    plain = dca_attention(q, k, v, cos, sin, SMALL)
    torch.testing.assert_close(dca_attention(q, k, v, cos, sin, config, temperature=torch.ones(1)), plain)
    short = [x[:, :50] for x in (q, k, v)]
    torch.testing.assert_close(dca_attention(*short, cos, sin, config), dca_attention(*short, cos, sin, SMALL))


def test_tables_may_carry_a_scale():
    cos, sin = tables(SMALL, 16, scale=1.2)
    q, k, v = (torch.randn(1, 150, 2, 16) for _ in range(3))
    expected = reference.dca_attention(q, k, v, cos, sin, SMALL, out_dtype=torch.float64)
    assert_close(dca_attention(q, k, v, cos, sin, SMALL), expected)


def test_equals_plain_causal_attention_up_to_max_position_and_differs_beyond():
    cos, sin = tables(DCAConfig(100, 199), 16)
    q, k, v = (torch.randn(1, P + 2, 2, 16) for _ in range(3))
    plain = dca_attention(q, k, v, cos, sin, DCAConfig(100, 199))  # one chunk: nothing but intra
    chunked = dca_attention(q, k, v, cos[: P + 1].contiguous(), sin[: P + 1].contiguous(), SMALL)
    torch.testing.assert_close(chunked[:, : P + 1], plain[:, : P + 1])
    assert (chunked[:, P + 1] - plain[:, P + 1]).abs().max() > 1e-3


def test_large_logits_stay_finite():
    cos, sin = tables(SMALL, 16)
    q, k, v = (torch.randn(1, 150, 2, 16) for _ in range(3))
    out = dca_attention(100 * q, 100 * k, v, cos, sin, SMALL)
    expected = reference.dca_attention(100 * q, 100 * k, v, cos, sin, SMALL, out_dtype=torch.float64)
    assert out.isfinite().all()
    # Logits of 1e5 are known to 1e-2 in float32: the winner decides, and nearly always alone.
    assert ((out.double() - expected).abs().amax(-1) < 1e-3).double().mean() > 0.98


def test_a_nan_in_the_input_reaches_exactly_the_rows_that_see_it():
    cos, sin = tables(SMALL, 16)
    q, k, v = (torch.randn(1, 150, 1, 16) for _ in range(3))
    for poisoned in (k, v):
        poisoned[0, 60] = math.nan
        out = dca_attention(q, k, v, cos, sin, SMALL)
        assert out[0, 60:].isnan().all()
        assert out[0, :60].isfinite().all()
        poisoned[0, 60] = 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_equals_one_sequence_at_a_time(dtype):
    lengths = [1, 0, N + 1, 2 * N, 0, 173]
    cu_seqlens = ragged_borders(*lengths)
    cos, sin = tables(SMALL, 32)
    q = random_rows(sum(lengths), 4, 32, dtype=dtype)
    k, v = (random_rows(sum(lengths), 2, 32, dtype=dtype) for _ in range(2))
    temperature = torch.linspace(0.5, 1.5, len(lengths))
    out, lse = dca_attention_varlen(
        q, k, v, cu_seqlens, max(lengths), cos, sin, SMALL, temperature=temperature, return_lse=True
    )
    assert lse.shape == (4, sum(lengths))
    for b, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        alone = dca_attention(
            *(x[None, begin:end] for x in (q, k, v)),
            cos,
            sin,
            SMALL,
            temperature=temperature[b : b + 1],
            return_lse=True,
        )
        torch.testing.assert_close(out[begin:end], alone[0][0], rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-2)
        torch.testing.assert_close(lse[:, begin:end], alone[1][0], rtol=0, atol=1e-5)
    expected = reference.dca_attention_varlen(
        q, k, v, cu_seqlens, max(lengths), cos, sin, SMALL, temperature=temperature, out_dtype=torch.float64
    )
    if dtype == torch.float32:
        assert_close(out, expected)


def test_empty_inputs_give_empty_results():
    cos, sin = tables(SMALL, 16)
    for batch, seqlen in [(0, 5), (2, 0)]:
        q, k, v = (torch.empty(batch, seqlen, 2, 16) for _ in range(3))
        out, lse = dca_attention(q, k, v, cos, sin, SMALL, return_lse=True)
        assert out.shape == (batch, seqlen, 2, 16)
        assert lse.shape == (batch, 2, seqlen)
    rows = torch.empty(0, 2, 16)
    assert dca_attention_varlen(rows, rows, rows, ragged_borders(0, 0), 0, cos, sin, SMALL).shape == (0, 2, 16)


def test_the_number_of_threads_does_not_change_a_bit():
    cos, sin = tables(SMALL, 32)
    q, k, v = (torch.randn(2, 500, 4, 32) for _ in range(3))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(dca_attention(q, k, v, cos, sin, SMALL))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
