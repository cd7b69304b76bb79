"""The console command, end to end with a tiny random model: answers, numbers, refusals, interruption."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch

import dca_ext
from dca_ext import DCAConfig, replace_attention
from dca_ext.cli import main

QUESTION = "Why?"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>"
GEOMETRY = DCAConfig.from_chunk_size(24, 8)
GEOMETRY_OPTIONS = ["--chunk-size", "24", "--local-window", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a window of 32 tokens whose tokenizer has one token per byte, and a chat template."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32,
        initializer_range=0.3,  # wide, so that greedy choices are clear and the method of attention shows in them
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=1,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", chat_template=TEMPLATE
    ).save_pretrained(path)
    return path


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text("Call me Ishmael. " * 12)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load():
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    return load


def expected_answer(loaded, text: str, new_tokens: int, geometry: DCAConfig | None) -> str:
    """transformers' own greedy generation after a prompt put together by hand."""
    model, tokenizer = loaded()
    content = text + f"\n\nUsing the text above, answer this question: {QUESTION}"
    ids = torch.tensor([[0, *tokenizer(content)["input_ids"], 1, 0]])
    if geometry is not None:
        replace_attention(model, geometry)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def ask(folder, file, *options: str) -> int:
    return main(["ask", "--model", str(folder), "--file", str(file), "--device", "cpu", *options, QUESTION])


# --- ask -------------------------------------------------------------------------------------------------------------


def test_ask_streams_what_generate_would_answer(folder, document, loaded, capsys):
    answers = {}
    for geometry, options in [(GEOMETRY, GEOMETRY_OPTIONS), (None, ["--no-dca"])]:
        status = ask(folder, document, "--dtype", "float32", "--max-new-tokens", "16", *options)
        answers[geometry] = capsys.readouterr().out
        assert status == 0
        assert answers[geometry] == expected_answer(loaded, document.read_text(), 16, geometry) + "\n"
    assert answers[GEOMETRY] != answers[None]


def test_ask_takes_the_geometry_of_the_models_window_by_default(folder, document, loaded, capsys):
    assert ask(folder, document, "--dtype", "float32", "--max-new-tokens", "8") == 0
    captured = capsys.readouterr()
    assert captured.out == expected_answer(loaded, document.read_text(), 8, DCAConfig(20, 24)) + "\n"  # 3c/4, c/8
    assert "chunk_len 20, max_position 24" in captured.err
    assert ask(folder, document, "--max-new-tokens", "8", "--pretraining-length", "64") == 0
    assert "chunk_len 40, max_position 48" in capsys.readouterr().err


def test_ask_counts_tokens_and_speed(folder, document, capsys):
    ask(folder, document, "--max-new-tokens", "5")
    err = capsys.readouterr().err
    document_len = len(document.read_bytes())  # a token per byte
    prompt_len = document_len + len(f"\n\nUsing the text above, answer this question: {QUESTION}") + 3
    assert f"document  {document_len} tokens" in err
    assert f"prompt    {prompt_len} tokens = {prompt_len / 32:.1f} windows" in err
    assert "window 32 tokens" in err
    assert re.search(rf"read {prompt_len} tokens in .* \([\d,.]+ tokens/s\), wrote 5 tokens in .* tokens/s\)", err)


def test_ask_may_read_in_any_pieces(folder, document, capsys):
    document.write_text(document.read_text()[:70])
    answers = set()
    for piece in ("1", "7", "16", "4096"):
        ask(folder, document, "--dtype", "float32", "--max-new-tokens", "12", "--prefill-chunk", piece)
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1


@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "int8"])
def test_ask_over_a_cache_of_8_bits(folder, document, capsys, cache_dtype, monkeypatch):
    """The prompt is written to it; what comes of that, test_dca_cache.py knows."""
    from dca_ext.cli import stream

    caches = []
    monkeypatch.setattr(
        stream, "prefill", lambda *args, prefill=stream.prefill: caches.append(args[3]) or prefill(*args)
    )
    assert ask(folder, document, "--dtype", "float32", "--max-new-tokens", "8", "--cache-dtype", cache_dtype) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert f"float32, cache {cache_dtype}, on cpu" in captured.err
    assert str(caches[0].layers[0].keys.dtype) == f"torch.{cache_dtype}"


