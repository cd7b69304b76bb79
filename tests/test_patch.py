"""replace_attention, restore_attention, the patch mapping, and what save_pretrained and from_pretrained keep."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import types

import pytest
import torch
from tiny_models import (
    FAMILIES,
    ROPE_PARAMETERS,
    SMALL,
    assert_same,
    logits,
    slow_model,
    tiny_config,
    tiny_model,
    tokens,
    tolerance,
)
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, monkey_patching
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaPreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding

import dca_ext
from dca_ext.attention import DCA_CLASSES, DCALlamaAttention, DCAQwen2Attention, DualChunkAttention, default_dca_config
from dca_ext.config import DCAConfig
from dca_ext.patch import PATCH_MAPPING, replace_attention, restore_attention
from dca_ext.rotary import RotaryTables


def attention_of(model, layer: int = 0):
    return model.model.layers[layer].self_attn


@pytest.fixture
def patch_mapping(monkeypatch):
    """The mapping registered, and afterwards all that it changed in transformers put back."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers."):
            try:
                dir(module)
            except Exception:
                # In transformers 5.5 and 5.17, aliases of image processors cannot be listed without torchvision and
                # Pillow, while apply_patches lists all modules.
                monkeypatch.delitem(sys.modules, name)
    recorders = dict(LlamaPreTrainedModel._can_record_outputs)
    monkey_patching.register_patch_mapping(PATCH_MAPPING)
    yield
    monkey_patching.unregister_patch_mapping(list(PATCH_MAPPING))
    LlamaPreTrainedModel._can_record_outputs.update(recorders)


# --- Replacing and restoring -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_stay_the_same_objects(family):
    model = tiny_model(family)
    before = dict(model.named_parameters())
    modules = list(model.modules())
    assert replace_attention(model, SMALL) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() == model.state_dict().keys() | before.keys()
    assert all(after[name] is before[name] for name in before)
    assert all(m is n for m, n in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_undoes_exactly(family):
    model = tiny_model(family)
    ids = tokens(1, 30)
    expected = logits(model, ids)
    attributes = [set(vars(m)) for m in model.modules()]
    config, implementation = model.config.to_dict(), model.config._attn_implementation
    assert restore_attention(replace_attention(model, SMALL, rope_length=200)) is model
    assert type(attention_of(model)) in DCA_CLASSES
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model, ids), expected)


def test_restore_keeps_what_changed_meanwhile_and_what_was_recorded_before():
    model = tiny_model()
    model.config.dca_config, model.config.dca_rope_length = DCAConfig(4, 6).to_dict(), 100
    replace_attention(model, SMALL, rope_length=200)
    assert model.config.dca_rope_length == 200
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    restore_attention(model)
    assert model.config.dca_config == DCAConfig(4, 6).to_dict()
    assert model.config.dca_rope_length == 100
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False


@pytest.mark.parametrize("replaced", [False, True])
def test_restoring_a_model_loaded_as_dca_chooses_sdpa(tmp_path, patch_mapping, replaced):
    plain = tiny_model()
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dca").eval()
    restore_attention(replace_attention(model, SMALL) if replaced else model)
    assert model.config._attn_implementation == "sdpa"
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert_same(logits(model, ids, attention_mask=mask), logits(plain, ids, attention_mask=mask), 0)


def test_restoring_a_plain_model_does_nothing():
    model = tiny_model()
    attributes = dict(vars(attention_of(model)))
    assert restore_attention(model) is model
    assert vars(attention_of(model)) == attributes


def test_replacing_twice_changes_the_geometry():
    plain = tiny_model()
    ids = tokens(1, 30)
    model = replace_attention(copy.deepcopy(plain), DCAConfig(4, 6))
    replace_attention(model, SMALL)
    assert_same(logits(model, ids), logits(slow_model(plain), ids), tolerance(plain, ids))
    replace_attention(model)
    assert attention_of(model).dca_config == SMALL
    restore_attention(model)
    assert type(attention_of(model)) is LlamaAttention
    assert not hasattr(model.config, "dca_config")
    assert model.config._attn_implementation == plain.config._attn_implementation


