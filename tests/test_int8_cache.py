"""KV caches of int8 with a scale for each slot and KV head: append, decode, several tokens and segments; refusals."""

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
    dca_attention,
    dca_attention_with_kvcache,
    dca_segment_attention,
    merge_attention_states,
    reference,
    rotate_and_append_kv,
    rotate_keys,
)

HEADS, KV_HEADS, DIM = 6, 2, 32
COS, SIN = tables(SMALL, DIM)
NAN, INF = math.nan, math.inf


def rows(batch, seqlen, dtype=torch.float32):
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(random_rows(batch, seqlen, n, DIM, dtype=dtype) for n in heads)


def empty(batch, slots, page_size=None) -> Cache:
    return empty_cache(batch, slots, KV_HEADS, DIM, torch.int8, page_size=page_size)


def append(cache: Cache, k, v, operator=rotate_and_append_kv, **kwargs):
    operator(k, v, cache.k, cache.v, COS, SIN, SMALL, **cache.scales, **cache.layout, **kwargs)


def attend(q, cache: Cache, operator=dca_attention_with_kvcache, **kwargs):
    return operator(q, cache.k, cache.v, COS, SIN, SMALL, **cache.scales, **cache.layout, **kwargs)


def filled_cache(k, v, *, page_size=None, spare=3) -> Cache:
    """A cache with whole sequences k, v (batch, seqlen, heads, dim) in it, and slots that no token owns."""
    cache = empty(k.shape[0], k.shape[1] + spare, page_size)
    append(cache, k, v, cache_seqlens=0)
    return cache