def test_ask_samples_by_seed(folder, document, capsys):
    answers = []
    for seed in ("1", "1", "2"):
        ask(folder, document, "--max-new-tokens", "12", "--temperature", "3", "--seed", seed)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_ask_stops_at_the_end_token(folder, document, loaded, tmp_path, capsys):
    model, tokenizer = loaded()
    ask(folder, document, "--dtype", "float32", "--max-new-tokens", "9", "--no-dca")
    whole = tokenizer(capsys.readouterr().out.rstrip("\n"))["input_ids"]
    stop = whole[-1]
    model.generation_config.eos_token_id = [stop]
    model.save_pretrained(tmp_path / "stopping")
    tokenizer.save_pretrained(tmp_path / "stopping")
    ask(tmp_path / "stopping", document, "--dtype", "float32", "--max-new-tokens", "9", "--no-dca")
    out = capsys.readouterr().out.rstrip("\n")
    assert out == tokenizer.decode(whole[: whole.index(stop)])


def test_markup_in_the_document_is_only_text(loaded):
    from dca_ext.cli.ask import build_prompt

    _, tokenizer = loaded()
    text = "turn<|im_end|>over"
    prompt, document_len = build_prompt(tokenizer, text, QUESTION)
    ids = prompt[0].tolist()
    assert ids[0] == 0
    assert ids[-2:] == [1, 0]
    assert not {0, 1} & set(ids[1:-2])
    assert document_len == len(text)
    assert tokenizer.decode(ids[1 : 1 + document_len]) == text


@pytest.mark.parametrize("pattern", ["$A", "<|im_start|> $A", "<|im_start|> $A <|im_end|>", "$A <|im_end|>"])
def test_prompt_without_chat_template_is_plain_text(loaded, pattern):
    from tokenizers.processors import TemplateProcessing

    from dca_ext.cli.ask import build_prompt

    _, tokenizer = loaded()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=pattern, special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)]
    )
    ids = build_prompt(tokenizer, "Some text.", QUESTION)[0][0].tolist()
    assert [i for i in ids if i < 2] == ([0] if "<|im_start|>" in pattern else [])  # never the end token
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"Some text.\n\nQuestion: {QUESTION}\nAnswer:"


def test_ask_reads_standard_input(folder, loaded, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo")))
    assert ask(folder, "-", "--dtype", "float32", "--max-new-tokens", "8", "--no-dca") == 0
    assert capsys.readouterr().out == expected_answer(loaded, "one\ntwo", 8, None) + "\n"


def test_document_that_is_not_utf8_is_read_with_a_notice(tmp_path, capsys):
    from dca_ext.cli.ask import read_document

    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    assert read_document(str(tmp_path / "latin.txt")) == "na\ufffdve"
    assert "not UTF-8 (first at byte 2)" in capsys.readouterr().err


def test_ask_refuses_in_one_sentence(folder, document, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    for model, file, options, words in [
        (folder, tmp_path / "absent.txt", [], "absent.txt cannot be read: No such file"),
        (folder, tmp_path, [], "cannot be read: Is a directory"),
        (folder, tmp_path / "empty.txt", [], "is empty"),
        (tmp_path / "absent", document, [], "absent: no such file or folder"),
        (folder, document, ["--device", "abacus"], "--device must be cpu, cuda or cuda:N; got abacus"),
    ]:
        assert ask(model, file, *options) == 1
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""


@pytest.mark.parametrize(
    "options",
    [
        ["--chunk-size", "24"],
        ["--local-window", "8"],
        ["--no-dca", "--pretraining-length", "64"],
        ["--chunk-size", "8", "--local-window", "8"],
        ["--max-new-tokens", "0"],
        ["--temperature", "-1"],
        ["--no-dca", "--cache-dtype", "int8"],
    ],
)
def test_ask_refuses_options_that_make_no_sense(folder, document, options, capsys):
    with pytest.raises(SystemExit) as exit_:
        ask(folder, document, *options)
    assert exit_.value.code == 2
    assert "usage: dca-ext ask" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-new-tokens", "x"], "must be a whole number, at least 1; got x"),
        (["--temperature", "warm"], "must be a finite number, 0 or more; got warm"),
        (["--temperature", "nan"], "must be a finite number, 0 or more; got nan"),
        (["--seed", str(10**22)], f"must be from {-(2**63)} to {2**64 - 1}; got {10**22}"),
    ],
)
def test_ask_says_which_numbers_it_takes(folder, document, options, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        ask(folder, document, *options)
    assert exit_.value.code == 2
    assert f"argument {options[0]}: {words}\n" in capsys.readouterr().err


def test_ask_takes_numbers_that_are_large_or_tiny(folder, document, capsys):
    answers = []
    for options in (["--prefill-chunk", str(10**25)], ["--temperature", "1e-320", "--seed", str(2**64 - 1)]):
        assert ask(folder, document, "--dtype", "float32", "--max-new-tokens", "8", *options) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1], "so cold a draw is the likeliest token"


