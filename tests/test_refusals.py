"""Bad input: one sentence that names the argument, before any work, and nothing written."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from oracle import SMALL, empty_cache, ragged_borders, tables

from dca_ext import (
    DCAConfig,
    dca_attention,
    dca_attention_varlen,
    dca_attention_with_kvcache,
    dca_segment_attention,
    merge_attention_states,
    rotate_and_append_kv,
    rotate_keys,
)
from dca_ext.operators import call

HEADS, KV_HEADS, DIM = 4, 2, 16
COS, SIN = tables(SMALL, DIM)


def q_of(batch=2, seqlen=3, heads=HEADS, dim=DIM, dtype=torch.float32):
    return torch.randn(batch, seqlen, heads, dim).to(dtype)


def kv_of(batch=2, seqlen=3, heads=KV_HEADS, dim=DIM, dtype=torch.float32):
    return q_of(batch, seqlen, heads, dim, dtype), q_of(batch, seqlen, heads, dim, dtype)


def lengths(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


SELF_ATTENTION = {
    "another length": (dict(k=kv_of(seqlen=4)[0]), ValueError, "use dca_attention_with_kvcache"),
    "another batch": (dict(k=kv_of(batch=1)[0]), ValueError, "k must have q's batch size"),
    "v of another shape": (dict(v=kv_of(seqlen=4)[1]), ValueError, r"v .* must have shape"),
    "dtype": (dict(q=q_of(dtype=torch.float64)), ValueError, "q must be float32, bfloat16 or float16"),
    "mixed dtypes": (dict(v=kv_of(dtype=torch.bfloat16)[1]), ValueError, r"v .* must have the dtype"),
    "three dimensions": (dict(q=q_of()[0]), ValueError, "q must have 4 dimensions"),
    "head_dim": (dict(q=q_of(dim=8)), ValueError, r"head_dim of k .* must be that of q \(8\); got 16"),
    "heads": (dict(q=q_of(heads=3)), ValueError, r"num_heads must be a positive multiple of num_heads_kv \(2\); got 3"),
    "strided head_dim": (dict(q=q_of(dim=2 * DIM)[..., ::2]), ValueError, "q must be contiguous in its last dimension"),
    "not a tensor": (dict(q=[1.0]), TypeError, "q must be a tensor; got list"),
    "not a config": (dict(config=(4, 6)), TypeError, "config must be a DCAConfig; got tuple"),
    "short tables": (
        dict(rotary_cos=COS[:-1].contiguous(), rotary_sin=SIN[:-1].contiguous()),
        ValueError,
        "at least max_position . 1 = 49 rows; got 48",
    ),
    "wide tables": (
        dict(rotary_cos=torch.ones(49, 9), rotary_sin=torch.ones(49, 9)),
        ValueError,
        r"at most head_dim \(16\); got 18",
    ),
    "tables that differ": (dict(rotary_sin=SIN[:, :4].contiguous()), ValueError, "rotary_sin must have shape"),
    "tables in bf16": (dict(rotary_cos=COS.bfloat16()), ValueError, "rotary_cos must be float32"),
    "strided tables": (dict(rotary_cos=COS.mT.contiguous().mT), ValueError, "rotary_cos must be contiguous"),
    "temperature of another length": (
        dict(temperature=torch.ones(3)),
        ValueError,
        r"temperature must have shape \(2\)",
    ),
    "temperature in float64": (
        dict(temperature=torch.ones(2, dtype=torch.float64)),
        ValueError,
        "temperature must be float32",
    ),
}


@pytest.mark.parametrize("name", SELF_ATTENTION)
def test_self_attention_refuses(name):
    changed, error, message = SELF_ATTENTION[name]
    k, v = kv_of()
    arguments = dict(q=q_of(), k=k, v=v, rotary_cos=COS, rotary_sin=SIN, config=SMALL) | changed
    with pytest.raises(error, match=message):
        dca_attention(**arguments)


RAGGED = {
    "int64": (dict(cu_seqlens_q=lengths(0, 3, 6, dtype=torch.int64)), "must be int32"),
    "not from 0": (dict(cu_seqlens_q=lengths(1, 3, 6)), "must start at 0; got 1"),
    "decreasing": (dict(cu_seqlens_q=lengths(0, 3, 2)), "must not decrease; entry 2 is 2 after 3"),
    "not to the end": (dict(cu_seqlens_q=lengths(0, 3, 5)), r"must end at the number of rows \(6\); got 5"),
    "longer than the maximum": (dict(max_seqlen_q=2), "got 2, and sequence 0 has 3 rows"),
    "a maximum of 0": (dict(max_seqlen_q=0), "and sequence 0 has 3 rows"),
    "a negative maximum": (dict(max_seqlen_q=-1), "max_seqlen_q must not be negative; got -1"),
    "empty": (dict(cu_seqlens_q=lengths()), r"must have batch \+ 1 entries in one dimension; got shape \(0\)"),
    "rows of k": (dict(k=torch.randn(5, KV_HEADS, DIM)), r"k must have as many rows as q \(6\); got 5"),
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_attention_refuses(name):
    changed, message = RAGGED[name]
    arguments = dict(
        q=torch.randn(6, HEADS, DIM), k=torch.randn(6, KV_HEADS, DIM), v=torch.randn(6, KV_HEADS, DIM),
        cu_seqlens_q=lengths(0, 3, 6), max_seqlen_q=3, rotary_cos=COS, rotary_sin=SIN, config=SMALL,
    )  # fmt: skip
    dca_attention_varlen(**arguments)
    with pytest.raises(ValueError, match=message):
        dca_attention_varlen(**arguments | changed)


K3, V3 = kv_of()
CACHED = {
    "past capacity": (dict(cache_seqlens=8), "sequence 0 needs 11 slots, and it has 10"),
    "one past capacity": (dict(cache_seqlens=lengths(7, 8)), "sequence 1 needs 11 slots, and it has 10"),
    "negative length": (dict(cache_seqlens=lengths(0, -1)), "cache_seqlens must not be negative; got -1"),
    "length as float": (dict(cache_seqlens=1.0), "cache_seqlens must be an int or an int32 tensor"),
    "lengths in int64": (dict(cache_seqlens=lengths(0, 0, dtype=torch.int64)), "cache_seqlens must be int32"),
    "too many lengths": (dict(cache_seqlens=lengths(0, 0, 0)), r"cache_seqlens must have shape \(2\); got \(3\)"),
    "left padding": (dict(cache_leftpad=lengths(0, 4)), r"between 0 and the slots in use \(3\); got 4 for sequence 1"),
    "k without v": (dict(v=None), "k and v go together; got k without v"),
    "other rows in k": (dict(k=kv_of(seqlen=2)[0]), "k must have as many rows as q"),
    "cache dtype": (dict(k_cache=torch.zeros(2, 10, KV_HEADS, DIM).bfloat16()), "k_cache .* dtype .*; got bfloat16"),
    "expanded cache": (
        dict(k_cache=torch.zeros(1, 10, KV_HEADS, DIM).expand(2, -1, -1, -1)),
        "k_cache is written, so its elements must not share memory; got an expanded tensor, with a stride of 0 in dim",
    ),
    "one cache for both": (
        dict.fromkeys(("k_cache", "v_cache"), torch.zeros(2, 10, KV_HEADS, DIM)),
        "k_cache and v_cache are written, so they must not be the same memory",
    ),
    "cache heads": (dict(k_cache=torch.zeros(2, 10, 3, DIM)), r"k_cache must have shape \(2, 10, 2, 16\); got"),
    "heads": (dict(q=q_of(heads=3)), r"num_heads must be a positive multiple of num_heads_kv \(2\); got 3"),
    "no heads": (dict(q=q_of(heads=0)), r"num_heads must be a positive multiple of num_heads_kv \(2\); got 0"),
    "cache batch": (dict(k_cache=torch.zeros(1, 10, KV_HEADS, DIM)), "k_cache must have shape"),
    "v_cache slots": (dict(v_cache=torch.zeros(2, 9, KV_HEADS, DIM)), "v_cache must have shape"),
    "cu_seqlens without a maximum": (dict(cu_seqlens_q=lengths(0, 3, 6)), "cu_seqlens_q and max_seqlen_q go together"),
    "splits": (dict(num_splits=-1), "num_splits must be between 0"),
    "splits beyond int64": (dict(num_splits=2**63), "num_splits must fit in 32 bits; got 9223372036854775808"),
    "splits as float": (dict(num_splits=1.5), "num_splits must be an int; got float"),
    "splits None": (dict(num_splits=None), "num_splits must be an int; got NoneType"),
    "temperature": (dict(temperature=torch.ones(3)), r"temperature must have shape \(2\); got \(3\)"),
    "temperature in float64": (dict(temperature=torch.ones(2).double()), "temperature must be float32; got float64"),
    "temperature expanded": (dict(temperature=torch.ones(1).expand(2)), "temperature must be contiguous"),
    "temperature strided": (dict(temperature=torch.ones(4)[::2]), "temperature must be contiguous"),
    "temperature as float": (dict(temperature=1.0), "temperature must be a tensor or None; got float"),
    "softmax_scale": (dict(softmax_scale="x"), "softmax_scale must be a float or None; got str"),
    "softmax_scale as bool": (dict(softmax_scale=True), "softmax_scale must be a float or None; got bool"),
    "softmax_scale as tensor": (dict(softmax_scale=torch.ones(2)), "softmax_scale must be a float or None; got Tensor"),
    "return_lse": (dict(return_lse="x"), "return_lse must be True or False; got 'x'"),
    "interleaved": (dict(interleaved=1), "interleaved must be True or False; got 1"),
    "k as list": (dict(k=[1.0]), "k must be a tensor or None; got list"),
    "k in another dtype": (dict(k=K3.bfloat16(), v=V3.bfloat16()), r"k must have the dtype .* float32; got bfloat16"),
    "cache as list": (dict(k_cache=[1.0]), "k_cache must be a tensor; got list"),
    "page table as list": (dict(page_table=[[0]]), "page_table must be a tensor or None; got list"),
    "left padding as list": (dict(cache_leftpad=[0, 0]), "cache_leftpad must be a tensor or None; got list"),
    "no tables": (dict(rotary_cos=None), "rotary_cos must be a tensor; got NoneType"),
    "one dimension": (dict(q=q_of()[0, 0, 0], k=K3[0, 0, 0], v=V3[0, 0, 0]), r"q must have 4 dimensions; got .*\(16\)"),
    "no dimension": (dict(q=torch.tensor(1.0)), r"q must have 4 dimensions; got shape \(\)"),
    "borders without a dimension": (
        dict(cu_seqlens_q=torch.tensor(3, dtype=torch.int32), max_seqlen_q=3, q=q_of()[0], k=K3[0], v=V3[0]),
        r"cu_seqlens_q must have batch \+ 1 entries in one dimension; got shape \(\)",
    ),
    "borders as list": (dict(cu_seqlens_q=[0, 3], max_seqlen_q=3), "cu_seqlens_q must be a tensor; got list"),
    "maximum as float": (dict(cu_seqlens_q=lengths(0, 3), max_seqlen_q=3.0), "max_seqlen_q must be an int; got float"),
    "length beyond int64": (dict(cache_seqlens=2**63), "cache_seqlens must fit in 32 bits; got 9223372036854775808"),
    "strided head_dim": (dict(q=q_of(dim=2 * DIM)[..., ::2]), "q must be contiguous in its last dimension"),
    "q in another dtype": (dict(q=q_of(dtype=torch.float16)), r"k must have the dtype .* float16; got float32"),
    "q in float64": (dict(q=q_of(dtype=torch.float64)), "q must be float32, bfloat16 or float16; got float64"),
    "q of another head_dim": (dict(q=q_of(dim=8)), r"head_dim of k .*must be that of q \(8\); got 16"),
    "short tables": (dict(rotary_cos=COS[:-1].contiguous(), rotary_sin=SIN[:-1].contiguous()), "got 48"),
    "no config": (dict(config=None), "config must be a DCAConfig"),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_cached_attention_refuses_and_leaves_the_caches_alone(name):
    changed, message = CACHED[name]
    cache = empty_cache(2, 10, KV_HEADS, DIM, torch.float32)
    arguments = dict(
        q=q_of(), k_cache=cache.k, v_cache=cache.v, rotary_cos=COS, rotary_sin=SIN, config=SMALL, k=K3, v=V3,
        cache_seqlens=0,
    ) | changed  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        dca_attention_with_kvcache(**arguments)
    assert cache.k.isnan().all()
    assert cache.v.isnan().all()


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(q=q_of(dtype=torch.float64)), "q must be float32, bfloat16 or float16; got float64"),
        (dict(q=q_of(dtype=torch.bfloat16)), "k must have the dtype of the queries or keys, bfloat16; got float32"),
        (dict(v=V3.half()), "v must have the dtype of the queries or keys, float32; got float16"),
    ],
)
def test_queries_keys_and_values_share_a_dtype_whatever_the_caches_hold(changed, message, cache_dtype):
    caches = [torch.full((2, 10, KV_HEADS, DIM), 1).to(cache_dtype) for _ in range(2)]
    scales = [torch.ones(caches[0].shape[:3] if cache_dtype == torch.int8 else 1) for _ in range(2)]
    arguments = dict(
        q=q_of(), k_cache=caches[0], v_cache=caches[1], k_scale=scales[0], v_scale=scales[1], rotary_cos=COS,
        rotary_sin=SIN, config=SMALL, k=K3, v=V3, cache_seqlens=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        dca_attention_with_kvcache(**arguments | changed)
    assert all((cache.float() == 1).all() for cache in caches)
    assert all((scale == 1).all() for scale in scales)


def test_a_bad_page_of_the_prefix_is_refused_before_the_append():
    k_cache, v_cache = (torch.full((4, 8, KV_HEADS, DIM), math.nan) for _ in range(2))
    with pytest.raises(ValueError, match="got 99 at sequence 0, page 0"):
        dca_attention_with_kvcache(
            q_of(), k_cache, v_cache, COS, SIN, SMALL, k=K3, v=V3, cache_seqlens=8,
            page_table=lengths(99, 1, 2, 3).reshape(2, 2),
        )  # fmt: skip
    assert k_cache.isnan().all()
    assert v_cache.isnan().all()


def of_each_operator():
    """Public function and all its tensors, by name."""
    q, (k, v) = q_of(), kv_of()
    tables = dict(rotary_cos=COS, rotary_sin=SIN)
    whole = dict(q=q, k=k, v=v, **tables, temperature=torch.ones(2))
    flat = {name: t[0] for name, t in (("q", q), ("k", k), ("v", v))} | tables | dict(cu_seqlens_q=lengths(0, 3))
    caches = dict(k_cache=torch.zeros(4, 8, KV_HEADS, DIM), v_cache=torch.zeros(4, 8, KV_HEADS, DIM))
    where = dict(cache_seqlens=lengths(3, 4), cache_leftpad=lengths(1, 0), page_table=lengths(0, 1, 2, 3).reshape(2, 2))
    cached = dict(q=q, **caches, **tables, **where)
    yield dca_attention, whole, {}
    yield dca_attention_varlen, flat, dict(max_seqlen_q=3)
    yield rotate_keys, dict(k=k, **tables), {}
    yield rotate_and_append_kv, dict(k=k, v=v, **caches, **tables, **where), {}
    yield dca_attention_with_kvcache, cached, {}
    yield dca_attention_with_kvcache, cached | dict(k=k, v=v, temperature=torch.ones(2)), {}
    yield dca_segment_attention, cached, dict(segment="intra")


@pytest.mark.parametrize(
    ("operator", "tensors", "others", "name"),
    [
        pytest.param(operator, tensors, others, name, id=f"{operator.__name__}-{len(tensors)}-{name}")
        for operator, tensors, others in of_each_operator()
        for name in tensors
    ],
)
def test_one_tensor_on_the_meta_device_is_refused(operator, tensors, others, name):
    before = {key: t.clone() for key, t in tensors.items()}
    with pytest.raises(ValueError, match=r"\w+ must be on the device of [qk], (cpu|meta); got (meta|cpu)"):
        operator(**tensors | {name: tensors[name].to("meta")}, **others, config=SMALL)
    assert all(torch.equal(before[key], t) for key, t in tensors.items())
    results = operator(**{key: t.to("meta") for key, t in tensors.items()}, **others, config=SMALL)
    assert all(t is None or t.device.type == "meta" for t in (results if isinstance(results, tuple) else [results]))


PAGED = {
    "page of nobody": (
        dict(page_table=lengths(0, 5, 2, 3).reshape(2, 2)),
        r"page_table entries in use .* \(4\); got 5",
    ),
    "negative page": (dict(page_table=lengths(0, 1, 2, -1).reshape(2, 2)), "got -1 at sequence 1, page 1"),
    "past capacity": (dict(cache_seqlens=30), "needs 33 slots, and it has 32"),
    "one dimension": (dict(page_table=lengths(0, 1)), "page_table must have shape"),
    "int64": (dict(page_table=torch.zeros(2, 2, dtype=torch.int64)), "page_table must be int32"),
}


@pytest.mark.parametrize("name", PAGED)
def test_paged_append_refuses_and_leaves_the_caches_alone(name):
    changed, message = PAGED[name]
    k_cache, v_cache = (torch.full((5, 16, KV_HEADS, DIM), math.nan) for _ in range(2))
    arguments = dict(
        k=K3, v=V3, k_cache=k_cache, v_cache=v_cache, rotary_cos=COS, rotary_sin=SIN, config=SMALL, cache_seqlens=15,
        page_table=lengths(0, 1, 2, 3).reshape(2, 2),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        rotate_and_append_kv(**arguments | changed)
    assert k_cache.isnan().all()
    assert v_cache.isnan().all()


SELF_KINDS = {
    "no scale": (dict(softmax_scale="x"), "softmax_scale must be a float or None; got str"),
    "no v": (dict(v=None), "v must be a tensor; got NoneType"),
    "no tables": (dict(rotary_sin=None), "rotary_sin must be a tensor; got NoneType"),
    "no flag": (dict(interleaved="x"), "interleaved must be True or False; got 'x'"),
    "no temperature": (dict(temperature=1.0), "temperature must be a tensor or None; got float"),
    "no config": (dict(config=(4, 6)), "config must be a DCAConfig; got tuple"),
}
RAGGED_KINDS = SELF_KINDS | {
    "no maximum": (dict(max_seqlen_q=None), "max_seqlen_q must be an int; got NoneType"),
    "maximum as float": (dict(max_seqlen_q=3.0), "max_seqlen_q must be an int; got float"),
    "maximum as str": (dict(max_seqlen_q="3"), "max_seqlen_q must be an int; got str"),
    "maximum as bool": (dict(max_seqlen_q=True), "max_seqlen_q must be an int; got bool"),
}


@pytest.mark.parametrize("name", RAGGED_KINDS)
def test_arguments_of_the_wrong_kind_are_type_errors(name):
    changed, message = RAGGED_KINDS[name]
    arguments = dict(q=q_of()[0], k=K3[0], v=V3[0], rotary_cos=COS, rotary_sin=SIN, config=SMALL)
    with pytest.raises(TypeError, match=message):
        dca_attention_varlen(**arguments | dict(cu_seqlens_q=lengths(0, 3), max_seqlen_q=3) | changed)
    if name in SELF_KINDS:
        with pytest.raises(TypeError, match=message):
            dca_attention(**arguments | dict(q=q_of(), k=K3, v=V3) | changed)


ROTATE_KINDS = {
    "k as list": (dict(k=[1.0]), "k must be a tensor; got list"),
    "no tables": (dict(rotary_sin=None), "rotary_sin must be a tensor; got NoneType"),
    "left padding as list": (dict(cache_leftpad=[0, 0]), "cache_leftpad must be a tensor or None; got list"),
    "no config": (dict(config=(4, 6)), "config must be a DCAConfig; got tuple"),
    "no flag": (dict(interleaved=1), "interleaved must be True or False; got 1"),
    "length as float": (dict(cache_seqlens=1.0), "cache_seqlens must be an int or an int32 tensor .*; got float"),
    "length as bool": (dict(cache_seqlens=True), "cache_seqlens must be an int or an int32 tensor .*; got bool"),
    "length beyond 32 bits": (dict(cache_seqlens=2**31), "cache_seqlens must fit in 32 bits; got 2147483648"),
    "length below 32 bits": (dict(cache_seqlens=-(2**31) - 1), "cache_seqlens must fit in 32 bits; got -2147483649"),
}
APPEND_KINDS = ROTATE_KINDS | {
    "v as list": (dict(v=[1.0]), "v must be a tensor; got list"),
    "cache as list": (dict(v_cache=[1.0]), "v_cache must be a tensor; got list"),
    "page table as list": (dict(page_table=[[0]]), "page_table must be a tensor or None; got list"),
    "borders as list": (dict(cu_seqlens_q=[0, 3], max_seqlen_q=3), "cu_seqlens_q must be a tensor; got list"),
    "maximum as bool": (dict(cu_seqlens_q=lengths(0, 3), max_seqlen_q=True), "max_seqlen_q must be an int; got bool"),
    "borders alone": (
        dict(cu_seqlens_q=lengths(0, 3, 6)),
        "cu_seqlens_q and max_seqlen_q go together; got cu_seqlens_q without max_seqlen_q",
    ),
    "a maximum alone": (
        dict(max_seqlen_q=3),
        "cu_seqlens_q and max_seqlen_q go together; got max_seqlen_q without cu_seqlens_q",
    ),
}


@pytest.mark.parametrize("name", APPEND_KINDS)
def test_rotating_and_appending_refuse_arguments_of_the_wrong_kind(name):
    changed, message = APPEND_KINDS[name]
    cache = empty_cache(2, 10, KV_HEADS, DIM, torch.float32)
    arguments = dict(k=K3, rotary_cos=COS, rotary_sin=SIN, config=SMALL)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        rotate_and_append_kv(**arguments | dict(v=V3, k_cache=cache.k, v_cache=cache.v, cache_seqlens=0) | changed)
    assert cache.k.isnan().all()
    assert cache.v.isnan().all()
    if name in ROTATE_KINDS:
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            rotate_keys(**arguments | changed)


def test_numbers_of_numpy_will_do():
    arguments = dict(q=q_of()[0], k=K3[0], v=V3[0], rotary_cos=COS, rotary_sin=SIN, config=SMALL)
    arguments["cu_seqlens_q"] = lengths(0, 3)
    out = dca_attention_varlen(**arguments, max_seqlen_q=np.int64(3), softmax_scale=np.float32(0.25))
    assert torch.equal(out, dca_attention_varlen(**arguments, max_seqlen_q=3, softmax_scale=0.25))


def test_shapes_without_what_they_need_are_refused():
    empty = torch.zeros(2, 3, KV_HEADS, 0)
    with pytest.raises(ValueError, match="head_dim must be between 1 and 1024; got 0"):
        dca_attention_with_kvcache(
            q_of(dim=0), empty, empty, COS[:, :0].contiguous(), SIN[:, :0].contiguous(), SMALL, cache_seqlens=3
        )
    borders = torch.tensor(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"must have batch \+ 1 entries in one dimension; got shape \(\)"):
        dca_attention_varlen(q_of()[0], K3[0], V3[0], borders, 3, COS, SIN, SMALL)
    with pytest.raises(ValueError, match="outs must be stacked in dimension 0"):
        merge_attention_states(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="outs must have shape"):
        merge_attention_states([torch.tensor(1.0)], [torch.tensor(1.0)])
    with pytest.raises(TypeError, match="lses must be a list of tensors"):
        merge_attention_states(torch.randn(2, 1, 3, 2, 8), 1.0)


def test_segments_and_merges_refuse():
    cache = empty_cache(2, 10, KV_HEADS, DIM, torch.float32)
    with pytest.raises(ValueError, match="segment must be one of intra, successive, inter; got 'outer'"):
        dca_segment_attention(q_of(), cache.k, cache.v, COS, SIN, SMALL, segment="outer", cache_seqlens=5)
    outs, lses = torch.randn(2, 1, 3, 2, 8), torch.randn(2, 1, 2, 3)
    with pytest.raises(ValueError, match="same number of parts, at least one; got 2 and 1"):
        merge_attention_states(outs, lses[:1])
    with pytest.raises(ValueError, match="same number of parts, at least one; got 1 and 2"):
        merge_attention_states(outs[:1], lses)
    with pytest.raises(ValueError, match="same number of parts, at least one; got 0 and 0"):
        merge_attention_states([], [])
    with pytest.raises(ValueError, match=r"lses must have shape \(1, 2, 3\); got \(1, 3, 2\)"):
        merge_attention_states(outs, lses.mT)
    with pytest.raises(ValueError, match="lses must be float32"):
        merge_attention_states(outs, lses.double())
    with pytest.raises(ValueError, match="outs must have shape"):
        merge_attention_states([outs[0], outs[1][:, :2]], list(lses))
    with pytest.raises(TypeError, match=r"outs\[1\] must be a tensor; got float"):
        merge_attention_states([outs[0], 1.0], list(lses))
    with pytest.raises(TypeError, match=r"lses\[0\] must be a tensor; got NoneType"):
        merge_attention_states(list(outs), [None, lses[1]])
    with pytest.raises(ValueError, match=r"outs\[1\] must be on the device of outs\[0\], cpu; got meta"):
        merge_attention_states([outs[0], outs[1].to("meta")], list(lses))


def test_rotate_keys_refuses():
    with pytest.raises(ValueError, match="k must have 4 dimensions"):
        rotate_keys(K3[0], COS, SIN, SMALL)
    with pytest.raises(ValueError, match="cache_seqlens must not be negative"):
        rotate_keys(K3, COS, SIN, SMALL, cache_seqlens=-1)


def test_ragged_borders_that_overrun_are_not_read_past():
    with pytest.raises(ValueError, match="must end at the number of rows"):
        dca_attention_varlen(
            torch.randn(4, HEADS, DIM), torch.randn(4, KV_HEADS, DIM), torch.randn(4, KV_HEADS, DIM),
            ragged_borders(2, 9), 9, COS, SIN, SMALL,
        )  # fmt: skip


def test_an_unknown_instruction_set_is_named():
    code = (
        "import torch, dca_ext as d; x, t = torch.zeros(1, 1, 1, 2), torch.ones(7, 1);"
        "d.dca_attention(x, x, x, t, t, d.DCAConfig(4, 6))"
    )
    environment = os.environ | {"DCA_CPU_ISA": "sse9"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "DCA_CPU_ISA must name one of the compiled instruction sets" in result.stderr.splitlines()[-1]


def test_configs_for_which_the_tables_are_too_short_name_the_rows():
    with pytest.raises(ValueError, match="= 101 rows; got 49"):
        dca_attention(q_of(), K3, V3, COS, SIN, DCAConfig(64, 100))


def test_a_refusal_is_a_value_error_also_where_torch_has_runtime_errors_only():
    """As in torch 2.15. Other errors stay what they are."""

    def as_runtime_error(operator):
        def run(*arguments):
            try:
                return operator(*arguments)
            except ValueError as error:
                raise RuntimeError(f"{error}\nException raised from somewhere") from None

        return run

    bad = (q_of(dtype=torch.float64), COS, SIN, 6, 9, None, 0, None, 0, None, False)
    with pytest.raises(ValueError, match=r"^k must be float32, bfloat16 or float16; got float64$"):
        call(as_runtime_error(torch.ops.dca_ext.rotate_keys), *bad)

    def broken(*arguments):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$"):
        call(broken)
