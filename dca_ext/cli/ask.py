"""``dca-ext ask``: answers a question about a document that may be longer than the model's window.

The answer goes to standard output as it is generated; counts, progress and speeds go to standard error.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dca_ext import DCAConfig
from dca_ext.cli.arguments import integer, not_negative_number, positive
from dca_ext.cli.devices import native_dtype, pick_device
from dca_ext.cli.models import SMOLLM2, ModelUnavailable, load_model, progress_bar, quiet_transformers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CACHE_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}

#: Stands for the document while the chat template is rendered; the document itself must not be read for markup.
_DOCUMENT_MARK = "<the-document-goes-here>"
_CHAT = _DOCUMENT_MARK + "\n\nUsing the text above, answer this question: {question}"
_PLAIN = _DOCUMENT_MARK + "\n\nQuestion: {question}\nAnswer:"


class AskError(ValueError):
    """Something about the command's input that the user can mend; the message is one sentence."""


def add_parser(subparsers: Any) -> None:
    """Adds ``ask`` and its options."""
    parser = subparsers.add_parser(
        "ask",
        help="answer a question about a document longer than the model's window",
        description="Answer a question about a document that may be longer than the model's window.",
    )
    parser.add_argument("question", type=_whole_text, help="what to answer from the document")
    parser.add_argument("--file", required=True, help="the document, UTF-8 text; - reads standard input")
    parser.add_argument("--model", default=SMOLLM2, help="a folder, a GGUF file, a hub name, or smollm2 (the default)")
    parser.add_argument("--device", help="cpu or cuda[:N] (default: cuda where the CUDA kernels are built, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of weights and cache (default: bfloat16 on a GPU or a CPU that multiplies it, else float32)",
    )
    parser.add_argument(
        "--cache-dtype",
        choices=_CACHE_DTYPES,
        help="of the cache alone: 8 bits for each number (int8 on the CPU); default: as --dtype",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=200, help="default: 200")
    parser.add_argument("--temperature", type=not_negative_number, default=0.0, help="default: 0, the likeliest token")
    parser.add_argument(
        "--seed", type=integer(-(2**63), 2**64 - 1), default=0, help="for --temperature above 0; default: 0"
    )
    parser.add_argument("--prefill-chunk", type=positive, default=2048, help="tokens read at a time; default: 2048")
    geometry = parser.add_argument_group("Dual Chunk Attention", "default: as the model's config says")
    geometry.add_argument("--no-dca", action="store_true", help="the model as it is, for comparison")
    geometry.add_argument("--chunk-size", type=positive, help="in tokens, with --local-window")
    geometry.add_argument("--local-window", type=int, help="in tokens, with --chunk-size")
    geometry.add_argument("--pretraining-length", type=positive, help="derive the geometry from this many tokens")
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> int:
    """Carries out ``ask`` -> exit status."""
    try:
        dca_config = _geometry(args)
        document = read_document(args.file)
        device = _device(args.device)
        if args.cache_dtype == "int8" and device.type != "cpu":
            raise AskError("--cache-dtype int8 is for the CPU; float8_e4m3fn is for every device")
        _answer(args, document, device, dca_config)
    except (AskError, ModelUnavailable) as error:
        print(f"dca-ext ask: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        tried = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        print(f"dca-ext ask: memory ran out{f' ({tried[0]})' if tried else ''}", file=sys.stderr)
        return 1
    return 0


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch has a type for a GPU's, but a CPU's shows in the message alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _answer(args: argparse.Namespace, document: str, device: torch.device, dca_config: DCAConfig | None) -> None:
    from transformers import TextStreamer

    from dca_ext.cli.stream import decode, greedy, prefill, sampler, stop_ids

    dtype = _DTYPES[args.dtype] if args.dtype else native_dtype(device)
    with progress_bar() as progress:
        model, tokenizer = load_model(args.model, dtype, device, progress)
    attention = _choose_attention(model, dca_config, off=args.no_dca)
    with quiet_transformers():  # it warns that the document is longer than the model's window, which is the point
        prompt, document_len = build_prompt(tokenizer, document, args.question)
    _describe(args, model, document_len, prompt.shape[1], attention)

    cache = _cache(args, model, prompt.shape[1] + min(args.max_new_tokens, 256))
    started = time.perf_counter()
    with _reading_bar(prompt.shape[1]) as advance:
        logits = prefill(model, prompt, min(args.prefill_chunk, prompt.shape[1]), cache, advance)
    read = time.perf_counter()
    choose = sampler(args.temperature, args.seed) if args.temperature > 0 else greedy
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    written = 0
    try:
        for token in decode(model, logits, cache, choose, args.max_new_tokens, stop_ids(model, tokenizer)):
            streamer.put(torch.tensor([token]))
            written += 1
    finally:
        streamer.end()  # also when interrupted: it holds back the last word
    _say(f"read {_rate(prompt.shape[1], read - started)}, wrote {_rate(written, time.perf_counter() - read)}")


# --- The input -------------------------------------------------------------------------------------------------------


def read_document(file: str) -> str:
    """The text of ``file`` (``-``: standard input), line ends made ``\\n``; bytes that are not UTF-8 become U+FFFD,
    with a notice.

    Raises:
        AskError: if it cannot be read or holds nothing but white space.
    """
    if file == "-" and sys.stdin is None:
        raise AskError("--file - cannot be read: standard input is closed")
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise AskError(f"--file {file} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8-sig", errors="replace")
        _say(f"note: {file} is not UTF-8 (first at byte {error.start:,}); what is unreadable becomes U+FFFD")
    if not text.strip():
        raise AskError(f"--file {file} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _whole_text(argument: str) -> str:
    """An argument with U+FFFD for bytes that are not UTF-8, which Python hands over as lone surrogates."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def build_prompt(tokenizer: Any, document: str, question: str) -> tuple[Tensor, int]:
    """The question about the document, in the chat template if the tokenizer has one -> (ids (1, seqlen), tokens of
    the document).

    The document is encoded on its own, so that a ``<|im_end|>`` inside it is text and ends nobody's turn.
    """
    if tokenizer.chat_template:
        message = {"role": "user", "content": _CHAT.format(question=question)}
        frame = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        start = []
    else:
        frame = _PLAIN.format(question=question)
        # What the tokenizer puts in front of any text (Llama 2: <s>), but not what some put behind it.
        start = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    before, _, after = frame.partition(_DOCUMENT_MARK)
    ids = tokenizer(document, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in (before, after))
    return torch.tensor([start + head + ids + tail]), len(ids)


def _geometry(args: argparse.Namespace) -> DCAConfig | None:
    """The geometry that the options ask for, or None: the model's."""
    if args.no_dca and args.cache_dtype:
        args.parser.error("--cache-dtype is for Dual Chunk Attention; give it without --no-dca")
    pair = (args.chunk_size, args.local_window)
    asked = [option for option in (args.no_dca, pair != (None, None), args.pretraining_length) if option]
    if len(asked) > 1:
        args.parser.error("give one of --no-dca, --chunk-size with --local-window, and --pretraining-length")
    if (pair[0] is None) != (pair[1] is None):
        args.parser.error("--chunk-size and --local-window go together")
    try:
        if args.pretraining_length:
            return DCAConfig.from_pretraining_length(args.pretraining_length)
        return DCAConfig.from_chunk_size(*pair) if pair[0] else None
    except ValueError as error:
        return args.parser.error(str(error))


def _device(name: str | None) -> torch.device:
    try:
        return pick_device(name)
    except ValueError as error:
        raise AskError(str(error)) from error


# --- The model -------------------------------------------------------------------------------------------------------


def _choose_attention(model: Any, dca_config: DCAConfig | None, off: bool) -> str:
    """Installs Dual Chunk Attention unless it is ``off`` -> what the model attends with now, in words."""
    from dca_ext import replace_attention

    if off:
        return "the model's own attention"
    try:
        replace_attention(model, dca_config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise AskError(f"this model cannot take Dual Chunk Attention: {error}") from error
    used = next((config for module in model.modules() if (config := getattr(module, "dca_config", None))), None)
    if used is None:  # replace_attention has warned
        return "the model's own sliding windows"
    return f"Dual Chunk Attention, chunk_len {used.chunk_len}, max_position {used.max_position}"


def _cache(args: argparse.Namespace, model: Any, capacity: int) -> Any:
    """An empty cache with room for so many tokens; it may grow."""
    from transformers import DynamicCache

    from dca_ext import DCACache

    if args.no_dca:
        return DynamicCache(config=model.config)
    return DCACache(model.config, dtype=_CACHE_DTYPES.get(args.cache_dtype), capacity=capacity)


# --- What it says ----------------------------------------------------------------------------------------------------


def _describe(args: argparse.Namespace, model: Any, document_len: int, prompt_len: int, attention: str) -> None:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    windows = f" = {prompt_len / window:.1f} windows" if window else ""
    dtype = str(model.dtype).removeprefix("torch.") + (f", cache {args.cache_dtype}," if args.cache_dtype else "")
    _say(
        f"model     {args.model}: {dtype} on {model.device}, window {f'{window:,} tokens' if window else 'not stated'}"
    )
    _say(f"document  {document_len:,} tokens")
    _say(f"prompt    {prompt_len:,} tokens{windows}")
    _say(f"attention {attention}")
    if args.no_dca and window and prompt_len > window:
        _say("note: the prompt is longer than the window and Dual Chunk Attention is off; expect nonsense")


@contextmanager
def _reading_bar(total: int) -> Iterator[Any]:
    """A bar over the prompt's tokens, with their rate -> the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class Rate(ProgressColumn):
        def render(self, task: Any) -> str:
            return f"{task.finished_speed or task.speed or 0:,.0f} tokens/s"

    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("reading", total=total)
        yield lambda tokens: bars.advance(task, tokens)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.1f} tokens/s)"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