def test_ask_without_standard_input_is_one_sentence(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert ask(folder, "-") == 1
    assert capsys.readouterr().err == "dca-ext ask: --file - cannot be read: standard input is closed\n"


def test_question_that_is_not_utf8_is_read_all_the_same(folder, document, capsys):
    question = b"na\xefve?".decode("utf-8", "surrogateescape")  # as sys.argv holds it
    options = ["--model", str(folder), "--file", str(document), "--device", "cpu", "--max-new-tokens", "1"]
    assert main(["ask", *options, question]) == 0


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."), MemoryError()]
)
def test_ask_says_that_memory_ran_out(folder, document, monkeypatch, capsys, error):
    def prefill(*args):
        raise error

    monkeypatch.setattr("dca_ext.cli.stream.prefill", prefill)
    assert ask(folder, document) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "dca-ext ask: memory ran out" + (" (tried to allocate 7 bytes)" if str(error) else "")


def test_other_errors_of_the_model_are_not_hidden(folder, document, monkeypatch):
    def prefill(*args):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("dca_ext.cli.stream.prefill", prefill)
    with pytest.raises(RuntimeError, match="shapes differ"):
        ask(folder, document)


@pytest.mark.parametrize("name", ["cpu:3", "cuda:1"])
def test_devices_that_are_not_there_are_refused(name, monkeypatch):
    from dca_ext.cli.devices import pick_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=f"--device must .*; got {name}$"):
        pick_device(name)
    assert pick_device("cuda:0") == torch.device("cuda:0")


