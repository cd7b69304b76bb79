"""The demo's first act, end to end on a small budget, and the measuring code under it."""

import argparse
import json
import math
import random

import pytest
import torch

pytest.importorskip("rich", reason="the demo draws tables and bars with rich")
pytest.importorskip("matplotlib", reason="the demo draws pictures with matplotlib")
transformers = pytest.importorskip("transformers", reason="the demo's models are transformers'")

from dca_ext import DCAConfig  # noqa: E402
from dca_ext.cli import act_real, act_tiny, demo, models  # noqa: E402
from dca_ext.cli.methods import METHODS, reading_with, scaled_rope_parameters  # noqa: E402
from dca_ext.cli.quality import predict, predict_in_batches  # noqa: E402
from dca_ext.cli.tasks import KEY_DIGITS, exact_matches, passkey_row, to_bytes, topics_text  # noqa: E402


@pytest.fixture(scope="module")
def tiny():
    return act_tiny.load_tiny()


@pytest.fixture(scope="module")
def held_out():
    return to_bytes(topics_text("held_out"))


class CharacterTokenizer:
    """One token a character; enough of a tokenizer to lay out a text."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def demo_args(*argv):
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *argv])


def test_shipped_weights_are_small_and_trained_at_128(tiny):
    assert sum(path.stat().st_size for path in act_tiny.WEIGHTS.iterdir()) < 1_000_000
    assert tiny.config.max_position_embeddings == 128
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in tiny.parameters())


def test_shipped_model_retrieves_inside_its_context_and_dca_beyond(tiny, held_out):
    rng = random.Random(0)
    inside = torch.stack([passkey_row(held_out, 128, rng.random(), rng) for _ in range(32)])
    beyond = torch.stack([passkey_row(held_out, 256, 0.25, rng) for _ in range(32)])
    assert act_tiny.share_answered(tiny, inside) > 0.8
    with reading_with(tiny, "vanilla", 256):
        plain = act_tiny.share_answered(tiny, beyond)
    with reading_with(tiny, "DCA", 256):
        assert act_tiny.share_answered(tiny, beyond) > plain + 0.3


def test_exact_matches_wants_every_digit():
    answers = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    predicted = torch.tensor([[1, 2, 3], [4, 5, 0], [0, 8, 9]])
    assert exact_matches(predicted, answers).tolist() == [True, False, False]


def test_passkey_row_holds_the_key_twice_and_has_the_length_asked_for(held_out):
    for depth in (0.0, 0.5, 1.0):
        row = bytes(passkey_row(held_out, 100, depth, random.Random(1)).tolist())
        assert len(row) == 100
        assert row.count(b" Pass key: " + row[-KEY_DIGITS:]) == 2
    with pytest.raises(ValueError, match="length must be at least"):
        passkey_row(held_out, 20, 0.5, random.Random(1))


def test_topics_are_split_without_overlap():
    both = len(topics_text("train")) + len(topics_text("held_out")) + 1
    assert both == len(topics_text())
    assert len(topics_text("held_out")) > 16 * 128 * 4


def test_predict_equals_the_models_own_loss(tiny, held_out):
    tokens = held_out[:600].view(2, 300)
    with torch.no_grad():
        expected = tiny(tokens, labels=tokens)
    predictions = predict(tiny, tokens)
    assert predictions.mean_loss(1, 300) == pytest.approx(expected.loss.item(), abs=1e-5)
    assert torch.equal(predictions.at(1, 300), expected.logits[:, :-1].argmax(-1))
    late = predict_in_batches(tiny, tokens, first=200, tokens_per_batch=300)
    assert torch.allclose(late.loss, predictions.loss[:, 199:], atol=1e-5)
    with pytest.raises(ValueError, match="first must be from 1 to 299"):
        predict(tiny, tokens, first=300)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_the_model_as_it_was(tiny, held_out, method):
    tokens = held_out[:512][None]
    before = predict(tiny, tokens).loss
    with reading_with(tiny, method, 512):
        inside = predict(tiny, tokens).loss
    assert torch.equal(predict(tiny, tokens).loss, before)
    assert torch.equal(inside, before) == (method == "vanilla")


def test_ntk_stretches_the_slowest_frequency_by_the_factor(tiny):
    parameters = scaled_rope_parameters("NTK", tiny.config, 512)
    slowest = (tiny.config.head_dim - 2) / tiny.config.head_dim
    stretched = (parameters["rope_theta"] / tiny.config.rope_parameters["rope_theta"]) ** slowest
    assert math.isclose(stretched, 4.0, rel_tol=1e-6)


def test_act_1_end_to_end_and_the_same_twice(tmp_path, capsys):
    results = []
    for run in ("a", "b"):
        folder = tmp_path / run
        args = demo_args("--tiny", "--output-dir", str(folder), "--windows", "1", "--prompts", "1", "--seed", "3")
        assert demo.run(args) == 0
        assert (folder / "tiny.png").read_bytes().startswith(b"\x89PNG")
        results.append(json.loads((folder / "figures.json").read_text()))
        assert sorted(path.name for path in folder.iterdir()) == ["figures.json", "tiny.png"]
    assert results[0] == results[1]
    figures = results[0]["tiny"]
    assert figures["lengths"] == [128, 256, 512, 1024, 2048]
    assert figures["dca_config"]["chunk_len"] == DCAConfig.from_pretraining_length(128).chunk_len
    assert "Passkeys answered exactly" in capsys.readouterr().out


def test_demo_refuses_a_missing_text_before_any_work(tmp_path, capsys):
    args = demo_args("--output-dir", str(tmp_path / "out"), "--text", str(tmp_path / "no-such-file"))
    assert demo.run(args) == 1
    assert "no-such-file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_real_model_the_demo_says_so_and_ends_well(tmp_path, capsys, monkeypatch):
    def unavailable(*_, **__):
        raise models.ModelUnavailable("no network.")

    monkeypatch.setattr(models, "load_smollm2", unavailable)
    monkeypatch.setattr(demo, "perform_tiny", lambda *_: {})
    args = demo_args("--output-dir", str(tmp_path))
    assert demo.run(args) == 0
    assert "Act 2 is left out: no network." in capsys.readouterr().out
    assert "smollm2" not in json.loads((tmp_path / "figures.json").read_text())


def test_demo_refuses_texts_and_lengths_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "perform_tiny", lambda *_: pytest.fail("act 1 ran"))
    text = tmp_path / "text"
    for content, options, words in [
        (b" \n", [], f"--text must hold some text; got {text}, which is empty"),
        ("ab\u00e9".encode("latin-1"), [], f"--text must be UTF-8; got {text}, which is not at byte 2"),
        (b"a" * 5000, ["--tokens", "2144"], "--tokens must be at least 2145; got 2144"),
        (b"a" * 5000, ["--tokens", "5001"], "what the text has, which is 5000 bytes long; got 5001"),
    ]:
        text.write_bytes(content)
        assert demo.run(demo_args("--output-dir", str(tmp_path / "out"), "--text", str(text), *options)) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_paths_are_printed_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "perform_tiny", lambda *_: {})

    def real(args, device, text, console):
        demo.show(console, [], {"source": str(args.text), "python": "3", "bytes": "1", "sha256": "0"})

    monkeypatch.setattr(demo, "perform_real", real)
    text = tmp_path / "a[b]c:heart:.txt"
    text.write_text("a" * 20000)
    folder = tmp_path / "[" / "x]"
    assert demo.run(demo_args("--output-dir", str(folder), "--text", str(text))) == 0
    out = capsys.readouterr().out
    assert f"are in {folder}." in out
    assert f"Text: {text};" in out


@pytest.mark.parametrize("seqlen", [6000, 8192])
def test_long_text_has_its_keys_and_copies_where_it_says(seqlen):
    text = "".join(chr(97 + random.Random(i).randrange(26)) for i in range(seqlen))
    long_text = act_real.compose(CharacterTokenizer(), text, seqlen, seed=5)
    tokens = long_text.tokens[0]
    assert long_text.tokens.shape == (1, seqlen)
    for copy in long_text.copies:
        first = tokens[copy.begin - copy.distance : copy.end - copy.distance]
        assert torch.equal(tokens[copy.begin : copy.end], first)
    whole = "".join(map(chr, tokens.tolist()))
    for answer in long_text.answers:
        key = whole[answer.begin : answer.end]
        assert whole.count(key) == 2
        assert whole.index(key) == pytest.approx(answer.depth * seqlen, abs=40)
    assert long_text.copies[-1].end <= long_text.last.begin
    assert long_text.last.end < min(answer.begin for answer in long_text.answers)
    with pytest.raises(ValueError, match="must have at least"):
        act_real.compose(CharacterTokenizer(), text, 500, seed=5)
    with pytest.raises(ValueError, match="has only 99 tokens"):
        act_real.compose(CharacterTokenizer(), text[:99], seqlen, seed=5)


def test_act_2_figures_on_a_small_model(tiny):
    """The tiny model stands in for the real one: characters are its tokens too."""
    text = topics_text("held_out")[:6000].encode("ascii", "replace").decode()
    tokenizer = CharacterTokenizer()
    long_text = act_real.compose(tokenizer, text, 6000, seed=1)
    seen = []
    figures = act_real.measure(tiny, tokenizer, long_text, seen.append, lambda: None)
    assert seen == ["vanilla", "DCA", "YaRN", "NTK", "window"]
    for method, result in figures["methods"].items():
        measured = [x is not None for x in result["loss_by_position"]]
        assert measured == [method != "window"] * 16  # 128 characters are less than half a bucket of 375
        assert (len(result["passkeys"]) == 5) == (method != "window")
    plain = figures["methods"]["vanilla"]["loss_by_position"][0]
    assert plain == pytest.approx(predict(tiny, long_text.tokens).mean_loss(1, 375), abs=1e-6)
    assert figures["methods"]["DCA"]["loss_last"] < figures["methods"]["vanilla"]["loss_last"]
