"""model.generate with Dual Chunk Attention: tokens equal those of recomputing every step with the slow model."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import (
    CACHE_ARGUMENT,
    FAMILIES,
    SMALL,
    assert_same,
    greedy_by_recomputing,
    logits,
    slow_model,
    tiny_model,
    tokens,
    tolerance,
)
from transformers import DynamicCache, StaticCache

from dca_ext import DCACache
from dca_ext.patch import replace_attention

NEW = 12

#: Kinds of cache: what transformers calls cache_implementation, and "dca" for a `DCACache`.
CACHES = ["dynamic", "static", "dca"]


@pytest.fixture(scope="module")
def plain():
    return tiny_model()


@pytest.fixture(scope="module")
def dca(plain):
    return replace_attention(copy.deepcopy(plain), SMALL)


@pytest.fixture(scope="module")
def slow(plain):
    return slow_model(plain)


def generate(model, ids, **kwargs):
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **kwargs}
    if kwargs.get("cache_implementation") == "dca":
        del kwargs["cache_implementation"]
        kwargs[CACHE_ARGUMENT] = DCACache(model.config)
    return model.generate(ids, **kwargs)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 12, 29])
@pytest.mark.parametrize("cache", [*CACHES, None])
def test_greedy(dca, slow, length, cache):
    ids = tokens(2, length)
    kwargs = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    assert torch.equal(generate(dca, ids, **kwargs), greedy_by_recomputing(slow, ids, NEW))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_in_all_families(family):
    model = tiny_model(family)
    ids = tokens(2, 17)
    expected = greedy_by_recomputing(slow_model(model), ids, NEW)
    replace_attention(model, SMALL)
    for cache in CACHES:
        assert torch.equal(generate(model, ids, cache_implementation=cache), expected)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.filterwarnings("ignore:1 of 2 layers")
def test_greedy_beside_a_layer_with_a_sliding_window(cache):
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ids = tokens(2, 17)
    slow = slow_model(model)
    slow.model.layers[1].self_attn = copy.deepcopy(model.model.layers[1].self_attn)
    expected = greedy_by_recomputing(slow, ids, NEW)
    assert torch.equal(generate(replace_attention(model, SMALL), ids, cache_implementation=cache), expected)


@pytest.mark.parametrize("chunk", [1, 4, 6, 7, 50])
@pytest.mark.parametrize("cache", CACHES)
def test_prefill_chunks(dca, slow, chunk, cache):
    ids = tokens(2, 20)
    actual = generate(dca, ids, prefill_chunk_size=chunk, cache_implementation=cache)
    assert torch.equal(actual, greedy_by_recomputing(slow, ids, NEW))


@pytest.mark.parametrize("implementation", ["dca", "sdpa", "eager"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "dca"},
        {"use_cache": False},
        {"cache_implementation": "dynamic", "prefill_chunk_size": 4},
        {"cache_implementation": "static", "prefill_chunk_size": 1},
        {"cache_implementation": "static", "prefill_chunk_size": 7},
    ],
    ids=lambda kwargs: "-".join(str(value) for value in kwargs.values()),
)
def test_left_padded_batches(dca, slow, kwargs, implementation):
    model = copy.deepcopy(dca)
    model.set_attn_implementation(implementation)
    lengths = (19, 11, 2)
    ids, mask = torch.zeros(3, 19, dtype=torch.long), torch.zeros(3, 19, dtype=torch.long)
    for b, length in enumerate(lengths):
        ids[b, 19 - length :] = tokens(length, seed=b)
        mask[b, 19 - length :] = 1
    actual = generate(model, ids, attention_mask=mask, **kwargs)
    for b, length in enumerate(lengths):
        expected = greedy_by_recomputing(slow, ids[b : b + 1, 19 - length :], NEW)
        assert torch.equal(actual[b : b + 1, 19 - length :], expected)


@pytest.mark.parametrize("cache", CACHES)
def test_sampling(dca, slow, cache):
    """The same seed draws the same tokens; logits differ by rounding only."""
    ids = tokens(2, 17)
    results = []
    for model, kwargs in ((dca, {"cache_implementation": cache}), (slow, {"use_cache": False})):
        torch.manual_seed(5)
        results.append(generate(model, ids, do_sample=True, temperature=0.8, top_p=0.9, **kwargs))
    assert torch.equal(*results)
    torch.manual_seed(6)
    assert not torch.equal(generate(dca, ids, do_sample=True, temperature=0.8, top_p=0.9), results[0])


@pytest.mark.parametrize("cache", CACHES)
def test_beam_search(dca, slow, cache):
    ids = tokens(2, 17)
    expected = generate(slow, ids, num_beams=3, num_return_sequences=2, use_cache=False)
    assert torch.equal(generate(dca, ids, num_beams=3, num_return_sequences=2, cache_implementation=cache), expected)
    # The beams do part, so that the cache is reordered.
    assert not torch.equal(expected[0], expected[1])


def test_beam_search_over_a_left_padded_batch(dca, slow):
    ids, mask = tokens(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[1, :8] = 0
    actual = generate(dca, ids, attention_mask=mask, num_beams=3)
    for b, begin in ((0, 0), (1, 8)):
        expected = generate(slow, ids[b : b + 1, begin:], num_beams=3, use_cache=False)
        assert torch.equal(actual[b : b + 1, begin:], expected)


@pytest.mark.parametrize("cache", [None, "dca"])
@pytest.mark.parametrize("assistant", ["same", "other", "with DCA"])
def test_assisted_generation(plain, dca, slow, assistant, cache):
    """Rejected drafts are cropped from the cache; accepted ones are verified several tokens at a time."""
    ids = tokens(1, 17)
    model = {"same": plain, "other": tiny_model(seed=9), "with DCA": copy.deepcopy(dca)}[assistant]
    actual = generate(dca, ids, assistant_model=copy.deepcopy(model), cache_implementation=cache)
    assert torch.equal(actual, greedy_by_recomputing(slow, ids, NEW))


def test_prompt_lookup(dca, slow):
    ids = tokens(1, 9).repeat(1, 3)
    # No token has id -1; some transformers cannot look up candidates without an end-of-sequence token.
    actual = generate(dca, ids, prompt_lookup_num_tokens=4, eos_token_id=-1)
    assert torch.equal(actual, greedy_by_recomputing(slow, ids, NEW))


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache, DCACache])
def test_turns_share_a_cache(dca, slow, cache_class):
    cache = cache_class(config=dca.config, **({"max_cache_len": 80} if cache_class is StaticCache else {}))
    ids = tokens(1, 8)
    for turn in range(3):
        actual = generate(dca, ids, **{CACHE_ARGUMENT: cache}, max_new_tokens=5)
        assert torch.equal(actual, greedy_by_recomputing(slow, ids, 5))
        ids = torch.cat((actual, tokens(1, 7, seed=turn)), dim=1)
    assert int(cache.get_seq_length()) == 8 + 5 + 7 + 5 + 7 + 4


def test_a_cropped_cache_goes_on(plain, dca, slow):
    ids = tokens(1, 20)
    cache = DynamicCache()
    logits(dca, ids, past=cache)
    cache.crop(-7)
    other = torch.cat((ids[:, :13], tokens(1, 9, seed=8)), dim=1)
    actual = logits(dca, other[:, 13:], past=cache)
    assert_same(actual, logits(slow, other)[:, 13:], tolerance(plain, other))


def test_half_precision_generates_the_same_with_every_cache():
    model = replace_attention(tiny_model(dtype=torch.bfloat16), SMALL)
    ids = tokens(2, 17)
    expected = generate(model, ids, cache_implementation="dynamic")
    assert expected.shape == (2, 17 + NEW)
    for cache in CACHES:
        assert torch.equal(generate(model, ids, cache_implementation=cache), expected)


def test_no_quadratic_mask_is_built(dca, monkeypatch):
    """What arrives at the layers: nothing, or the 2-D mask, and with single tokens the padding of each row."""
    seen = []
    attention = dca.model.layers[0].self_attn
    forward = attention.forward
    monkeypatch.setattr(
        attention, "forward", lambda *args, **kwargs: seen.append(kwargs["attention_mask"]) or forward(*args, **kwargs)
    )
    ids = tokens(2, 17)
    generate(dca, ids, prefill_chunk_size=5)
    assert seen == [None] * len(seen)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    for cache in CACHES:
        seen.clear()
        generate(dca, ids, attention_mask=mask, prefill_chunk_size=5, cache_implementation=cache)
        assert len(seen) == 4 + NEW - 1
        assert all(m.dim() == 2 and m.dtype == torch.bool for m in seen[:4])
        assert all(m.shape == (2,) and m.dtype == torch.int32 for m in seen[4:])
    assert seen[-1].tolist() == [0, 8]