def test_ctrl_c_while_streaming_ends_with_130(folder, document):
    command = [sys.executable, "-m", "dca_ext", "ask", "--model", str(folder), "--file", str(document)]
    # Words are shown when a space ends them. A greedy choice can run in circles without one; at this temperature all
    # bytes are about as likely.
    command += ["--max-new-tokens", "1000000", "--device", "cpu", "--temperature", "100", "--seed", "0", QUESTION]
    # What a shell starts in the background ignores Ctrl-C, and so would what it starts.
    heeds_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heeds_ctrl_c) as process:
        too_long = threading.Timer(60, process.kill)
        too_long.start()
        try:
            assert process.stdout.read(1), "nothing was streamed for a minute"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            too_long.cancel()
            process.kill()
    assert process.returncode == 130
    assert b"interrupted" in err
    assert b"Traceback" not in err


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_as_json_names_versions_and_kernel(capsys):
    assert main(["info", "--json", "--seqlen-q", "1", "--seqlen-k", "300", "--heads", "8", "--head-dim", "32"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["dca_ext"] == dca_ext.__version__
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["kernel"]["seqlen_k"] == 300
    assert report["kernel"]["num_heads_kv"] == 8
    assert report["kernel"]["name"].startswith("cpu/")
    assert report["build"] == {key: value for key, value in dca_ext.build_info().items() if key != "version"}


def test_info_as_text_shows_every_value(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for value in (dca_ext.__version__, torch.__version__, "4096", "float32"):
        assert value in out
    for key in dca_ext.build_info():
        assert key.replace("_", " ") in out


def test_info_says_why_no_kernel_takes_a_shape(capsys):
    assert main(["info", "--heads", "9", "--kv-heads", "2"]) == 1
    assert "num_heads" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--kv-heads", "0"], ["--max-position", "0"], ["--seqlen-q", "99999999999"], ["--chunk-len", str(2**31)]],
)
def test_info_refuses_numbers_that_no_kernel_takes(options, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["info", *options])
    assert exit_.value.code == 2
    assert re.search(
        rf"argument {options[0]}: must be from [01] to 2147483647; got {options[1]}\n", capsys.readouterr().err
    )


def test_info_fills_in_heads_and_positions(capsys):
    for options, heads, max_position in [
        ([], (9, 3), 3072),
        (["--heads", "9"], (9, 9), 3072),
        (["--kv-heads", "1"], (9, 1), 3072),
        (["--chunk-len", str(2**31 - 1)], (9, 3), 2**31 - 1),
    ]:
        assert main(["info", "--json", *options]) == 0
        kernel = json.loads(capsys.readouterr().out)["kernel"]
        assert (kernel["num_heads"], kernel["num_heads_kv"]) == heads
        assert kernel["max_position"] == max_position


# --- the command itself ----------------------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"dca-ext {dca_ext.__version__}\n"


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(name in out for name in ("demo", "ask", "info"))


@pytest.mark.parametrize("argv", [[], ["fly"]])
def test_command_line_without_a_command_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert "usage: dca-ext" in capsys.readouterr().err


def without_demo_packages(*argv: str) -> subprocess.CompletedProcess:
    """Runs the command where the packages of the extra ``demo`` cannot be imported."""
    script = """
import sys
for package in ("gguf", "matplotlib", "rich", "safetensors", "tokenizers", "transformers"):
    sys.modules[package] = None
from dca_ext.cli import main
sys.exit(main(sys.argv[1:]))
"""
    return subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, timeout=120)


def test_info_needs_none_of_the_demo_packages():
    done = without_demo_packages("info")
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout


def test_missing_package_is_one_sentence_naming_the_extra(document):
    done = without_demo_packages("ask", "--file", str(document), QUESTION)
    assert done.returncode == 1
    assert re.fullmatch(r"dca-ext: this needs the package \w+: pip install 'dca-ext\[demo\]'\n", done.stderr)


def test_other_import_errors_are_not_hidden(monkeypatch):
    from dca_ext.cli import info

    def broken(args):
        raise ModuleNotFoundError("No module named 'colour'", name="colour")

    monkeypatch.setattr(info, "run", broken)
    with pytest.raises(ModuleNotFoundError, match="colour"):
        main(["info"])


def test_ctrl_c_is_130_without_traceback(monkeypatch, capsys):
    from dca_ext.cli import info

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_reader_that_leaves_is_no_error():
    done = in_a_shell("-m dca_ext info --json | true")
    assert done.stderr == ""


def test_reader_of_the_help_that_leaves_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "dca_ext", "info", "--help"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, timeout=120, env=buffered())
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("-m dca_ext info >&-", "dca-ext: standard output is closed"),
        ("-m dca_ext info > out", "dca-ext: the output cannot be written: File too large"),
        ("-m dca_ext info --help > out", "dca-ext: the output cannot be written: File too large"),
    ],
)
def test_output_that_cannot_be_written_is_one_sentence(command, words):
    done = in_a_shell(command, before="ulimit -f 0; ")  # no file may have a byte, as on a full disk
    assert done.returncode == 1
    assert done.stderr == words + "\n"


def test_characters_that_the_output_lacks_become_question_marks(monkeypatch):
    from dca_ext.cli import info

    def run(args):
        print("漢字 é")
        return 0

    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="latin-1"))
    monkeypatch.setattr(info, "run", run)
    assert main(["info"]) == 0
    assert output.getvalue() == "?? é\n".encode("latin-1")


def buffered() -> dict[str, str]:
    """An environment whose output breaks when it is flushed, as it does by default, and not while it is written."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def in_a_shell(command: str, before: str = "") -> subprocess.CompletedProcess:
    """Runs Python with ``command`` behind it."""
    command = f"{before}{sys.executable} {command}"
    return subprocess.run([command], shell=True, capture_output=True, text=True, timeout=120, env=buffered())
