"""KV caches of float8_e4m3fn: append, decode, several tokens and segments against the reference; scales; refusals."""

import math

import pytest
import torch
from oracle import (
    DTYPES,
    E4M3,
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
    kv_cache_scale,
    merge_attention_states,
    reference,
    rotate_and_append_kv,
    rotate_keys,
)

HEADS, KV_HEADS, DIM = 6, 2, 32
COS, SIN = tables(SMALL, DIM)
SCALES = {
    "none": (None, None),
    "numbers": (0.02, 1.5),
    "0-d": (torch.tensor(0.02), torch.tensor(1.5)),
    "one": (torch.tensor([0.02]), torch.tensor([1.5])),
    "per head": (torch.tensor([0.02, 0.3]), torch.tensor([0.013, 1.5])),
}


def rows(batch, seqlen, dtype=torch.float32):
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(random_rows(batch, seqlen, n, DIM, dtype=dtype) for n in heads)


def filled_cache(k, v, scales, *, page_size=None, slots=None) -> Cache:
    """A cache with whole sequences k, v (batch, seqlen, heads, dim) in it."""
    cache = empty_cache(k.shape[0], slots or k.shape[1], KV_HEADS, DIM, E4M3, page_size=page_size)
    append(cache, k, v, scales, cache_seqlens=0)
    return cache


def append(cache: Cache, k, v, scales, operator=rotate_and_append_kv, **kwargs):
    k_scale, v_scale = scales
    operator(k, v, cache.k, cache.v, COS, SIN, SMALL, k_scale=k_scale, v_scale=v_scale, **cache.layout, **kwargs)


def dequantised(cache: torch.Tensor, scale) -> torch.Tensor:
    scale = torch.as_tensor(1.0 if scale is None else scale).double().reshape(-1, 1)
    return cache.double() * scale


@pytest.mark.parametrize("page_size", [None, 7])
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_rounds_once_and_writes_nothing_else(dtype, scales, page_size):
    cache, expected = (empty_cache(2, 70, KV_HEADS, DIM, E4M3, page_size=page_size) for _ in range(2))
    expected.page_table = cache.page_table
    lengths = torch.tensor([0, 31], dtype=torch.int32)
    _, k, v = rows(2, 13, dtype)
    append(cache, k, v, scales, cache_seqlens=lengths)
    append(expected, k, v, scales, reference.rotate_and_append_kv, cache_seqlens=lengths)
    for actual, exact in ((cache.k.float(), expected.k.float()), (cache.v.float(), expected.v.float())):
        assert torch.equal(actual.isnan(), exact.isnan())
        assert not actual.isnan().all()
        # The rotation in float32 may end on the other side of a middle between two numbers, but seldom.
        actual, exact = actual.nan_to_num(), exact.nan_to_num()
        assert ((actual - exact).abs() <= exact.abs() / 8 + 2**-9).all()
        assert (actual != exact).float().mean() < 1e-3


@pytest.mark.parametrize("operator", [rotate_and_append_kv, reference.rotate_and_append_kv], ids=["fused", "reference"])
def test_what_is_too_large_is_cut_off_and_nan_stays(operator):
    given = torch.tensor([447.0, 448.0, 470.0, 1e6, -1e6, math.inf, -math.inf, math.nan])
    rows = torch.zeros(1, 1, KV_HEADS, DIM)
    rows[..., :8] = 2 * given
    cache = empty_cache(1, 2, KV_HEADS, DIM, E4M3)
    append(cache, torch.zeros_like(rows), rows, (None, 2.0), operator, cache_seqlens=0)
    expected = torch.tensor([448.0, 448.0, 448.0, 448.0, -448.0, 448.0, -448.0, math.nan])
    torch.testing.assert_close(cache.v[0, 0, :, :8].float(), expected.expand(KV_HEADS, -1), equal_nan=True)


