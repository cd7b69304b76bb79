"""The path that tensors on a device take: no value is read on the host, and torch.compile sees one graph.

There need not be a device for that: `dca_ext.cache` is told that it may not read tensors, and fake tensors, which have
no values, or the compiler, which refuses to read them, are the witnesses.
"""

from __future__ import annotations

import copy
import types

import pytest
import torch
from test_generation import NEW, generate
from tiny_models import (
    SMALL,
    assert_same,
    greedy_by_recomputing,
    logits,
    slow_model,
    tiny_model,
    tokens,
    tolerance,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, StaticCache

import dca_ext.cache
from dca_ext.patch import replace_attention


@pytest.fixture
def as_on_a_device(monkeypatch):
    monkeypatch.setattr(dca_ext.cache, "_may_read", lambda tensor: False)


@pytest.fixture(scope="module")
def plain():
    return tiny_model()


@pytest.fixture
def dca(plain):
    return replace_attention(copy.deepcopy(plain), SMALL)


@pytest.mark.parametrize("implementation", ["dca", "sdpa"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 7},
        {"use_cache": False},
    ],
    ids=lambda kwargs: "-".join(str(value) for value in kwargs.values()),
)
def test_generation_is_the_same(plain, dca, as_on_a_device, kwargs, implementation):
    dca.set_attn_implementation(implementation)
    slow = slow_model(plain)
    ids, mask = tokens(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[1, :8] = 0
    actual = generate(dca, ids, attention_mask=mask, **kwargs)
    for b, begin in ((0, 0), (1, 8)):
        assert torch.equal(actual[b : b + 1, begin:], greedy_by_recomputing(slow, ids[b : b + 1, begin:], NEW))
    assert torch.equal(generate(dca, ids, **kwargs), greedy_by_recomputing(slow, ids, NEW))


def test_padding_from_positions_is_the_same(plain, dca, as_on_a_device):
    ids = tokens(2, 17)
    positions = torch.stack((torch.arange(17), (torch.arange(17) - 8).clamp(min=0)))
    actual = logits(dca, ids, position_ids=positions)
    slow = slow_model(plain)
    assert_same(actual[:1], logits(slow, ids[:1]), tolerance(plain, ids))
    assert_same(actual[1:, 8:], logits(slow, ids[1:, 8:]), tolerance(plain, ids))


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "2-D", "4-D", "positions"])
def test_layers_read_no_values(dca, as_on_a_device, cache, padding):
    """Fake tensors raise where a value would be read. Two calls: into an empty cache and behind its tokens."""
    attention = dca.model.layers[0].self_attn
    attention.layer_idx = 0
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        past = {
            None: lambda: None,
            "dynamic": DynamicCache,
            "static": lambda: StaticCache(config=dca.config, max_cache_len=40),
        }[cache]()
        for begin, end in ((0, 9), (9, 13)) if cache else ((0, 13),):
            kwargs = {
                None: dict,
                "2-D": lambda end=end: {"attention_mask": torch.ones(2, end)},
                "4-D": lambda begin=begin, end=end: {
                    "attention_mask": torch.zeros(2, 1, end - begin, 40 if cache == "static" else end)
                },
                "positions": lambda begin=begin, end=end: {"position_ids": torch.arange(begin, end).expand(2, -1)},
            }[padding]()
            hidden = torch.zeros(2, end - begin, 64)
            out, _ = attention(hidden, past_key_values=past, **kwargs)
            assert out.shape == hidden.shape


def test_values_of_a_device_are_read_if_the_user_asks_for_checks(monkeypatch):
    on_a_device = types.SimpleNamespace(device=torch.device("cuda"))
    for value, read in ((None, False), ("0", False), ("", False), ("1", True)):
        monkeypatch.delenv("DCA_CHECK", raising=False)
        if value is not None:
            monkeypatch.setenv("DCA_CHECK", value)
        assert dca_ext.cache._may_read(on_a_device) is read