def test_models_built_from_the_same_config_are_not_affected():
    config = tiny_config()
    torch.manual_seed(0)
    plain, patched = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    patched.load_state_dict(plain.state_dict())
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = logits(plain, ids, attention_mask=mask)
    replace_attention(patched, SMALL)
    assert plain.config is config
    assert not hasattr(config, "dca_config")
    assert torch.equal(logits(plain, ids, attention_mask=mask), expected)
    assert all(m.config is patched.config for m in patched.modules() if hasattr(m, "config"))


def test_copies_pickles_and_casts_keep_working():
    plain = tiny_model()
    ids = tokens(1, 30)
    model = replace_attention(copy.deepcopy(plain), SMALL)
    expected = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.bfloat16).to(torch.float32)):
        cos, _ = attention_of(other).rotary_tables.on(torch.device("cpu"))
        assert cos.dtype == torch.float32
        assert torch.isfinite(logits(other, ids)).all()
        restored = restore_attention(copy.deepcopy(other))
        assert type(attention_of(restored)) is LlamaAttention
        assert type(attention_of(other)) is DCALlamaAttention
    assert torch.equal(logits(copy.deepcopy(model), ids), logits(model, ids))
    assert expected.shape == (1, 30, plain.config.vocab_size)


def test_part_of_a_model_and_a_bare_module():
    torch.manual_seed(0)
    base = LlamaModel(tiny_config()).eval()
    replace_attention(base, SMALL)
    assert all(type(layer.self_attn) is DCALlamaAttention for layer in base.layers)
    attention = LlamaAttention(tiny_config(), 0)
    assert replace_attention(attention, SMALL) is attention
    assert type(attention) is DCALlamaAttention


def test_a_part_and_then_the_whole_leaves_other_models_alone():
    config = tiny_config()
    other, model = LlamaForCausalLM(config), LlamaForCausalLM(config)
    replace_attention(model.model.layers[0], SMALL)
    own = attention_of(model).config
    replace_attention(model, SMALL)
    assert other.config is config
    assert not hasattr(config, "dca_config")
    assert config._attn_implementation == LlamaForCausalLM(tiny_config()).config._attn_implementation
    assert attention_of(model).config is own
    assert attention_of(model, 1).config is model.config is model.model.rotary_emb.config
    assert model.config.dca_config == own.dca_config == SMALL.to_dict()
    # Once is enough.
    config = model.config
    replace_attention(model, DCAConfig(4, 6))
    assert model.config is config


def test_a_hook_that_holds_the_old_forward_is_moved():
    """accelerate's add_hook_to_module wraps ``module.forward`` and keeps the bound original as ``_old_forward``."""
    plain = tiny_model()
    model = copy.deepcopy(plain)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention._old_forward = attention.forward
        attention.forward = types.MethodType(
            lambda module, *args, **kwargs: module._old_forward(*args, **kwargs), attention
        )
    ids = tokens(1, 30)
    replace_attention(model, SMALL)
    assert_same(logits(model, ids), logits(slow_model(plain), ids), tolerance(plain, ids))
    assert_same(logits(restore_attention(model), ids), logits(plain, ids), 0)


def test_other_bound_methods_stay_what_they_are():
    model = tiny_model()
    attention, neighbour = attention_of(model, 0), attention_of(model, 1)
    attention._repr, attention._neighbour = attention.extra_repr, neighbour.forward
    replace_attention(attention, SMALL)
    assert attention._repr.__func__ is nn.Module.extra_repr
    assert attention._neighbour.__self__ is neighbour


def test_parts_with_configs_of_their_own_keep_their_geometries():
    torch.manual_seed(0)
    lengths = {"short": 64, "long": 4096}
    model = nn.ModuleDict({name: LlamaModel(tiny_config(max_position_embeddings=n)) for name, n in lengths.items()})
    replace_attention(model)
    for name, n in lengths.items():
        expected = DCAConfig.from_pretraining_length(n)
        assert all(layer.self_attn.dca_config == expected for layer in model[name].layers)
        assert model[name].config.dca_config == expected.to_dict()