@pytest.mark.parametrize("seqlen_q", [1, 5, 50])
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_the_cache_equals_the_reference(dtype, scales, seqlen_q):
    q, k, v = rows(2, 130, dtype)
    q = q[:, -seqlen_q:]
    k_scale, v_scale = scales
    cache = filled_cache(k, v, scales)
    lengths = torch.tensor([130, 97], dtype=torch.int32)
    out, lse = dca_attention_with_kvcache(
        q, cache.k, cache.v, COS, SIN, SMALL, cache_seqlens=lengths, k_scale=k_scale, v_scale=v_scale, return_lse=True
    )
    exact, exact_lse = reference.dca_attention_with_kvcache(
        q, cache.k, cache.v, COS, SIN, SMALL, cache_seqlens=lengths, k_scale=k_scale, v_scale=v_scale, return_lse=True,
        out_dtype=torch.float64,
    )  # fmt: skip
    assert out.dtype == dtype
    for b, length in enumerate(lengths.tolist()):
        keys, values = dequantised(cache.k[b, :length], k_scale), dequantised(cache.v[b, :length], v_scale)
        positions = torch.arange(length - seqlen_q, length)
        baseline, baseline_lse = attend_in_low_precision(
            q[b], keys, values, positions, COS, SIN, SMALL, DIM**-0.5, return_lse=True
        )
        assert_close(out[b], exact[b], baseline)
        assert_lse_close(lse[b], exact_lse[b], baseline_lse if multiplies(dtype) else None)