def test_tensors_without_values_are_never_read(dca, monkeypatch):
    monkeypatch.setenv("DCA_CHECK", "1")
    on_meta = copy.deepcopy(dca.model.layers[0].self_attn).to("meta")
    out, _ = on_meta(torch.zeros(2, 9, 64, device="meta"), attention_mask=torch.ones(2, 9, device="meta"))
    assert out.shape == (2, 9, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out, _ = dca.model.layers[0].self_attn(torch.zeros(2, 9, 64), attention_mask=torch.ones(2, 9))
    assert out.shape == (2, 9, 64)


def test_one_row_of_positions_is_taken_for_a_count_of_the_slots(as_on_a_device):
    assert dca_ext.cache.left_padding(None, torch.arange(3, 8)[None], 3, 2, 5) is None
    assert dca_ext.cache.left_padding(None, torch.arange(3, 8).expand(2, -1), 3, 2, 5).tolist() == [0, 0]


def test_packed_sequences_behind_a_static_cache_are_refused_without_reading_its_length(dca):
    past = types.SimpleNamespace(get_seq_length=lambda layer_idx: torch.empty((), dtype=torch.long, device="meta"))
    borders = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q must come without cached tokens"):
        dca.model.layers[0].self_attn(torch.zeros(1, 4, 64), past_key_values=past, cu_seq_lens_q=borders)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("implementation", "padded"), [("dca", True), ("sdpa", False)])
def test_decoding_compiles_to_one_graph(plain, dca, fresh_compiler, implementation, padded):
    dca.set_attn_implementation(implementation)
    ids, mask = tokens(2, 26), torch.ones(2, 26, dtype=torch.long)
    if padded:
        mask[1, :8] = 0
    cache = StaticCache(config=dca.config, max_cache_len=32)
    mask_for = (lambda end: {"attention_mask": mask[:, :end]}) if padded else (lambda end: {})
    parts = [logits(dca, ids[:, :20], past=cache, **mask_for(20))]
    compiled = torch.compile(dca, fullgraph=True, backend="aot_eager")
    parts += [logits(compiled, ids[:, t : t + 1], past=cache, **mask_for(t + 1)) for t in range(20, 26)]
    actual, slow = torch.cat(parts, dim=1), slow_model(plain)
    for b, begin in ((0, 0), (1, 8 if padded else 0)):
        expected = logits(slow, ids[b : b + 1, begin:])
        assert_same(actual[b : b + 1, begin:], expected, tolerance(plain, ids))


def test_a_model_that_is_compiled_before_it_ever_ran(plain, dca, fresh_compiler):
    """The tables are built while the compiler traces, and kept."""
    tables = dca.model.layers[0].self_attn.rotary_tables
    tables._by_device.clear()
    ids = tokens(2, 20)
    compiled = torch.compile(dca, fullgraph=True, backend="aot_eager")
    assert_same(logits(compiled, ids, use_cache=False), logits(slow_model(plain), ids), tolerance(plain, ids))
    assert list(tables._by_device) == [torch.device("cpu")]
    cos, sin = tables.on(torch.device("cpu"))
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))


def test_what_fake_runs_build_is_not_kept(dca):
    """The tables are shared by all models of the process, whose later calls would give fake tensors."""
    tables = dca.model.layers[0].self_attn.rotary_tables
    tables._by_device.clear()
    ids = tokens(2, 17)
    with torch.no_grad():
        exported = torch.export.export(dca, (), {"input_ids": ids, "use_cache": False}).module()
        assert type(tables.on(torch.device("cpu"))[0]) is torch.Tensor
        assert_same(exported(input_ids=ids, use_cache=False).logits, logits(dca, ids), 1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_export_with_a_free_length(dca, padded):
    def inputs(length):
        mask = {"attention_mask": torch.ones(2, length, dtype=torch.long)} if padded else {}
        return {"input_ids": tokens(2, length), **mask, "use_cache": False}

    free = {name: None if name == "use_cache" else {1: torch.export.Dim.AUTO} for name in inputs(1)}
    exported = torch.export.export(dca, (), inputs(17), dynamic_shapes=free).module()
    with torch.no_grad():
        assert_same(exported(**inputs(29)).logits, dca(**inputs(29)).logits, 1e-5)