def dequantised(numbers: torch.Tensor, scales: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    return numbers.to(dtype) * scales.to(dtype)[..., None]


def spread(seqlen: int) -> torch.Tensor:
    """Factors (seqlen, 1, 1) that make some tokens much larger than others."""
    return torch.logspace(-2, 1, seqlen)[torch.randperm(seqlen)][:, None, None]


# --- Append -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_numbers_and_scales_and_nothing_else(dtype, page_size):
    cache, expected = (empty(2, 70, page_size) for _ in range(2))
    expected.page_table = cache.page_table
    lengths = torch.tensor([0, 31], dtype=torch.int32)
    _, k, v = rows(2, 13, dtype)
    k, v = k * spread(13).to(dtype), v * spread(13).to(dtype)
    append(cache, k, v, cache_seqlens=lengths)
    append(expected, k, v, reference.rotate_and_append_kv, cache_seqlens=lengths)
    for actual, exact in ((cache.k_scale, expected.k_scale), (cache.v_scale, expected.v_scale)):
        assert (~actual.isnan()).sum() == 2 * 13 * KV_HEADS
        torch.testing.assert_close(actual, exact, rtol=1e-6, atol=0, equal_nan=True)
    for actual, exact in ((cache.k, expected.k), (cache.v, expected.v)):
        assert torch.equal(actual == -128, exact == -128)
        # The arithmetic in float32 may end on the other side of a middle between two numbers, but seldom.
        difference = (actual.int() - exact.int()).abs()
        assert difference.max() <= 1
        assert (difference != 0).float().mean() < 1e-3


@pytest.mark.parametrize("dim", [1, 3, 8, 16, 20, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_divided_and_rounded_to_nearest_even(dtype, dim):
    """Values are not rotated, so what is written is exact: torch divides in float32 and rounds ties to even."""
    v = torch.randn(1, 200, 1, dim) * spread(200)
    v[0, ::3, 0, :] = torch.randint(-254, 255, (len(v[0, ::3]), dim)) / 2  # with ties, where 127 is among them
    v[0, ::3, 0, 0] = 127
    v = v.to(dtype)
    cos, sin = tables(SMALL, 0)
    numbers = torch.full((2, 1, 200, 1, dim), -128, dtype=torch.int8)
    scales = torch.full((2, 1, 200, 1), NAN)
    rotate_and_append_kv(v, v, *numbers, cos, sin, SMALL, cache_seqlens=0, k_scale=scales[0], v_scale=scales[1])
    expected = v.float().abs().amax(-1) / 127
    for of_cache, of_scales in zip(numbers, scales, strict=True):
        assert torch.equal(of_scales, expected)
        assert torch.equal(of_cache.float(), (v.float() / expected[..., None]).round())
    assert numbers.abs().max() == 127


# What a row holds besides zeros -> its scale and its numbers.
SPECIAL = {
    "zeros": ([], 0.0, []),
    "negative zero": ([-0.0], 0.0, [0]),
    "nan": ([1.0, NAN, 2.0], NAN, [0, 0, 0]),
    "infinity": ([1.0, INF], NAN, [0, 0]),
    "negative infinity": ([-INF, 5.0], NAN, [0, 0]),
    "both": ([NAN, INF], NAN, [0, 0]),
    "largest": ([torch.finfo(torch.float32).max, 1.0], torch.finfo(torch.float32).max / 127, [127, 0]),
    "small": ([2.0**-120, -(2.0**-121)], 2.0**-120 / 127, [127, -64]),
    # max / 127 is subnormal: rounded to a multiple of 2^-149, which for one at 1.5 is up to a third off.
    "subnormal scale": ([-190 * 2.0**-149, 100 * 2.0**-149], 2.0**-149, [-127, 100]),
    "scale below float32": ([2.0**-149, -(2.0**-149)], 0.0, [0, 0]),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("at", [0, 17, DIM - 3])
def test_rows_with_special_numbers(name, at):
    """Each in a row of its own, between ordinary ones, in every part of a vector."""
    inputs, scale, expected = SPECIAL[name]
    _, _, v = rows(1, 3)
    v[0, 1, 0] = 0
    v[0, 1, 0, at : at + len(inputs)] = torch.tensor(inputs)
    cos, sin = tables(SMALL, 0)
    for operator in (rotate_and_append_kv, reference.rotate_and_append_kv):
        cache = empty(1, 3)
        operator(v, v, cache.k, cache.v, cos, sin, SMALL, cache_seqlens=0, **cache.scales)
        wanted = torch.zeros(DIM, dtype=torch.int8)
        wanted[at : at + len(expected)] = torch.tensor(expected, dtype=torch.int8)
        for numbers, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            torch.testing.assert_close(scales[0, 1, 0], torch.tensor(scale), rtol=1e-7, atol=0, equal_nan=True)
            assert torch.equal(numbers[0, 1, 0], wanted)
            others = scales[0, [0, 2, 1], [0, 0, 1]]
            assert (others > 0).all(), "other rows and heads are what they are"


def test_nan_and_infinity_in_a_key_reach_all_that_see_it():
    q, k, v = rows(1, 60)
    k[0, 40, 1, 5] = INF
    v[0, 20, 0, 3] = NAN
    cache = filled_cache(k, v)
    assert cache.k_scale[0, 40, 1].isnan()
    assert cache.v_scale[0, 20, 0].isnan()
    out, lse = attend(q, cache, cache_seqlens=60, return_lse=True)
    group = HEADS // KV_HEADS
    assert not lse[0, :group].isnan().any()
    assert torch.equal(lse[0, group:].isnan(), torch.arange(60).expand(HEADS - group, 60) >= 40)
    assert torch.equal(out[0, :, :group].isnan().all(-1), (torch.arange(60) >= 20)[:, None].expand(60, group))
    assert torch.equal(out[0, :, group:].isnan().all(-1), (torch.arange(60) >= 40)[:, None].expand(60, group))


# --- Attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 1, 16, 33])
@pytest.mark.parametrize("seqlen_q", [1, 2, 5, 50, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_the_cache_equals_the_reference(dtype, seqlen_q, page_size):
    q, k, v = rows(2, 130, dtype)
    q, k, v = q[:, -seqlen_q:], k * spread(130).to(dtype), v * spread(130).to(dtype)
    lengths = torch.tensor([130, 97], dtype=torch.int32)
    cache = empty(2, 133, page_size)
    for b, n in enumerate(lengths.tolist()):  # what is behind the last token stays poison
        append(cache.sequence(b), k[b : b + 1, :n], v[b : b + 1, :n], cache_seqlens=0)
    out, lse = attend(q, cache, cache_seqlens=lengths, return_lse=True)
    exact, exact_lse = attend(
        q, cache, reference.dca_attention_with_kvcache, cache_seqlens=lengths, return_lse=True, out_dtype=torch.float64
    )
    assert out.dtype == dtype
    for b, length in enumerate(lengths.tolist()):
        slots = torch.arange(length)
        at = (b, slots) if page_size is None else (cache.page_table[b].long()[slots // page_size], slots % page_size)
        keys, values = dequantised(cache.k[at], cache.k_scale[at]), dequantised(cache.v[at], cache.v_scale[at])
        positions = torch.arange(length - seqlen_q, length)
        baseline, baseline_lse = attend_in_low_precision(
            q[b], keys, values, positions, COS, SIN, SMALL, DIM**-0.5, return_lse=True
        )
        assert_close(out[b], exact[b], baseline)
        assert_lse_close(lse[b], exact_lse[b], baseline_lse if multiplies(dtype) else None)


@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize("seqlen_q", [1, 4, 120])
@pytest.mark.parametrize("heads", [2, 8, 16])
def test_int8_is_a_cache_of_what_its_numbers_mean(heads, seqlen_q, num_splits):
    q = random_rows(2, seqlen_q, heads, DIM)
    _, k, v = rows(2, 120)
    cache = filled_cache(k * spread(120), v * spread(120))
    plain = [dequantised(cache.k, cache.k_scale, torch.float32), dequantised(cache.v, cache.v_scale, torch.float32)]
    call = dict(cache_seqlens=120, num_splits=num_splits, return_lse=True)
    out, lse = attend(q, cache, **call)
    expected, expected_lse = dca_attention_with_kvcache(q, *plain, COS, SIN, SMALL, **call)
    assert_close(out, expected.double())
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_the_reference_is_attention_over_what_the_cache_means():
    q, k, v = rows(1, 60)
    cache = filled_cache(k, v)
    out = attend(q, cache, reference.dca_attention_with_kvcache, cache_seqlens=60)
    plain = [dequantised(cache.k, cache.k_scale), dequantised(cache.v, cache.v_scale)]
    expected = reference.dca_attention_with_kvcache(q.double(), *plain, COS, SIN, SMALL, cache_seqlens=60)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 20, 80, 128])
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_head_dims_that_fit_no_vector(dim, seqlen_q):
    cos, sin = tables(SMALL, dim // 2 * 2)
    q, k, v = (random_rows(1, 90, n, dim) for n in (4, 2, 2))
    cache = empty_cache(1, 95, 2, dim, torch.int8)
    arguments = (q[:, -seqlen_q:], cache.k, cache.v, cos, sin, SMALL)
    rotate_and_append_kv(k, v, cache.k, cache.v, cos, sin, SMALL, cache_seqlens=0, **cache.scales)
    out = dca_attention_with_kvcache(*arguments, cache_seqlens=90, **cache.scales)
    exact = reference.dca_attention_with_kvcache(*arguments, cache_seqlens=90, **cache.scales, out_dtype=torch.float64)
    assert_close(out, exact)


@pytest.mark.parametrize("page_size", [None, 1, 16])
def test_steps_of_any_size_give_the_same(page_size):
    q, k, v = rows(2, 100)
    outs = []
    for step in (100, 1, 17):
        cache = empty(2, 110, page_size)
        parts = [
            attend(q[:, part], cache, k=k[:, part], v=v[:, part], cache_seqlens=part.start)
            for part in (slice(begin, begin + step) for begin in range(0, 100, step))
        ]
        outs.append(torch.cat(parts, dim=1))
    for other in outs[1:]:
        assert_close(other, outs[0].double())
    # An error of at most half of 1/127 of the largest of each key and value, averaged over many of them.
    torch.testing.assert_close(outs[0], dca_attention(q, k, v, COS, SIN, SMALL), atol=0.03, rtol=0)


def test_leftpad_and_ragged_queries():
    q, k, v = rows(1, 40)
    plain, padded = empty(1, 60), empty(1, 60)
    leftpad = torch.tensor([9], dtype=torch.int32)
    append(plain, k, v, cache_seqlens=0)
    append(padded, k, v, cache_seqlens=9, cache_leftpad=leftpad)
    out = attend(q, plain, cache_seqlens=40)
    assert torch.equal(out, attend(q, padded, cache_seqlens=49, cache_leftpad=leftpad))
    ragged = attend(q[0, -7:], plain, cache_seqlens=40, cu_seqlens_q=ragged_borders(7), max_seqlen_q=7)
    assert_close(ragged, out[0, -7:].double())


def test_ragged_append():
    _, k, v = rows(1, 12)
    ragged, whole = empty(2, 20), empty(2, 20)
    borders = ragged_borders(5, 7)
    append(ragged, k[0], v[0], cache_seqlens=3, cu_seqlens_q=borders, max_seqlen_q=7)
    for b, part in enumerate((slice(0, 5), slice(5, 12))):
        append(whole.sequence(b), k[:, part], v[:, part], cache_seqlens=3)
    assert torch.equal(ragged.k, whole.k)
    assert torch.equal(ragged.v, whole.v)
    for actual, expected in zip(ragged.scales.values(), whole.scales.values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_segments_merge_to_the_whole():
    q, k, v = rows(1, 130)
    cache = filled_cache(k, v)
    whole = attend(q, cache, cache_seqlens=130)
    parts, exact = (
        [attend(q, cache, operator, segment=segment, cache_seqlens=130) for segment in reference.SEGMENTS]
        for operator in (dca_segment_attention, reference.dca_segment_attention)
    )
    for (out, _), (expected, _) in zip(parts, exact, strict=True):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert_close(merge_attention_states([out for out, _ in parts], [lse for _, lse in parts])[0], whole.double())


# --- Refusals ---------------------------------------------------------------------------------------------------------

SHAPED = r"of an int8 cache must be a float32 tensor \(2, 10, 2\), a scale for each slot and KV head; got"
MISSING = "of an int8 cache must be a float32 tensor with a scale for each slot and KV head; got"
REFUSED = {
    "no k_scale": (dict(k_scale=None), f"k_scale {MISSING} none"),
    "no v_scale": (dict(v_scale=None), f"v_scale {MISSING} none"),
    "a number": (dict(k_scale=0.5), f"k_scale {MISSING} float"),
    "a list": (dict(v_scale=[1.0, 1.0]), f"v_scale {MISSING} list"),
    "one scale": (dict(k_scale=torch.tensor(0.5)), rf"k_scale {SHAPED} \(\)"),
    "a scale per head": (dict(v_scale=torch.ones(KV_HEADS)), rf"v_scale {SHAPED} \(2\)"),
    "other slots": (dict(k_scale=torch.ones(2, 11, KV_HEADS)), rf"k_scale {SHAPED} \(2, 11, 2\)"),
    "with head_dim": (dict(k_scale=torch.ones(2, 10, KV_HEADS, DIM)), rf"k_scale {SHAPED} \(2, 10, 2, {DIM}\)"),
    "float64": (dict(v_scale=torch.ones(2, 10, KV_HEADS).double()), "v_scale must be float32"),
    "uint8": (
        dict(k_cache=torch.zeros(2, 10, KV_HEADS, DIM, dtype=torch.uint8), k_scale=None),
        "k_cache.* must have the dtype of .*, or float8_e4m3fn or int8",
    ),
    "caches that differ": (
        dict(v_cache=torch.zeros(2, 10, KV_HEADS, DIM), v_scale=None),
        "v_cache.* must have the dtype of k_cache",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("appends", [True, False])
def test_bad_scales_and_caches_are_refused(name, appends):
    changed, message = REFUSED[name]
    q, k, v = rows(2, 3)
    cache = empty(2, 10)
    arguments = dict(k_cache=cache.k, v_cache=cache.v, **cache.scales) | changed
    new = dict(k=k, v=v, cache_seqlens=0) if appends else dict(cache_seqlens=3)
    with pytest.raises((ValueError, TypeError), match=message):
        dca_attention_with_kvcache(q, rotary_cos=COS, rotary_sin=SIN, config=SMALL, **new, **arguments)
    for numbers, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        assert (numbers == -128).all()
        assert scales.isnan().all()


def test_rows_past_the_capacity_are_refused_and_leave_the_scales():
    _, k, v = rows(2, 3)
    cache = empty(2, 10)
    with pytest.raises(ValueError, match="cache_seqlens must fit in the cache"):
        append(cache, k, v, cache_seqlens=torch.tensor([0, 8], dtype=torch.int32))
    assert cache.k_scale.isnan().all()
    assert (cache.k == -128).all()


def test_int8_is_for_caches_alone():
    q, k, v = (x.contiguous().to(torch.int8) for x in rows(1, 3))
    with pytest.raises(ValueError, match="k must be float32, bfloat16 or float16"):
        dca_attention(q, k, v, COS, SIN, SMALL)
    with pytest.raises(ValueError, match="k must be float32, bfloat16 or float16"):
        rotate_keys(k, COS, SIN, SMALL)
    cache = empty(1, 10)
    with pytest.raises(ValueError, match="q must be float32, bfloat16 or float16"):
        attend(q, cache, cache_seqlens=3)


# --- Torch ------------------------------------------------------------------------------------------------------------


def test_opcheck():
    ops = torch.ops.dca_ext
    q, k, v = rows(2, 50)
    n, p = SMALL.chunk_len, SMALL.max_position
    cache = filled_cache(k, v, spare=0)
    attention = (
        q, cache.k, cache.v, COS, SIN, n, p, -1, None, 0, None, 0, None, 50, None, None, cache.k_scale, 1.0,
        cache.v_scale, 1.0, 0.25, None, 0, 0, False, True,
    )  # fmt: skip
    append_call = (
        k[:, :5], v[:, :5], cache.k, cache.v, COS, SIN, n, p, None, 0, None, 3, None, None, None, 1.0, None, 1.0,
        cache.k_scale, cache.v_scale, False,
    )  # fmt: skip
    torch.library.opcheck(ops.attention.default, attention)
    torch.library.opcheck(ops.rotate_and_append_kv.default, append_call)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_decode_mutates_the_cache_and_the_scales_it_was_given(backend):
    def call(q, k, v, k_cache, v_cache, k_scale, v_scale, lengths):
        return 2 * dca_attention_with_kvcache(
            q, k_cache, v_cache, COS, SIN, SMALL, k=k, v=v, cache_seqlens=lengths, k_scale=k_scale, v_scale=v_scale
        )

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    cache, twin = empty(2, 16), empty(2, 16)
    for step in range(3):
        q, k, v = rows(2, 1)
        lengths = torch.full((2,), step, dtype=torch.int32)
        out = compiled(q, k, v, cache.k, cache.v, *cache.scales.values(), lengths)
        torch.testing.assert_close(out, call(q, k, v, twin.k, twin.v, *twin.scales.values(), lengths))
    assert torch.equal(cache.k, twin.k)
    assert torch.equal(cache.v, twin.v)
    for actual, expected in zip(cache.scales.values(), twin.scales.values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert not actual[:, :3].isnan().any()
        assert actual[:, 3:].isnan().all()