@pytest.mark.parametrize("quantised", [False, True])
def test_the_tables_are_there_before_a_compiler_traces(quantised):
    # A theta of its own, so that no other test has built them.
    theta = 4321.0 + quantised
    attention = LlamaAttention(tiny_config(rope_parameters={"rope_type": "default", "rope_theta": theta}), 0)
    if quantised:  # such projections may have buffers only
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(attention, name)
            weight = projection.weight.data
            del projection.weight
            projection.register_buffer("weight", weight)
        assert not list(attention.parameters())
    replace_attention(attention, SMALL)
    assert list(attention.rotary_tables._by_device) == [torch.device("cpu")]


def test_a_config_that_asks_for_weights_keeps_its_implementation(tmp_path):
    """transformers saves no such config with another implementation than "eager"."""
    model = tiny_model()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    replace_attention(model, SMALL)
    assert model.config._attn_implementation == "eager"
    assert save(model, tmp_path)["dca_config"] == SMALL.to_dict()


def test_public_names():
    assert dca_ext.replace_attention is replace_attention
    assert dca_ext.restore_attention is restore_attention
    assert dca_ext.DCALlamaAttention is DCALlamaAttention


# --- The default geometry --------------------------------------------------------------------------------------------


def test_the_default_geometry_is_that_of_the_pretraining_length():
    model = replace_attention(tiny_model(max_position_embeddings=4096))
    assert attention_of(model).dca_config == DCAConfig(2560, 3072)
    assert model.config.dca_config == DCAConfig(2560, 3072).to_dict()
    assert not hasattr(model.config, "dca_rope_length")


@pytest.mark.parametrize("rope_type", ROPE_PARAMETERS)
def test_with_rope_scaling_the_length_is_max_position_embeddings(rope_type):
    config = tiny_config(max_position_embeddings=64, rope_parameters=ROPE_PARAMETERS[rope_type])
    assert default_dca_config(config) == DCAConfig.from_pretraining_length(64)


LENGTHS_WITH_YARN = [(32768, 131072), (40960, 131072), (131072, 131072), (262144, 262144)]


@pytest.mark.parametrize(("unscaled", "length"), LENGTHS_WITH_YARN)
def test_with_yarn_the_length_is_the_scaled_one_even_if_the_config_kept_its_own(unscaled, length):
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    config = tiny_config("qwen2", max_position_embeddings=unscaled, rope_parameters=yarn)
    assert default_dca_config(config) == DCAConfig.from_pretraining_length(length)


def test_yarn_without_an_original_length_scales_max_position_embeddings():
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    config = types.SimpleNamespace(max_position_embeddings=32768, rope_parameters=yarn)
    assert default_dca_config(config) == DCAConfig.from_pretraining_length(131072)


@pytest.mark.parametrize("family", ["qwen2", "qwen3-moe"])  # Qwen2.5-1M; Qwen3-30B-A3B and -235B-A22B of 2507
def test_qwens_dual_chunk_attention_config_is_read(family):
    config = tiny_config(family)
    config.dual_chunk_attention_config = {
        "chunk_size": 16,
        "local_size": 4,
        "original_max_position_embeddings": 16,
    }
    assert default_dca_config(config) == DCAConfig(12, 16, "yarn", 16)
    model = tiny_model(family, dual_chunk_attention_config=config.dual_chunk_attention_config)
    plain = copy.deepcopy(model)
    ids = tokens(1, 60)
    replace_attention(model)
    expected = logits(slow_model(plain, DCAConfig(12, 16, "yarn", 16)), ids)
    assert_same(logits(model, ids), expected, tolerance(plain, ids))


def test_a_recorded_geometry_goes_before_qwens():
    config = tiny_config("qwen2", dual_chunk_attention_config={"chunk_size": 16, "local_size": 4})
    for recorded in (SMALL.to_dict(), SMALL):
        config.dca_config = recorded
        assert default_dca_config(config) == SMALL


