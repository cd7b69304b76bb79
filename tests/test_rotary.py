"""Rotary tables against transformers' own rotary embedding and against formulas."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import sys
import types

import pytest
import torch
from tiny_models import ROPE_PARAMETERS, SMALL, tiny_config, tiny_model
from transformers import LlamaConfig, PhiConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dca_ext.rotary import RotaryTables, inverse_frequencies, rotary_tables


def rope_config(rope_type: str, **changes: object):
    return tiny_config(rope_parameters={**ROPE_PARAMETERS[rope_type], **changes})


@pytest.mark.parametrize("rope_type", ROPE_PARAMETERS)
def test_tables_are_the_models_own_cosines(rope_type):
    config = rope_config(rope_type)
    # Past longrope's original 16 positions, so that both sides use its long factors.
    rows = 40
    cos, sin = rotary_tables(config, rows - 1)
    positions = torch.arange(rows)[None]
    model_cos, model_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    torch.testing.assert_close(cos, model_cos[0, :, :8], rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, model_sin[0, :, :8], rtol=0, atol=1e-7)
    assert cos.dtype == torch.float32
    assert cos.is_contiguous()
    assert cos.shape == (rows, 8)


def test_default_frequencies_are_the_formula():
    cos, sin = rotary_tables(rope_config("default"), 20)
    angles = torch.arange(21, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=3e-6)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_partial_rotary_factor_narrows_the_tables(rope_type):
    _, sin = rotary_tables(rope_config(rope_type, partial_rotary_factor=0.5), 20)
    assert sin.shape == (21, 4)


@pytest.mark.parametrize("head_dim", [None, 32])
def test_default_tables_have_the_width_of_a_head(head_dim):
    config = types.SimpleNamespace(
        hidden_size=64, num_attention_heads=4, head_dim=head_dim, rope_parameters=ROPE_PARAMETERS["default"]
    )
    assert rotary_tables(config, 20)[0].shape == (21, (head_dim or 16) // 2)


def test_a_config_of_somebody_elses_has_the_frequencies_of_the_one_it_extends():
    config = type("OwnPhiConfig", (PhiConfig,), {})(hidden_size=64, num_attention_heads=4)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert torch.equal(rotary_tables(config, 20)[0], rotary_tables(PhiConfig(**config.to_dict()), 20)[0])
    config = type("OwnLlamaConfig", (LlamaConfig,), {})(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters={**ROPE_PARAMETERS["default"], "partial_rotary_factor": 0.5},
    )
    assert rotary_tables(config, 20)[0].shape == (21, 8)


@pytest.mark.parametrize("embeddings", [None, 0, 1, 2])
def test_a_model_without_one_default_of_its_own_has_that_of_the_formula(embeddings, monkeypatch):
    """No modelling file, or none or several rotary embeddings in it, which do not tell whose frequencies count."""
    name = "transformers.models.newcomer.{}_newcomer"
    if embeddings is not None:
        file = types.ModuleType(name.format("modeling"))
        for i in range(embeddings):
            own = staticmethod(lambda config, i=i: (torch.full((8,), 2.0 + i), 1.0))
            setattr(file, f"Rotary{i}", type(f"Rotary{i}", (), {"compute_default_rope_parameters": own}))
        for module in ("transformers.models.newcomer", file.__name__):
            monkeypatch.setitem(sys.modules, module, file)
    family = type("NewcomerConfig", (types.SimpleNamespace,), {"__module__": name.format("configuration")})
    config = family(hidden_size=64, num_attention_heads=4, rope_parameters=ROPE_PARAMETERS["default"])
    expected = torch.full((8,), 2.0) if embeddings == 1 else 10000.0 ** (-torch.arange(8) / 8.0)
    torch.testing.assert_close(inverse_frequencies(config)[0], expected)


@pytest.mark.parametrize("family", [PhiConfig, types.SimpleNamespace])
def test_partial_rotary_factor_narrows_default_tables_where_the_model_honours_it(family):
    parameters = {**ROPE_PARAMETERS["default"], "partial_rotary_factor": 0.5}
    _, sin = rotary_tables(family(hidden_size=64, num_attention_heads=4, rope_parameters=parameters), 20)
    assert sin.shape == (21, 4)
    # One position on, the slowest of the four pairs has turned by the frequency of channel 6 of 8 rotating ones.
    assert math.asin(sin[1, 3].item()) == pytest.approx(10000.0 ** (-6 / 8), rel=1e-5)


def test_partial_rotary_factor_changes_nothing_where_the_model_ignores_it():
    config = rope_config("default", partial_rotary_factor=0.5)
    cos, _ = rotary_tables(config, 20)
    assert torch.equal(cos, rotary_tables(rope_config("default"), 20)[0])
    model_cos, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(21)[None])
    torch.testing.assert_close(cos, model_cos[0, :, :8], rtol=0, atol=1e-7)


def test_yarn_scales_the_tables_by_its_attention_factor():
    cos, _ = rotary_tables(rope_config("yarn"), 20)
    assert cos[0, 0].item() == pytest.approx(0.1 * math.log(4.0) + 1.0)
    cos, _ = rotary_tables(rope_config("yarn", attention_factor=0.75), 20)
    assert cos[0, 0].item() == pytest.approx(0.75)


def test_dynamic_frequencies_are_frozen_at_the_stated_length():
    config = rope_config("dynamic")
    unscaled, _ = inverse_frequencies(rope_config("default"))
    for length in (1, 48):
        torch.testing.assert_close(inverse_frequencies(config, length)[0], unscaled)
    beyond, _ = inverse_frequencies(config, 256)
    # base * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))
    base = 10000.0 * (4.0 * 256 / 64 - 3.0) ** (16 / 14)
    torch.testing.assert_close(beyond, base ** (-torch.arange(8) / 8.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(rotary_tables(config, 48, length=256)[0][1], beyond.cos())


def test_longrope_takes_long_factors_by_default_where_the_table_needs_them():
    config = rope_config("longrope")
    base = 10000.0 ** (-torch.arange(8) / 8.0)
    parameters = ROPE_PARAMETERS["longrope"]
    short = base / torch.tensor(parameters["short_factor"])
    long = base / torch.tensor(parameters["long_factor"])
    scale = math.sqrt(1 + math.log(4.0) / math.log(16))
    for max_position, length, expected in ((15, None, short), (16, None, long), (15, 17, long), (40, 16, short)):
        cos, _ = rotary_tables(config, max_position, length=length)
        torch.testing.assert_close(cos[1], expected.cos() * scale)


def test_layers_models_and_copies_share_one_table():
    from dca_ext.patch import replace_attention

    model = replace_attention(tiny_model(), SMALL)
    other = replace_attention(tiny_model(seed=3), SMALL)
    held = [m.model.layers[i].self_attn.rotary_tables for m in (model, other, copy.deepcopy(model)) for i in (0, 1)]
    assert all(tables is held[0] for tables in held)
    assert pickle.loads(pickle.dumps(held[0])) is held[0]
    device = torch.device("cpu")
    assert held[0].on(device)[0] is held[0].on(device)[0]
    assert held[0].on(torch.device("meta"))[0].shape == (10, 8)


def test_tables_go_when_nobody_holds_them():
    # One key, not the length of the dictionary: what earlier tests left to the collector may go at any time.
    key = ((1.0, 0.125), 1.0, 7)
    tables = RotaryTables.shared(*key)
    assert key in RotaryTables._in_use
    del tables
    gc.collect()
    assert key not in RotaryTables._in_use


@pytest.mark.parametrize("rope_type", ROPE_PARAMETERS)
def test_the_device_and_dtype_of_the_surroundings_do_not_matter(rope_type):
    """from_pretrained creates modules on the meta device, with the checkpoint's dtype as the default one."""
    expected = rotary_tables(rope_config(rope_type), 20)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            actual = RotaryTables.from_config(rope_config(rope_type), 20).on(torch.device("cpu"))
    finally:
        torch.set_default_dtype(default_dtype)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_a_rope_type_added_to_transformers_works(monkeypatch):
    monkeypatch.setitem(
        ROPE_INIT_FUNCTIONS, "halved", lambda config, device, seq_len=None, **_: (torch.full((8,), 0.5).double(), 2.0)
    )
    config = tiny_config()
    config.rope_parameters = {"rope_type": "halved", "rope_theta": 10000.0}
    assert inverse_frequencies(config)[0].dtype == torch.float32
    cos, _ = rotary_tables(config, 4)
    torch.testing.assert_close(cos[:, 0], 2.0 * torch.arange(5).mul(0.5).cos())


def test_unknown_rope_types_are_refused():
    config = tiny_config()
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 10000.0}
    with pytest.raises(ValueError, match=r"rope_type must be one of default, .*yarn; got 'spiral'"):
        rotary_tables(config, 4)
    for parameters in (None, {"full_attention": ROPE_PARAMETERS["default"]}):
        config.rope_parameters = parameters
        with pytest.raises(ValueError, match=r"config\.rope_parameters must be one set"):
            rotary_tables(config, 4)
