"""`DCACache`: copies and crops, what it holds in 8 bits, its memory. What models generate: test_generation.py."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from tiny_models import (
    CACHE_ARGUMENT,
    SMALL,
    assert_same,
    greedy_by_recomputing,
    logits,
    slow_model,
    tiny_model,
    tokens,
    tolerance,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from dca_ext import DCACache, reference, replace_attention, restore_attention
from dca_ext.dca_cache import DCACacheLayer

NEW = 12
EIGHT_BITS = [torch.float8_e4m3fn, torch.int8]


@pytest.fixture(scope="module")
def plain():
    return tiny_model()


@pytest.fixture(scope="module")
def dca(plain):
    return replace_attention(copy.deepcopy(plain), SMALL)


@pytest.fixture(scope="module")
def slow(plain):
    return slow_model(plain)


def generate(model, ids, cache):
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **{CACHE_ARGUMENT: cache})


def dequantised(cache: DCACache, layer: int = 0):
    """Keys and values (batch, slots, num_heads_kv, head_dim) that the numbers of a layer stand for, in float64."""
    held = cache.layers[layer]
    k, v = (x.transpose(1, 2).double() for x in (held.keys, held.values))
    if held.scales is None:
        return k, v
    k_scale, v_scale = (scale.double()[..., None] for scale in held.scales)
    return k * k_scale, v * v_scale


# --- Sequences and tokens come and go ---------------------------------------------------------------------------------


def test_a_copy_goes_its_own_way(dca, slow):
    """A prompt that several continuations share, also through pickle."""
    prompt, cache = tokens(1, 20), DCACache(dca.config)
    logits(dca, prompt, past=cache)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        ids = torch.cat((prompt, tokens(1, 4, seed=7)), dim=1)
        assert torch.equal(generate(dca, ids, copied), greedy_by_recomputing(slow, ids, NEW))
    ids = torch.cat((prompt, tokens(1, 1, seed=8)), dim=1)
    assert torch.equal(generate(dca, ids, cache), greedy_by_recomputing(slow, ids, NEW))


@pytest.mark.parametrize(("remove", "left"), [(-7, 13), (13, 13), (40, 20), (0, 20), (-40, 0)])
def test_crop(plain, dca, slow, remove, left):
    ids, cache = tokens(1, 20), DCACache(dca.config)
    logits(dca, ids, past=cache)
    cache.crop(remove)
    assert cache.get_seq_length() == left
    other = torch.cat((ids[:, :left], tokens(1, 9, seed=8)), dim=1)
    actual = logits(dca, other[:, left:], past=cache)
    assert_same(actual, logits(slow, other)[:, left:], tolerance(plain, other))


@pytest.mark.parametrize("dtype", [None, *EIGHT_BITS])
def test_sequences_are_chosen_and_repeated(dca, dtype):
    ids, cache = tokens(3, 20), DCACache(dca.config, dtype=dtype)
    logits(dca, ids, past=cache)
    before = dequantised(cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0]))
    for now, then in zip(dequantised(cache), before, strict=True):
        assert torch.equal(now, then[[2, 0]])
    cache.reorder_cache(torch.tensor([1, 1]))
    for now, then in zip(dequantised(cache), before, strict=True):
        assert torch.equal(now, then[[0, 0]])
    assert logits(dca, tokens(2, 3), past=cache).isfinite().all()


# --- In 8 bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_the_numbers_held_are_keys_and_values_rounded_once(dca, dtype):
    exact, cache = DCACache(dca.config), DCACache(dca.config, dtype=dtype)
    ids = tokens(2, 20)
    for past in (exact, cache):
        logits(dca, ids[:, :15], past=past)
        logits(dca, ids[:, 15:], past=past)
    assert cache.layers[0].keys.dtype == dtype
    for actual, expected in zip(dequantised(cache), dequantised(exact), strict=True):
        # A number of e4m3 has 3 bits behind its first, one of int8 is a multiple of 1/127 of its row's largest.
        step = expected.abs() / 8 if dtype == torch.float8_e4m3fn else expected.abs().amax(-1, keepdim=True) / 127
        least = expected.abs().amax() / 2**14
        assert ((actual - expected).abs() <= step / 2 * 1.001 + least).all()


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_attention_is_over_the_numbers_held(dca, dtype):
    """The reference over what they stand for."""
    layer = DCACacheLayer(dtype)
    generator = torch.Generator().manual_seed(3)
    cos, sin = dca.model.layers[0].self_attn.rotary_tables.on("cpu")
    for before, new in ((0, 14), (14, 1), (15, 5)):
        q, k, v = (torch.randn(2, new, heads, 16, generator=generator) for heads in (4, 2, 2))
        out = layer.append_and_attend(q, k, v, cos, sin, SMALL, cache_leftpad=None)
        cache = DCACache(dca.config)
        cache.layers[0] = layer
        keys, values = dequantised(cache)
        expected = reference.dca_attention_with_kvcache(
            q.double(), keys, values, cos.double(), sin.double(), SMALL, cache_seqlens=before + new
        )
        assert_same(out.double(), expected, 1e-5 * float(expected.abs().max()))


def test_scales_of_e4m3_come_with_the_first_tokens_and_stay(dca):
    cache = DCACache(dca.config, dtype=torch.float8_e4m3fn)
    assert cache.layers[0].scales is None
    logits(dca, tokens(1, 20), past=cache)
    first = [scale.clone() for scale in cache.layers[0].scales]
    logits(dca, tokens(1, 7, seed=4), past=cache)
    assert all(torch.equal(a, b) for a, b in zip(first, cache.layers[0].scales, strict=True))
    wider = DCACache(dca.config, dtype=torch.float8_e4m3fn, scale_margin=4)
    logits(dca, tokens(1, 20), past=wider)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, wider.layers[0].scales, strict=True))
    for seed, empty in ((5, cache.reset), (6, lambda: cache.crop(-20))):
        empty()
        logits(dca, tokens(1, 20, seed=seed), past=cache)
        assert not torch.equal(first[0], cache.layers[0].scales[0])
        first = [scale.clone() for scale in cache.layers[0].scales]


# --- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, *EIGHT_BITS])
def test_it_grows_and_keeps_what_it_holds(dca, dtype):
    small, large = DCACache(dca.config, dtype=dtype, capacity=8), DCACache(dca.config, dtype=dtype, capacity=500)
    for begin, end in ((0, 5), (5, 8), (8, 9), (9, 280), (280, 400)):
        ids = tokens(2, end - begin, seed=begin)
        assert torch.equal(logits(dca, ids, past=small), logits(dca, ids, past=large))
    assert small.get_seq_length() == 400
    for actual, expected in zip(dequantised(small, 1), dequantised(large, 1), strict=True):
        assert torch.equal(actual, expected)


def test_steps_and_beams_write_in_place(dca):
    cache = DCACache(dca.config, capacity=40)
    logits(dca, tokens(2, 20), past=cache)
    places = cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr()
    for _ in range(20):
        logits(dca, tokens(2, 1), past=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    logits(dca, tokens(2, 40), past=cache)
    assert (cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr()) == places


def test_a_refused_call_leaves_the_cache_as_it_was(dca, slow):
    ids, cache = tokens(1, 20), DCACache(dca.config)
    logits(dca, ids[:, :12], past=cache)
    with pytest.raises(ValueError, match="the batch must have the 1 sequences of the cache; got 2"):
        logits(dca, tokens(2, 3), past=cache)
    assert cache.get_seq_length() == 12
    assert torch.equal(generate(dca, ids, cache), greedy_by_recomputing(slow, ids, NEW))


def test_an_emptied_cache_takes_another_batch(dca, slow):
    cache = DCACache(dca.config)
    logits(dca, tokens(3, 20), past=cache)
    cache.reset()
    ids = tokens(2, 9)
    assert torch.equal(generate(dca, ids, cache), greedy_by_recomputing(slow, ids, NEW))


def test_a_layer_with_a_sliding_window_has_what_it_has_elsewhere():
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    kinds = [type(layer) for layer in DCACache(model.config).layers]
    assert kinds == [DCACacheLayer, DynamicSlidingWindowLayer]


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_a_model_without_dca_is_told_so(plain, dca):
    for model in (plain, restore_attention(copy.deepcopy(dca))):
        with pytest.raises(TypeError, match=r"DCACache is for DCA layers; call dca_ext\.replace_attention"):
            logits(model, tokens(1, 4), past=DCACache(model.config))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.float8_e5m2}, TypeError, "dtype must be None, torch.float8_e4m3fn or torch.int8"),
        ({"dtype": torch.bfloat16}, TypeError, "dtype must be None"),
        ({"capacity": -1}, ValueError, "capacity must not be negative; got -1"),
        ({"scale_margin": 0.5}, ValueError, "scale_margin must be at least 1; got 0.5"),
    ],
)
def test_arguments(dca, arguments, error, message):
    with pytest.raises(error, match=message):
        DCACache(dca.config, **arguments)


def test_the_model_itself_is_no_config(dca):
    with pytest.raises(TypeError, match=r"config must be a transformers config, such as model.config; got Llama"):
        DCACache(dca)


def test_generate_says_nothing_of_it(dca):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(dca, tokens(1, 5), DCACache(dca.config, dtype=torch.int8))