def test_a_recorded_rope_length_holds_for_modules_built_from_the_config():
    config = tiny_config(rope_parameters=ROPE_PARAMETERS["dynamic"])
    config.dca_config, config.dca_rope_length = SMALL.to_dict(), 200
    expected = RotaryTables.from_config(config, SMALL.max_position, 200)
    assert DCALlamaAttention(config, 0).rotary_tables is expected
    assert DCALlamaAttention(config, 0, rope_length=100).rotary_tables is not expected


def test_a_config_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match="dca_config must be given: SimpleNamespace has no max_position_embeddings"):
        default_dca_config(types.SimpleNamespace())


# --- Saving and loading ----------------------------------------------------------------------------------------------


def save(model, folder) -> dict:
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_save_pretrained_keeps_the_geometry_and_the_plain_weights(tmp_path):
    plain = tiny_model(rope_parameters=ROPE_PARAMETERS["dynamic"])
    model = replace_attention(copy.deepcopy(plain), SMALL, rope_length=200)
    ids = tokens(1, 30)
    saved = save(model, tmp_path)
    assert saved["dca_config"] == SMALL.to_dict()
    assert saved["dca_rope_length"] == 200
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert "dca" not in json.dumps({k: v for k, v in saved.items() if not k.startswith("dca_")})

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same(logits(loaded, ids), logits(plain, ids), 0)
    replace_attention(loaded)
    assert attention_of(loaded).dca_config == SMALL
    assert_same(logits(loaded, ids), logits(model, ids), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_with_the_patch_mapping(tmp_path, patch_mapping, dtype):
    """from_pretrained builds on the meta device and in the checkpoint's dtype; the tables must survive both."""
    plain = tiny_model(dtype=dtype)
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    patched = replace_attention(copy.deepcopy(plain), SMALL)
    save(patched, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert type(attention_of(model)) is DCALlamaAttention
    assert attention_of(model).dca_config == SMALL
    assert_same(logits(model, ids, attention_mask=mask), logits(patched, ids, attention_mask=mask), 0)
    assert_same(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="dca"), ids),
        logits(patched, ids),
        0,
    )
    # Saved again, it is the same checkpoint.
    assert save(model, tmp_path)["dca_config"] == SMALL.to_dict()
    restore_attention(model)
    assert_same(logits(model, ids), logits(plain, ids), 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_patch_mapping_covers_every_family(tmp_path, patch_mapping, family):
    plain = tiny_model(family)
    plain.config.dca_config = SMALL.to_dict()
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(attention_of(model)) in DCA_CLASSES.values()
    ids = tokens(1, 30)
    assert_same(logits(model, ids), logits(slow_model(plain), ids), tolerance(plain, ids))


# --- Layers that are left alone, and refusals ------------------------------------------------------------------------


def mixed_qwen2(**overrides):
    """The first layer attends to everything, the second to a window of 5 tokens."""
    return tiny_model("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1, **overrides)


def test_sliding_window_layers_are_left_alone_with_one_warning():
    plain = mixed_qwen2()
    assert plain.config.layer_types == ["full_attention", "sliding_attention"]
    model = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="1 of 2 layers of Qwen2ForCausalLM: .*window .of 5 tokens.*") as record:
        replace_attention(model, SMALL)
    assert len(record) == 1
    assert record[0].filename == __file__
    assert type(attention_of(model, 0)) is DCAQwen2Attention
    assert type(attention_of(model, 1)) is type(attention_of(plain, 1))
    # Their masks are still transformers' business.
    assert model.config._attn_implementation == plain.config._attn_implementation
    slow = slow_model(plain)
    slow.model.layers[1].self_attn = copy.deepcopy(attention_of(plain, 1))
    ids = tokens(1, 30)
    for implementation in ("sdpa", "eager", "dca"):
        model.set_attn_implementation(implementation)
        assert_same(logits(model, ids), logits(slow, ids), tolerance(plain, ids))


@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen3-moe"])
def test_a_model_with_nothing_but_sliding_windows_stays_as_it_is(family):
    model = tiny_model(family, sliding_window=5, **({"use_sliding_window": True} if family == "qwen3-moe" else {}))
    with pytest.warns(UserWarning, match=f"2 of 2 layers of {type(model).__name__}: .*window .of 5 tokens"):
        replace_attention(model, SMALL)
    assert not any(isinstance(m, DualChunkAttention) for m in model.modules())
    assert not hasattr(model.config, "dca_config")


def test_sliding_window_layers_in_a_patched_load(tmp_path, patch_mapping):
    plain = mixed_qwen2(num_hidden_layers=3)
    plain.config.dca_config = SMALL.to_dict()
    plain.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="DCAQwen2Attention: .*window .of 5 tokens") as record:
        model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(record) == 1
    slow = slow_model(plain)
    for layer in (1, 2):
        slow.model.layers[layer].self_attn = copy.deepcopy(attention_of(plain, layer))
    ids = tokens(1, 30)
    assert_same(logits(model, ids), logits(slow, ids), tolerance(plain, ids))


