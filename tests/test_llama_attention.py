"""DCALlamaAttention and its siblings in whole models: against transformers below max_position + 1, against the slow
model above, for every form in which padding and positions arrive."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import (
    FAMILIES,
    ROPE_PARAMETERS,
    SMALL,
    assert_same,
    cast,
    logits,
    slow_model,
    tiny_config,
    tiny_model,
    tokens,
    tolerance,
)
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

from dca_ext import cache as cache_module
from dca_ext import reference
from dca_ext.attention import DCALlamaAttention
from dca_ext.config import DCAConfig
from dca_ext.patch import replace_attention

P = SMALL.max_position


def with_dca(plain, dca_config=SMALL, **kwargs):
    return replace_attention(copy.deepcopy(plain), dca_config, **kwargs)


# --- Against transformers and against the slow model -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_up_to_max_position_plus_one_tokens_nothing_changes(family):
    plain = tiny_model(family)
    ids = tokens(2, P + 1)
    assert_same(logits(with_dca(plain), ids), logits(plain, ids), tolerance(plain, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_row_after_that_is_the_first_that_differs(family):
    plain = tiny_model(family)
    ids = tokens(1, P + 2)
    difference = (logits(with_dca(plain), ids) - logits(plain, ids)).abs().amax(dim=(0, 2))
    assert difference[P + 1] > 100 * tolerance(plain, ids)
    assert difference[: P + 1].max() <= tolerance(plain, ids)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 11, 12, 13, 41])
def test_long_sequences_equal_the_slow_model(length):
    plain = tiny_model()
    ids = tokens(2, length)
    assert_same(logits(with_dca(plain), ids), logits(slow_model(plain), ids), tolerance(plain, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_equal_their_slow_models(family):
    plain = tiny_model(family)
    ids = tokens(2, 40)
    assert_same(logits(with_dca(plain), ids), logits(slow_model(plain), ids), tolerance(plain, ids))


@pytest.mark.parametrize(("heads", "heads_kv"), [(1, 1), (4, 4), (4, 1), (8, 1), (8, 2)])
def test_head_ratios(heads, heads_kv):
    plain = tiny_model(num_attention_heads=heads, num_key_value_heads=heads_kv)
    ids = tokens(1, 30)
    assert_same(logits(with_dca(plain), ids), logits(slow_model(plain), ids), tolerance(plain, ids))


def test_the_modules_own_scaling_holds():
    plain = tiny_model()
    for layer in plain.model.layers:
        layer.self_attn.scaling = 0.4
    dca = with_dca(plain)
    ids = tokens(1, P + 1)
    assert_same(logits(dca, ids), logits(plain, ids), tolerance(plain, ids))
    # The same through a cache and through packing.
    assert_same(logits(dca, ids, past=DynamicCache()), logits(plain, ids), tolerance(plain, ids))
    packed = logits(dca, ids, cu_seq_lens_q=torch.tensor([0, P + 1], dtype=torch.int32))
    assert_same(packed, logits(plain, ids), tolerance(plain, ids))


@pytest.mark.parametrize("dca_config", [DCAConfig(1, 1), DCAConfig(4, 4), DCAConfig(7, 13), DCAConfig(5, 8)])
def test_geometries(dca_config):
    plain = tiny_model()
    ids = tokens(1, 30)
    assert_same(
        logits(with_dca(plain, dca_config), ids), logits(slow_model(plain, dca_config), ids), tolerance(plain, ids)
    )


@pytest.mark.parametrize("rope_type", ROPE_PARAMETERS)
def test_rope_types(rope_type):
    # 20 positions: longrope (16 originally) is frozen at its long factors, as the plain model from 17 tokens on.
    dca_config = DCAConfig(12, 19)
    plain = tiny_model(rope_parameters=ROPE_PARAMETERS[rope_type])
    dca = with_dca(plain, dca_config)
    for length in (20, 60):
        ids = tokens(1, length)
        expected = plain if length == 20 else slow_model(plain, dca_config)
        assert_same(logits(dca, ids), logits(expected, ids), tolerance(plain, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_partial_rotary_factor_is_ignored_as_by_the_plain_model(family):
    plain = tiny_model(family, rope_parameters={**ROPE_PARAMETERS["default"], "partial_rotary_factor": 0.5})
    ids = tokens(1, P + 1)
    assert_same(logits(with_dca(plain), ids), logits(plain, ids), tolerance(plain, ids))


def test_dynamic_frequencies_frozen_at_a_stated_length():
    plain = tiny_model(rope_parameters=ROPE_PARAMETERS["dynamic"])
    dca_config = DCAConfig(70, 130)
    ids = tokens(1, 120)
    # At 120 tokens the plain model takes the frequencies of 120 tokens, here the stated length.
    dca = with_dca(plain, dca_config, rope_length=120)
    expected = logits(copy.deepcopy(plain), ids)
    assert_same(logits(dca, ids), expected, tolerance(plain, ids))
    assert (logits(with_dca(plain, dca_config), ids) - expected).abs().max() > 100 * tolerance(plain, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_half_precision_is_as_near_to_fp32_as_transformers_is(family, dtype):
    """transformers rounds cosines to the dtype, dca_ext does not, so both are held against the fp32 model."""
    plain = tiny_model(family, dtype=dtype)
    exact = cast(copy.deepcopy(plain), torch.float32)
    ids = tokens(2, P + 1)
    rounding = (logits(plain, ids) - logits(exact, ids)).abs().max()
    assert_same(logits(with_dca(plain), ids), logits(exact, ids), 2 * rounding.item())
    ids = tokens(1, 40)
    assert_same(logits(with_dca(plain), ids), logits(slow_model(exact), ids), 2 * rounding.item())


def test_under_autocast():
    """Qwen3's norms give fp32 there, beside values in bf16."""
    plain = tiny_model("qwen3")
    ids = tokens(1, 30)
    exact = logits(slow_model(plain), ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounding = (logits(plain, ids[:, : P + 1]) - exact[:, : P + 1]).abs().max()
        actual = logits(with_dca(plain), ids)
    assert_same(actual, exact, 3 * rounding.item())


def test_a_module_alone_is_a_drop_in():
    """The constructor, parameter names, signature and return value of LlamaAttention."""
    config = tiny_config()
    torch.manual_seed(0)
    attention = DCALlamaAttention(config, 0, SMALL).eval()
    assert [name for name, _ in attention.named_parameters()] == [f"{p}_proj.weight" for p in "qkvo"]
    assert not list(attention.buffers())
    hidden = torch.randn(2, 20, 64)
    with torch.no_grad():
        out, weights = attention(hidden)
        cos, sin = attention.rotary_tables.on(hidden.device)
        q, k, v = (
            nn.functional.linear(hidden, p.weight).view(2, 20, -1, 16)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        expected = reference.dca_attention(q, k, v, cos, sin, SMALL).flatten(-2) @ attention.o_proj.weight.T
    assert weights is None
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_head_counts_come_from_the_projections():
    """Under tensor parallelism a layer holds some of the heads; the sum of the parts is the whole."""
    plain = tiny_model()
    whole = with_dca(plain).model.layers[0].self_attn
    hidden = torch.randn(1, 20, 64)
    total = 0
    for part in (0, 1):
        half = copy.deepcopy(whole)
        for projection in (half.q_proj, half.k_proj, half.v_proj):
            projection.weight = nn.Parameter(projection.weight.chunk(2, dim=0)[part])
        half.o_proj.weight = nn.Parameter(half.o_proj.weight.chunk(2, dim=1)[part])
        with torch.no_grad():
            total = total + half(hidden)[0]
    with torch.no_grad():
        torch.testing.assert_close(total, whole(hidden)[0], rtol=1e-5, atol=1e-5)


# --- Padding and positions -------------------------------------------------------------------------------------------


def padded_batch(side: str):
    """Sequences of 23, 17 and 1 tokens in one batch, its mask, and where each begins."""
    lengths = (23, 17, 1)
    ids, mask = torch.zeros(3, 23, dtype=torch.long), torch.zeros(3, 23, dtype=torch.long)
    begins = []
    for b, length in enumerate(lengths):
        begin = 23 - length if side == "left" else 0
        ids[b, begin : begin + length] = tokens(length, seed=b)
        mask[b, begin : begin + length] = 1
        begins.append(begin)
    return ids, mask, begins, lengths


def mask_in_form(form: str, mask: torch.Tensor):
    """The 2-D mask as users and transformers pass it."""
    if form == "2-D int":
        return mask
    if form == "2-D bool":
        return mask.bool()
    seqlen = mask.shape[1]
    four = mask.bool()[:, None, None, :] & torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    if form == "4-D bool":
        return four
    lowest = {"4-D float": torch.finfo(torch.float32).min, "4-D -inf": -float("inf"), "4-D -1e4": -1e4}[form]
    return torch.where(four, 0.0, lowest)


@pytest.mark.parametrize("implementation", ["dca", "sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["2-D int", "2-D bool", "4-D bool", "4-D float", "4-D -inf", "4-D -1e4"])
def test_a_padded_batch_equals_single_sequences(side, form, implementation):
    plain = tiny_model()
    dca, slow = with_dca(plain), slow_model(plain)
    dca.set_attn_implementation(implementation)
    ids, mask, begins, lengths = padded_batch(side)
    actual = logits(dca, ids, attention_mask=mask_in_form(form, mask))
    for b, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        sequence = ids[b : b + 1, begin : begin + length]
        assert_same(actual[b : b + 1, begin : begin + length], logits(slow, sequence), tolerance(plain, ids[:1]))


@pytest.mark.parametrize("implementation", ["dca", "sdpa"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("original", [8, 20])
def test_the_temperature_of_a_padded_row_is_that_of_the_row_alone(original, side, cached, implementation):
    plain = tiny_model()
    dca = with_dca(plain, DCAConfig(6, 9, "yarn", original))
    dca.set_attn_implementation(implementation)
    ids, mask, begins, lengths = padded_batch(side)
    actual = logits(dca, ids, attention_mask=mask, use_cache=cached)
    for b, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        expected = logits(dca, ids[b : b + 1, begin : begin + length])
        assert_same(actual[b : b + 1, begin : begin + length], expected, tolerance(plain, ids[:1]))


def test_the_temperature_of_two_tokens_does_not_count_the_padding_behind_the_first():
    plain = tiny_model()
    dca = with_dca(plain, DCAConfig(6, 9, "yarn", 1))
    ids, mask, cache = tokens(1, 9), torch.ones(1, 9, dtype=torch.long), DynamicCache()
    mask[:, 8] = 0
    logits(dca, ids[:, :7], past=cache)
    alone = copy.deepcopy(cache)
    actual = logits(dca, ids[:, 7:], attention_mask=mask, past=cache)
    assert_same(actual[:, :1], logits(dca, ids[:, 7:8], past=alone), tolerance(plain, ids))


@pytest.mark.parametrize("dca_config", [SMALL, DCAConfig(6, 9, "yarn", 8)])
@pytest.mark.parametrize("form", ["2-D bool", "4-D bool", "1-D"])
def test_one_row_of_a_mask_is_for_all_sequences(form, dca_config):
    attention = with_dca(tiny_model(), dca_config).model.layers[0].self_attn
    hidden, mask = torch.randn(2, 20, 64), torch.ones(1, 20, dtype=torch.long)
    mask[:, :6] = 0
    expected, _ = attention(hidden[:, 6:])
    # 1-D is the padding itself, which `leftpad_mask` gives as int32; any integers will do.
    mask = torch.tensor([6]) if form == "1-D" else mask_in_form(form, mask)
    torch.testing.assert_close(attention(hidden, attention_mask=mask)[0][:, 6:], expected)


def test_without_padding_there_is_none():
    mask, positions = torch.ones(2, 5), torch.arange(5)[None]
    assert cache_module.left_padding(mask, None, 0, 2, 5) is None
    assert cache_module.left_padding(None, positions, 0, 2, 5) is None
    # Nor in calls without tokens or sequences.
    assert cache_module.left_padding(None, positions[:, :0], 0, 2, 0) is None
    assert cache_module.left_padding(torch.ones(0, 1, 5, 5).tril(), None, 0, 0, 5) is None


@pytest.mark.parametrize("fill", [0, 1])
def test_positions_in_trailing_padding_do_not_matter(fill):
    plain = tiny_model()
    dca, slow = with_dca(plain), slow_model(plain)
    ids, mask, _, lengths = padded_batch("right")
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
    actual = logits(dca, ids, attention_mask=mask, position_ids=position_ids)
    for b, length in enumerate(lengths):
        assert_same(actual[b : b + 1, :length], logits(slow, ids[b : b + 1, :length]), tolerance(plain, ids[:1]))


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("cached", [False, True])
def test_without_a_mask_padding_follows_from_position_ids(fill, cached):
    plain = tiny_model()
    dca, slow = with_dca(plain), slow_model(plain)
    ids, mask, begins, lengths = padded_batch("left")
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
    if cached:
        cache = DynamicCache()
        parts = [
            logits(dca, ids[:, part], position_ids=position_ids[:, part], past=cache)
            for part in (slice(0, 9), slice(9, 22), slice(22, 23))
        ]
        actual = torch.cat(parts, dim=1)
        # What a part cannot know: that a row without any token so far is padding.
        begins = [max(begin, 9) if begin == 6 else begin for begin in begins]
    else:
        actual = logits(dca, ids, position_ids=position_ids)
    for b, length in enumerate(lengths):
        expected = logits(slow, ids[b : b + 1, 23 - length :])
        n = 23 - begins[b]
        assert_same(actual[b : b + 1, -n:], expected[:, -n:], tolerance(plain, ids[:1]))


def test_positions_may_count_through_a_part_that_is_padding_alone():
    plain = tiny_model()
    dca = with_dca(plain)
    ids, positions, cache = tokens(1, 23), torch.arange(-9, 14)[None], DynamicCache()
    parts = (slice(0, 5), slice(5, 23))
    actual = [logits(dca, ids[:, part], position_ids=positions[:, part], past=cache) for part in parts][1]
    assert_same(actual[:, 4:], logits(slow_model(plain), ids[:, 9:]), tolerance(plain, ids))


def test_a_mask_goes_before_position_ids():
    """model(ids, attention_mask=mask) without position_ids: transformers counts slots, padding included."""
    plain = tiny_model()
    dca, slow = with_dca(plain), slow_model(plain)
    ids, mask, begins, _ = padded_batch("left")
    actual = logits(dca, ids, attention_mask=mask, position_ids=torch.arange(23)[None])
    assert_same(actual[1:2, begins[1] :], logits(slow, ids[1:2, begins[1] :]), tolerance(plain, ids[:1]))


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("with_positions", [False, True])
def test_positions_in_a_cache(cache_class, with_positions):
    """With position_ids and, from the cache's length, without them; parts of 1 to 13 tokens across chunk borders."""
    plain = tiny_model()
    dca = with_dca(plain)
    ids = tokens(2, 32)
    cache = DynamicCache() if cache_class is DynamicCache else StaticCache(config=dca.config, max_cache_len=40)
    parts, begin = [], 0
    for length in (5, 1, 1, 13, 6, 1, 5):
        kwargs = {"position_ids": torch.arange(begin, begin + length)[None].expand(2, -1)} if with_positions else {}
        parts.append(logits(dca, ids[:, begin : begin + length], past=cache, **kwargs))
        begin += length
    assert_same(torch.cat(parts, dim=1), logits(slow_model(plain), ids), tolerance(plain, ids))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_may_come_by_the_name_of_any_version_of_transformers(name):
    attention = with_dca(tiny_model()).model.layers[0].self_attn
    hidden, cache = torch.randn(1, 20, 64), DynamicCache()
    whole, _ = attention(hidden)
    parts = [attention(hidden[:, part], **{name: cache})[0] for part in (slice(0, 13), slice(13, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_cache_by_another_name_is_not_passed_over():
    attention = with_dca(tiny_model()).model.layers[0].self_attn
    with pytest.raises(TypeError, match="kv_store must not be a cache: Dual Chunk Attention takes it as past_key_v"):
        attention(torch.randn(1, 3, 64), kv_store=DynamicCache())


def test_the_cache_of_continuous_batching_is_refused():
    attention = with_dca(tiny_model()).model.layers[0].self_attn
    paged = type("PagedAttentionCache", (), {"update": None})()
    for kwargs in ({}, {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32)}):
        with pytest.raises(TypeError, match=r"must be a transformers Cache; got PagedAttentionCache: .*generate_batch"):
            attention(torch.randn(1, 3, 64), cache=paged, **kwargs)


def test_the_cache_holds_keys_rotated_once():
    plain = tiny_model()
    dca = with_dca(plain)
    ids = tokens(1, 20)
    cache = DynamicCache()
    logits(dca, ids, past=cache)
    attention = dca.model.layers[0].self_attn
    with torch.no_grad():
        hidden = dca.model.layers[0].input_layernorm(dca.model.embed_tokens(ids))
        k = attention.k_proj(hidden).view(20, 2, 16).double()
    positions = torch.arange(20) % SMALL.chunk_len
    expected = reference.rope(k, positions, *attention.rotary_tables.on(k.device)).transpose(0, 1)
    torch.testing.assert_close(cache.layers[0].keys[0], expected.float(), rtol=1e-5, atol=1e-6)


# --- Packed sequences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences_equal_single_ones(use_cache):
    plain = tiny_model()
    dca, slow = with_dca(plain), slow_model(plain)
    lengths = (13, 1, 21)
    ids = tokens(1, sum(lengths))
    borders = torch.tensor([0, 13, 14, 35], dtype=torch.int32)
    actual = logits(
        dca,
        ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens_q=borders,
        cu_seq_lens_k=borders,
        max_length_q=21,
        max_length_k=21,
        use_cache=use_cache,
    )
    for begin, end in ((0, 13), (13, 14), (14, 35)):
        assert_same(actual[:, begin:end], logits(slow, ids[:, begin:end]), tolerance(plain, ids))


@pytest.mark.parametrize("max_length", [None, torch.tensor(12)])
def test_packed_sequences_without_a_max_length_on_the_host(max_length):
    plain = tiny_model()
    dca = with_dca(plain)
    ids = tokens(1, 20)
    borders = torch.tensor([0, 8, 20], dtype=torch.int32)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    actual = logits(dca, ids, position_ids=positions, cu_seq_lens_q=borders, max_length_q=max_length)
    assert_same(actual[:, 8:], logits(slow_model(plain), ids[:, 8:]), tolerance(plain, ids))


def test_packed_sequences_are_not_continued():
    dca = with_dca(tiny_model())
    cache = DynamicCache()
    logits(dca, tokens(1, 4), past=cache)
    borders = torch.tensor([0, 3, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q must come without cached tokens"):
        logits(dca, tokens(1, 5), past=cache, cu_seq_lens_q=borders)
    with pytest.raises(ValueError, match="cu_seq_lens_q needs a batch of one packed row; got 2 rows"):
        logits(dca, tokens(2, 5), cu_seq_lens_q=borders, use_cache=False)


@pytest.mark.parametrize("positions", [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 2, 3, 4, 5]])
@pytest.mark.parametrize("implementation", ["dca", "sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_positions_that_restart_are_refused(positions, use_cache, implementation):
    dca = with_dca(tiny_model())
    dca.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=r"position_ids must count up .*pass cu_seq_lens_q"):
        logits(dca, tokens(1, 7), position_ids=torch.tensor([positions]), use_cache=use_cache)


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_restart_at_the_last_token_is_refused(use_cache):
    dca = with_dca(tiny_model())
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0]])
    with pytest.raises(ValueError, match=r"position_ids must count up .*pass cu_seq_lens_q"):
        logits(dca, tokens(1, 7), position_ids=positions, use_cache=use_cache)


@pytest.mark.parametrize(
    "positions",
    [
        [0, 1, 2, 3, 4, 5, 5, 5, 5],
        [0, 1, 2, 3, 3],
        [0, 2, 4, 5, 5, 5],
        [0, 2, 3, 4, 5, 5],
        [0, 0, 2, 2, 4, 5],
    ],
)
def test_positions_that_stand_still_or_skip_are_refused_without_a_mask(positions):
    dca = with_dca(tiny_model())
    positions = torch.stack((torch.arange(len(positions)), torch.tensor(positions)))
    cache = DynamicCache()
    with pytest.raises(ValueError, match=r"position_ids must count up by one; those of row 1 do not: .*attention_mask"):
        logits(dca, tokens(*positions.shape), position_ids=positions, past=cache)
    assert cache.get_seq_length() == 0


def test_positions_that_stand_still_behind_cached_tokens_are_refused():
    dca = with_dca(tiny_model())
    cache = DynamicCache()
    logits(dca, tokens(1, 9), past=cache)
    with pytest.raises(ValueError, match="position_ids must count up by one; those of row 0 do not"):
        logits(dca, tokens(1, 3), position_ids=torch.tensor([[7, 7, 8]]), past=cache)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("positions", [[0, 0, 0], [1, 1, 1], [0, 0, 0, 1, 2], [1, 1, 0, 1], [-2, -1, 0, 1], [2, 2, 0]])
def test_positions_of_padding_in_front_may_stand_still_or_count(positions):
    dca = with_dca(tiny_model())
    last = positions[-1] + 1
    actual = logits(dca, tokens(1, len(positions)), position_ids=torch.tensor([positions]))
    expected = logits(dca, tokens(1, len(positions))[:, -last:])
    torch.testing.assert_close(actual[:, -last:], expected)


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["dca", "sdpa", "eager"])
def test_masks_with_holes_are_refused(implementation):
    dca = with_dca(tiny_model())
    dca.set_attn_implementation(implementation)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 4] = 0
    cache = DynamicCache()
    with pytest.raises(ValueError, match=r"attention_mask must be zero only before .* row 1 has a hole"):
        logits(dca, tokens(2, 12), attention_mask=mask, past=cache)
    assert cache.get_seq_length() == 0


def masks_that_are_not_causal():
    """Bool (12, 12), and the first row that is another."""
    row, slot = torch.arange(12)[:, None], torch.arange(12)
    causal = slot <= row
    hole = causal.clone()
    hole[7, 2] = False
    yield "packed", causal & (slot // 5 == row // 5), 1
    yield "packed, then padding", causal & (slot // 5 == row // 5) & (row < 10), 1
    yield "window", causal & (slot > row - 4), 1
    yield "prefix", causal | (slot < 4), 0
    yield "bidirectional", torch.ones(12, 12, dtype=torch.bool), 0
    yield "hole", hole, 7
    causal = causal & (slot < 10)
    hole = causal.clone()
    hole[9, 2] = False
    yield "hole, then padding", hole, 9


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize(
    ("mask", "row"), [pytest.param(mask, row, id=name) for name, mask, row in masks_that_are_not_causal()]
)
def test_masks_that_are_not_causal_are_refused(mask, row, form):
    dca = with_dca(tiny_model())
    mask = torch.stack((torch.ones(12, 12).tril().bool(), mask))[:, None]
    if form == "float":
        mask = torch.where(mask, 0.0, -torch.inf)
    cache = DynamicCache()
    with pytest.raises(ValueError, match=f"must be causal from .*got another row {row} for sequence 1: .*cu_seq_lens"):
        logits(dca, tokens(2, 12), attention_mask=mask, past=cache)
    assert cache.get_seq_length() == 0


def test_masks_that_are_not_causal_in_one_head_are_refused():
    attention = with_dca(tiny_model()).model.layers[0].self_attn
    mask = torch.ones(12, 12).tril().bool().repeat(2, 4, 1, 1)
    attention(torch.zeros(2, 12, 64), attention_mask=mask)
    mask[1, 3, :, 10:] = False
    with pytest.raises(ValueError, match="got another row 10 for sequence 1"):
        attention(torch.zeros(2, 12, 64), attention_mask=mask)


def test_masks_and_positions_with_a_static_cache_are_looked_through_as_well():
    dca = with_dca(tiny_model())
    cache = StaticCache(config=dca.config, max_cache_len=40)
    logits(dca, tokens(1, 5), past=cache)
    mask = torch.ones(12, 40).tril(5).bool()[None, None]
    mask[..., 7, 2] = False
    with pytest.raises(ValueError, match="got another row 7 for sequence 0"):
        logits(dca, tokens(1, 12), attention_mask=mask, past=cache)
    borders = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q must come without cached tokens"):
        logits(dca, tokens(1, 3), cu_seq_lens_q=borders, past=cache)
    assert int(cache.get_seq_length()) == 5


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("padding", ["nothing", "everything", "itself"])
def test_what_padding_sees_does_not_matter(padding, inference):
    plain = tiny_model()
    dca, slow = with_dca(plain), slow_model(plain)
    ids = tokens(1, 23)
    with torch.inference_mode(inference):
        mask = torch.ones(1, 1, 23, 23).tril().bool()
        mask[..., :6] = False
        seen = {"nothing": 0, "everything": torch.ones(6, 23), "itself": torch.eye(6, 23)}
        mask[:, :, :6] = torch.as_tensor(seen[padding]).bool()
        actual = logits(dca, ids, attention_mask=mask)
    assert_same(actual[:, 6:], logits(slow, ids[:, 6:]), tolerance(plain, ids))


def test_a_mask_is_looked_through_once_unless_written_to(monkeypatch):
    dca = with_dca(tiny_model())
    calls = []
    check = cache_module._rows_not_causal
    monkeypatch.setattr(cache_module, "_rows_not_causal", lambda *args: calls.append(args) or check(*args))
    mask = torch.ones(1, 1, 12, 12).tril().bool()
    logits(dca, tokens(1, 12), attention_mask=mask)
    assert len(calls) == 1
    mask[..., 3, 1] = False
    with pytest.raises(ValueError, match="got another row 3 for sequence 0"):
        logits(dca, tokens(1, 12), attention_mask=mask)


def test_a_mask_is_looked_through_anew_behind_other_slots():
    dca = with_dca(tiny_model())
    cache = DynamicCache()
    logits(dca, tokens(1, 5), past=cache)
    mask = torch.ones(5, 10).tril(5).bool()[None, None]
    logits(dca, tokens(1, 5), attention_mask=mask, past=cache)
    with pytest.raises(ValueError, match="got another row 0 for sequence 0"):
        logits(dca, tokens(1, 5), attention_mask=mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 1, 1, 12).bool(), "a 4-D attention_mask must have a row for each of the 12 new tokens; got 1"),
        (torch.ones(2, 1, 12), "attention_mask must be 2-D or 4-D with 2 rows, or one"),
        (torch.ones(3, 12), "attention_mask must be 2-D or 4-D with 2 rows, or one; got shape"),
        (torch.ones(2, 5), "attention_mask must cover the 0 cached tokens and the 12 new ones; got 5 columns"),
        (torch.full((2, 1, 12, 12), -0.5), "attention_mask must hold 0 or values of at most -10000"),
        (torch.full((2, 1, 12, 12), 0.5), "attention_mask must hold 0 or values of at most -10000"),
        (torch.ones(2, 1, 12, 12, dtype=torch.long), "4-D attention_mask must be bool or floating point"),
        ("causal", "attention_mask must be None or a 2-D or 4-D tensor; got str: flex_attention is not supported, use"),
    ],
)
def test_masks_of_other_forms_are_refused(mask, message):
    attention = with_dca(tiny_model()).model.layers[0].self_attn
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(2, 12, 64), attention_mask=mask)


def test_positions_beyond_the_last_slot_are_refused():
    dca = with_dca(tiny_model())
    for first in (1, 5):
        with pytest.raises(ValueError, match=f"position_ids must end at or below the last slot, 4; got {first + 4}"):
            logits(dca, tokens(1, 5), position_ids=torch.arange(first, first + 5)[None])
    with pytest.raises(ValueError, match="position_ids must be 2-D with 1 rows, or one"):
        dca.model.layers[0].self_attn(torch.zeros(1, 5, 64), position_ids=torch.arange(5))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 4, 6])
def test_positions_of_another_length_are_refused(length, masked):
    attention = with_dca(tiny_model()).model.layers[0].self_attn
    mask = torch.ones(1, 5) if masked else None
    with pytest.raises(ValueError, match=f"position_ids must have a column for each of the 5 new tokens; got {length}"):
        attention(torch.zeros(1, 5, 64), attention_mask=mask, position_ids=torch.arange(length)[None])


def test_dropout_is_refused_in_training_only():
    dca = with_dca(tiny_model(attention_dropout=0.1))
    logits(dca, tokens(1, 5))
    with pytest.raises(ValueError, match=r"attention_dropout must be 0 in training with DCA; got 0\.1"):
        logits(dca.train(), tokens(1, 5))


def test_bidirectional_attention_is_refused():
    with pytest.raises(ValueError, match="is_causal must be True"):
        logits(with_dca(tiny_model()), tokens(1, 5), is_causal=False)
    attention = with_dca(tiny_model()).model.layers[0].self_attn
    hidden = torch.randn(1, 5, 64)
    assert torch.equal(attention(hidden, is_causal=True)[0], attention(hidden)[0])


def test_layers_made_bidirectional_are_refused():
    dca = with_dca(tiny_model())
    dca.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match="is_causal of DCALlamaAttention must be True; got False"):
        logits(dca, tokens(1, 5))
    plain = tiny_model()
    plain.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match="is_causal of LlamaAttention must be True; got False"):
        replace_attention(plain, SMALL)
    assert type(plain.model.layers[0].self_attn) is LlamaAttention


def test_output_attentions_warns_once_and_gives_none():
    dca = with_dca(tiny_model())
    with pytest.warns(UserWarning, match="output_attentions: DCA layers have no attention weights") as record:
        outputs = dca(tokens(1, 5), output_attentions=True)
    assert len(record) == 1
    assert not any(isinstance(a, torch.Tensor) for a in outputs.attentions or ())
    # Warnings are errors here.
    dca.model.layers[0].self_attn(torch.zeros(1, 5, 64), output_attentions=False)


@pytest.mark.filterwarnings("ignore:1 of 2 layers")
def test_output_attentions_warns_where_the_first_layer_is_left_alone():
    types = ["sliding_attention", "full_attention"]
    dca = with_dca(tiny_model("qwen2", use_sliding_window=True, sliding_window=5, layer_types=types))
    with pytest.warns(UserWarning, match="output_attentions: DCA layers have no attention weights"):
        dca.model.layers[1].self_attn(torch.zeros(1, 5, 64), output_attentions=True)


def test_hidden_states_are_still_recorded():
    outputs = with_dca(tiny_model())(tokens(1, 5), output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
