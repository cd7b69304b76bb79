import dataclasses
import json
import warnings

import pytest

import dca_ext.config
from dca_ext import DCAConfig


def test_presets_of_published_settings():
    llama2 = DCAConfig.from_pretraining_length(4096)  # ChunkLlama: chunk_size 3072, local_window 512
    assert (llama2.chunk_len, llama2.max_position) == (2560, 3072)
    assert DCAConfig.from_chunk_size(3072, 1024).chunk_len == 2048
    assert DCAConfig.paper(4096) == DCAConfig(3072, 4095)
    assert DCAConfig.from_pretraining_length(131072).chunk_len == 81920
    assert DCAConfig.from_pretraining_length(8192).chunk_len == 5120


def test_presets_pass_the_temperature_on():
    yarn = dict(temperature="yarn", original_max_position_embeddings=4096)
    assert DCAConfig.from_chunk_size(3072, 512, **yarn) == DCAConfig(2560, 3072, "yarn", 4096)
    assert DCAConfig.from_pretraining_length(4096, **yarn) == DCAConfig(2560, 3072, "yarn", 4096)
    assert DCAConfig.paper(4096, **yarn) == DCAConfig(3072, 4095, "yarn", 4096)


def test_from_chunk_size_without_a_local_window_stays_below_two_chunks():
    assert DCAConfig.from_chunk_size(8, 0) == DCAConfig(8, 8)
    assert DCAConfig.from_chunk_size(8, 6) == DCAConfig(2, 3)
    assert DCAConfig.from_chunk_size(1, 0) == DCAConfig(1, 1)


def test_from_hf_reads_qwen_1m_and_warns_once_about_sparse_keys(monkeypatch):
    monkeypatch.setattr(dca_ext.config, "_warned_about_sparse_keys", False)
    mapping = {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
        "sparse_attention_enabled": True,
    }
    with pytest.warns(UserWarning, match="sparse_attention_enabled"):
        config = DCAConfig.from_hf(mapping)
    assert config == DCAConfig(253952, 262144, "yarn", 262144)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DCAConfig.from_hf(mapping) == config


def test_from_hf_without_sparse_keys_does_not_warn(monkeypatch):
    monkeypatch.setattr(dca_ext.config, "_warned_about_sparse_keys", False)
    assert DCAConfig.from_hf({"chunk_size": 8, "local_size": 2}) == DCAConfig(6, 8)


@pytest.mark.parametrize(("chunk_len", "max_position"), [(0, 0), (-1, 1), (4, 3), (4, 8), (1, 2), (2**31 - 1, 2**31)])
def test_geometry_outside_its_bounds_is_refused(chunk_len, max_position):
    with pytest.raises(ValueError, match="max_position"):
        DCAConfig(chunk_len, max_position)


LENGTHS = [
    ("chunk_len", lambda value: DCAConfig(value, 5)),
    ("max_position", lambda value: DCAConfig(4, value)),
    ("original_max_position_embeddings", lambda value: DCAConfig(4, 5, "none", value)),
    ("chunk_size", lambda value: DCAConfig.from_chunk_size(value, 1)),
    ("local_window", lambda value: DCAConfig.from_chunk_size(8, value)),
    ("context_len", DCAConfig.from_pretraining_length),
    ("context_len", DCAConfig.paper),
]


@pytest.mark.parametrize("value", [4.0, "4", True, None])
@pytest.mark.parametrize(("name", "make"), LENGTHS)
def test_lengths_must_be_ints(name, make, value):
    if name == "original_max_position_embeddings" and value is None:
        assert make(value) == DCAConfig(4, 5)
        return
    with pytest.raises(TypeError, match=f"^{name} must be an int; got {type(value).__name__}"):
        make(value)


def test_temperature_is_checked():
    with pytest.raises(ValueError, match="needs original_max_position_embeddings"):
        DCAConfig(4, 5, "yarn")
    with pytest.raises(ValueError, match="temperature must be one of none, yarn"):
        DCAConfig(4, 5, "hot")
    with pytest.raises(ValueError, match="original_max_position_embeddings must be at least 1"):
        DCAConfig(4, 5, "yarn", 0)
    with pytest.raises(ValueError, match=r"original_max_position_embeddings must be .* below 2\*\*31; got 2147483648"):
        DCAConfig(4, 5, "yarn", 2**31)
    assert DCAConfig(4, 5, "yarn", 1).original_max_position_embeddings == 1


def test_bad_presets_name_what_they_got():
    with pytest.raises(ValueError, match="local_window=8, chunk_size=8"):
        DCAConfig.from_chunk_size(8, 8)
    with pytest.raises(ValueError, match="local_window=-1, chunk_size=8"):
        DCAConfig.from_chunk_size(8, -1)
    with pytest.raises(ValueError, match="needs local_size; got"):
        DCAConfig.from_hf({"chunk_size": 8})
    with pytest.raises(ValueError, match="needs chunk_size; got"):
        DCAConfig.from_hf({"local_size": 2})


def test_is_frozen_and_round_trips_through_json():
    config = DCAConfig(4, 6, "yarn", 4096)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.chunk_len = 5
    assert DCAConfig(**json.loads(json.dumps(config.to_dict()))) == config