def test_a_module_with_a_sliding_window_works_as_it_did_whatever_geometry_it_is_given():
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    with pytest.warns(UserWarning, match="DCAQwen2Attention: .*window .of 5 tokens"):
        attention = DCAQwen2Attention(config, 1, SMALL)
    assert attention.dca_config is None
    plain = Qwen2Attention(config, 1)
    plain.load_state_dict(attention.state_dict())
    hidden = torch.randn(1, 20, 64)
    embeddings = Qwen2RotaryEmbedding(config)(hidden, torch.arange(20)[None])
    arguments = (hidden, embeddings, torch.zeros(1, 1, 20, 20))
    assert torch.equal(attention(*arguments)[0], plain(*arguments)[0])


def test_a_model_without_a_supported_layer_is_refused():
    with pytest.raises(ValueError, match=r"model must contain one of LlamaAttention, .*; Linear has no such layer"):
        replace_attention(nn.Linear(2, 2), SMALL)
    # What a class of somebody else's does is not known.
    other = type("OtherAttention", (LlamaAttention,), {})(tiny_config(), 0)
    with pytest.raises(ValueError, match="OtherAttention has no such layer"):
        replace_attention(other, SMALL)


def test_a_geometry_that_is_no_dca_config_is_refused():
    model = tiny_model()
    with pytest.raises(TypeError, match="dca_config must be a DCAConfig or None; got dict"):
        replace_attention(model, {"chunk_len": 6, "max_position": 9})
    with pytest.raises(TypeError, match="dca_config must be a DCAConfig or None; got int"):
        DCALlamaAttention(tiny_config(), 0, 4096)
    assert type(attention_of(model)) is LlamaAttention


def test_a_plain_model_set_to_dca_says_what_to_do():
    model = tiny_model()
    ids = tokens(2, 12)
    expected = logits(model, ids)
    model.set_attn_implementation("dca")
    assert_same(logits(model, ids), expected, 1e-5 * expected.abs().max().item())
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="attn_implementation='dca' is for DCA layers; call dca_ext"):
        logits(model, ids, attention_mask=mask)


def test_what_is_refused_changes_nothing():
    model = tiny_model()
    config = model.config
    model.config.rope_parameters = {"rope_type": "spiral", "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rope_type must be one of"):
        replace_attention(model, SMALL)
    assert type(attention_of(model)) is LlamaAttention
    assert model.config is config
    assert not hasattr(config, "dca_config")
    model.config.rope_parameters = ROPE_PARAMETERS["default"]
    with pytest.raises(TypeError, match="the length of RoPE frequencies must be an int; got str '4096'"):
        replace_attention(model, SMALL, rope_length="4096")
    with pytest.raises(ValueError, match="the length of RoPE frequencies must be at least 1; got 0"):
        replace_attention(model, SMALL, rope_length=0)
    with pytest.raises(TypeError, match="the length of RoPE frequencies must be an int; got bool True"):
        replace_attention(model, SMALL, rope_length=True)
    assert type(attention_of(model)) is LlamaAttention
    assert model.config is config
    assert not hasattr(config, "dca_config")