def test_the_reference_is_attention_over_what_the_cache_means():
    q, k, v = rows(1, 60)
    k_scale, v_scale = scales = SCALES["per head"]
    cache = filled_cache(k, v, scales)
    out = reference.dca_attention_with_kvcache(
        q, cache.k, cache.v, COS, SIN, SMALL, cache_seqlens=60, k_scale=k_scale, v_scale=v_scale
    )
    keys, values = dequantised(cache.k, k_scale), dequantised(cache.v, v_scale)
    plain = reference.dca_attention_with_kvcache(q.double(), keys, values, COS, SIN, SMALL, cache_seqlens=60)
    torch.testing.assert_close(out.double(), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("page_size", [None, 1, 16])
def test_steps_of_any_size_give_the_same(page_size):
    q, k, v = rows(2, 100)
    k_scale, v_scale = kv_cache_scale(k), kv_cache_scale(v)
    outs = []
    for step in (100, 1, 17):
        cache = empty_cache(2, 110, KV_HEADS, DIM, E4M3, page_size=page_size)
        parts = []
        for begin in range(0, 100, step):
            part = slice(begin, begin + step)
            parts.append(
                dca_attention_with_kvcache(
                    q[:, part], cache.k, cache.v, COS, SIN, SMALL, k=k[:, part], v=v[:, part], cache_seqlens=begin,
                    k_scale=k_scale, v_scale=v_scale, **cache.layout,
                )
            )  # fmt: skip
        outs.append(torch.cat(parts, dim=1))
    for other in outs[1:]:
        assert_close(other, outs[0].double())
    # 3 mantissa bits: an error of at most 2^-4 in each key and value, averaged over many of them.
    torch.testing.assert_close(outs[0], dca_attention(q, k, v, COS, SIN, SMALL), atol=0.15, rtol=0)


def test_leftpad_and_ragged_queries():
    q, k, v = rows(1, 40)
    scales = SCALES["per head"]
    plain, padded = (empty_cache(1, 60, KV_HEADS, DIM, E4M3) for _ in range(2))
    leftpad = torch.tensor([9], dtype=torch.int32)
    append(plain, k, v, scales, cache_seqlens=0)
    append(padded, k, v, scales, cache_seqlens=9, cache_leftpad=leftpad)
    call = dict(k_scale=scales[0], v_scale=scales[1])
    out = dca_attention_with_kvcache(q, plain.k, plain.v, COS, SIN, SMALL, cache_seqlens=40, **call)
    shifted = dca_attention_with_kvcache(
        q, padded.k, padded.v, COS, SIN, SMALL, cache_seqlens=49, cache_leftpad=leftpad, **call
    )
    assert torch.equal(out, shifted)
    ragged = dca_attention_with_kvcache(
        q[0, -7:], plain.k, plain.v, COS, SIN, SMALL, cache_seqlens=40, cu_seqlens_q=ragged_borders(7), max_seqlen_q=7,
        **call,
    )  # fmt: skip
    assert_close(ragged, out[0, -7:].double())


def test_segments_merge_to_the_whole():
    q, k, v = rows(1, 130)
    k_scale, v_scale = scales = SCALES["per head"]
    cache = filled_cache(k, v, scales)
    arguments = (q, cache.k, cache.v, COS, SIN, SMALL)
    call = dict(cache_seqlens=130, k_scale=k_scale, v_scale=v_scale)
    whole = dca_attention_with_kvcache(*arguments, **call)
    parts = [dca_segment_attention(*arguments, segment=segment, **call) for segment in reference.SEGMENTS]
    exact = [reference.dca_segment_attention(*arguments, segment=segment, **call) for segment in reference.SEGMENTS]
    for (out, _), (expected, _) in zip(parts, exact, strict=True):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert_close(merge_attention_states([out for out, _ in parts], [lse for _, lse in parts])[0], whole.double())


# --- The helper -------------------------------------------------------------------------------------------------------


def test_kv_cache_scale_leaves_room_for_the_rotation():
    _, k, _ = rows(2, 200)
    k = torch.where(k.isnan(), 0, k)
    scale = kv_cache_scale(k)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, 2 / 448 * k.abs().amax((0, 1, 3)))
    cache = filled_cache(k, k, (scale, scale))
    assert cache.k.float().abs().amax() < 448
    torch.testing.assert_close(kv_cache_scale(k[0, 0], margin=1.0), k[0, 0].abs().amax(-1) / 448)
    assert torch.equal(kv_cache_scale(torch.zeros(3, 2, 8)), torch.ones(2))
    assert torch.equal(kv_cache_scale(k.half()), kv_cache_scale(k.half().float()))
    for tiny in (1e-44, 1e-43, 2e-43, 1e-40):  # a scale of 0 is none
        assert (kv_cache_scale(torch.full((3, 2, 8), tiny)) > 0).all()
    with torch.enable_grad():  # a cache that is written has no graph
        assert not kv_cache_scale(torch.ones(3, 2, 8, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("x", "margin", "message"),
    [
        (torch.ones(3), 2.0, r"x must have shape \(\.\.\., num_heads_kv, head_dim\)"),
        (torch.ones(3, 2, 0), 2.0, "with elements in it"),
        (torch.ones(3, 2, dtype=torch.int32), 2.0, "x must have a floating dtype; got torch.int32"),
        (torch.ones(3, 2), 0.9, "margin must be at least 1; got 0.9"),
        (torch.ones(3, 2), math.nan, "margin must be at least 1; got nan"),
    ],
)
def test_kv_cache_scale_refuses(x, margin, message):
    with pytest.raises(ValueError, match=message):
        kv_cache_scale(x, margin=margin)
    with pytest.raises(TypeError, match="x must be a tensor; got list"):
        kv_cache_scale([[1.0]])


# --- Refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "zero": (dict(k_scale=0.0), "k_scale must be finite and above 0; got 0"),
    "negative": (dict(v_scale=-1.0), "v_scale must be finite and above 0; got -1"),
    "infinite": (dict(v_scale=math.inf), "v_scale must be finite and above 0; got inf"),
    "nan for a head": (dict(k_scale=torch.tensor([1.0, math.nan])), "k_scale must be finite and above 0; got nan"),
    "zero for a head": (dict(v_scale=torch.tensor([0.0, 1.0])), "v_scale must be finite and above 0; got 0"),
    "too many": (dict(k_scale=torch.ones(3)), r"k_scale must have shape \(\), \(1\) or \(num_heads_kv\) = \(2\); got"),
    "two dimensions": (dict(k_scale=torch.ones(1, 2)), r"k_scale must have shape .* got \(1, 2\)"),
    "float64": (dict(k_scale=torch.ones(2).double()), "k_scale must be float32"),
    "strided": (dict(v_scale=torch.ones(4)[::2]), "v_scale must be contiguous"),
    "a list": (dict(k_scale=[1.0, 1.0]), r"k_scale must be a float, or a float32 tensor .* got list"),
    "a bool": (dict(k_scale=True), "k_scale must be a float, or a float32 tensor"),
    "another 8-bit float": (
        dict(k_cache=torch.zeros(2, 10, KV_HEADS, DIM).to(torch.float8_e5m2)),
        r"k_cache\)? must have the dtype of the queries or keys, float32, or float8_e4m3fn or int8",
    ),
    "caches that differ": (dict(v_cache=torch.zeros(2, 10, KV_HEADS, DIM)), "v_cache.* must have the dtype of k_cache"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("appends", [True, False])
def test_bad_scales_and_caches_are_refused(name, appends):
    changed, message = REFUSED[name]
    q, k, v = rows(2, 3)
    cache = empty_cache(2, 10, KV_HEADS, DIM, E4M3)
    arguments = dict(k_cache=cache.k, v_cache=cache.v) | changed
    new = dict(k=k, v=v, cache_seqlens=0) if appends else dict(cache_seqlens=3)
    if name == "caches that differ" and not appends:
        message = r"v \(or v_cache\) must have the dtype of k_cache"
    with pytest.raises((ValueError, TypeError), match=message):
        dca_attention_with_kvcache(q, rotary_cos=COS, rotary_sin=SIN, config=SMALL, **new, **arguments)
    assert cache.k.float().isnan().all()
    assert cache.v.float().isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_are_for_caches_of_8_bits_alone(name, dtype):
    q, k, v = rows(2, 3, dtype)
    cache = empty_cache(2, 10, KV_HEADS, DIM, dtype)
    message = f"{name} must be None unless the caches are float8_e4m3fn or int8; got a scale for {dtype}"
    arguments = (cache.k, cache.v, COS, SIN, SMALL)
    for scale in (1.0, torch.ones(KV_HEADS)):
        with pytest.raises(ValueError, match=message):
            dca_attention_with_kvcache(q, *arguments, cache_seqlens=3, **{name: scale})
        with pytest.raises(ValueError, match=message):
            dca_segment_attention(q, *arguments, segment="intra", cache_seqlens=3, **{name: scale})
        with pytest.raises(ValueError, match=message):
            rotate_and_append_kv(k, v, *arguments, cache_seqlens=0, **{name: scale})


def test_float8_is_for_caches_alone():
    q, k, v = (x.contiguous() for x in rows(1, 3))
    with pytest.raises(ValueError, match="k must be float32, bfloat16 or float16"):
        dca_attention(q.to(E4M3), k.to(E4M3), v.to(E4M3), COS, SIN, SMALL)
    with pytest.raises(ValueError, match="k must be float32, bfloat16 or float16"):
        rotate_keys(k.to(E4M3), COS, SIN, SMALL)


# --- Torch ------------------------------------------------------------------------------------------------------------


def test_opcheck():
    ops = torch.ops.dca_ext
    q, k, v = rows(2, 50)
    n, p = SMALL.chunk_len, SMALL.max_position
    k_scale, v_scale = SCALES["per head"]
    cache = filled_cache(k, v, (k_scale, v_scale), slots=64)
    attention = (
        q, cache.k, cache.v, COS, SIN, n, p, -1, None, 0, None, 0, None, 50, None, None, k_scale, 1.0, None, 0.3, 0.25,
        None, 0, 0, False, True,
    )  # fmt: skip
    append_call = (
        k, v, cache.k, cache.v, COS, SIN, n, p, None, 0, None, 3, None, None, k_scale, 1.0, v_scale, 1.0, None, None,
        False,
    )  # fmt: skip
    # All but test_schema, which compares tensors by arithmetic that torch has not for float8; the operators pass it in
    # other dtypes.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.attention.default, attention, test_utils=checks)
    torch.library.opcheck(ops.rotate_and_append_kv.default, append_call, test_utils=checks)


@pytest.mark.parametrize("kind", ["numbers", "per head"])
def test_compiled_decode_mutates_the_cache_it_was_given(kind):
    k_scale, v_scale = SCALES[kind]

    def call(q, k, v, k_cache, v_cache, lengths):
        return 2 * dca_attention_with_kvcache(
            q, k_cache, v_cache, COS, SIN, SMALL, k=k, v=v, cache_seqlens=lengths, k_scale=k_scale, v_scale=v_scale
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    cache, twin = (empty_cache(2, 16, KV_HEADS, DIM, E4M3) for _ in range(2))
    for step in range(3):
        q, k, v = rows(2, 1)
        lengths = torch.full((2,), step, dtype=torch.int32)
        out = compiled(q, k, v, cache.k, cache.v, lengths)
        torch.testing.assert_close(out, call(q, k, v, twin.k, twin.v, lengths))
    assert torch.equal(cache.k.view(torch.uint8), twin.k.view(torch.uint8))
    assert not cache.k[:, :3].float().isnan().any()
    assert cache.k[:, 3:].float().isnan().all()
