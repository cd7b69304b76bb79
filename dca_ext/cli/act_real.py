"""Act 2 of the demo: SmolLM2-135M-Instruct, trained at 8192 positions, reads a text twice as long.

One pass per method over one sequence that holds three measurements:

    plain text ........................... loss by position, and over the last eighth of the text
    five passkeys on the way ............. asked for at the very end
    three passages repeated at 3/4 ....... loss on the second copies, at three distances from the first
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dca_ext.cli.methods import dca_config, reading_with
from dca_ext.cli.quality import Predictions, predict
from dca_ext.cli.tasks import random_key

METHODS = ("vanilla", "DCA", "YaRN", "NTK")
# Everything is a fraction of the length, so that the parts keep clear of each other at every length.
NEEDLES = {"Lisbon": 0.05, "Oslo": 0.20, "Cairo": 0.35, "Lima": 0.50, "Kyoto": 0.70}
COPIES_AT = 3 / 4
COPY_LENGTH = 1 / 32
COPY_DISTANCES = (3 / 16, 6 / 16, 9 / 16)
LAST = 1 / 8
BUCKETS = 16
MIN_TOKENS = 2145  # that `compose` asks for with SmolLM2's tokenizer, whatever the seed

STATEMENT = "\nThe pass key of {city} is"
WINDOW = "window"  # the baseline that forgets: vanilla over the last `context` tokens alone


@dataclass(frozen=True)
class Span:
    """Tokens begin <= t < end of the sequence, and what they are measured for (depth as a share of the length)."""

    begin: int
    end: int
    depth: float = 0.0
    distance: int = 0


@dataclass(frozen=True)
class LongText:
    """tokens (1, seqlen) int64 and where to look in them."""

    tokens: torch.Tensor
    answers: tuple[Span, ...]
    copies: tuple[Span, ...]
    last: Span


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, without the special tokens of a chat."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Passkey:
    """Token ids of the statement, of the key behind it, and of what ends the sentence; and where it is planted."""

    depth: float
    statement: list[int]
    key: list[int]
    end: list[int]


def make_passkeys(tokenizer: Any, rng: random.Random) -> list[Passkey]:
    """One for each city of NEEDLES, with a random key."""
    end = encode(tokenizer, ".\n")
    return [
        Passkey(depth, encode(tokenizer, STATEMENT.format(city=city)), encode(tokenizer, " " + random_key(rng)), end)
        for city, depth in NEEDLES.items()
    ]


def compose(tokenizer: Any, text: str, seqlen: int, seed: int) -> LongText:
    """Lays out `seqlen` tokens of `text` with passkeys, repeated passages and, at the end, the questions.

    Raises ValueError if seqlen or the text is too short.
    """
    rng = random.Random(seed)
    passkeys = make_passkeys(tokenizer, rng)
    closing_len = sum(len(p.statement) + len(p.key) for p in passkeys)
    # With fewer tokens the last eighth would reach back into the second copies.
    if seqlen < 33 * closing_len:
        raise ValueError(f"the text must have at least {33 * closing_len} tokens; got --tokens {seqlen}")
    # No text has 16 characters a token; a longer file need not be tokenised whole.
    body = encode(tokenizer, text[: 16 * seqlen])
    if len(body) < seqlen:
        raise ValueError(
            f"the text has only {len(body)} tokens; {seqlen} are needed (give --tokens or a longer --text)"
        )
    del body[seqlen - closing_len :]
    for passkey in passkeys:
        needle = passkey.statement + passkey.key + passkey.end
        begin = round(passkey.depth * seqlen)
        body[begin : begin + len(needle)] = needle
    copies = repeat_passages(body, seqlen)
    last = Span(len(body) - round(LAST * seqlen), len(body))
    answers = []
    for passkey in rng.sample(passkeys, len(passkeys)):
        body += passkey.statement + passkey.key
        answers.append(Span(len(body) - len(passkey.key), len(body), depth=passkey.depth))
    answers.sort(key=lambda span: span.depth)
    return LongText(torch.tensor([body]), tuple(answers), tuple(copies), last)


def repeat_passages(body: list[int], seqlen: int) -> list[Span]:
    """Overwrites `body` from COPIES_AT on with passages from further back, and says where the second copies lie."""
    copies = []
    length = round(COPY_LENGTH * seqlen)
    for n, share in enumerate(COPY_DISTANCES):
        begin, distance = round(COPIES_AT * seqlen) + n * length, round(share * seqlen)
        body[begin : begin + length] = body[begin - distance : begin - distance + length]
        copies.append(Span(begin, begin + length, distance=distance))
    return copies


def passes(seqlen: int, context: int) -> list[str]:
    """The methods, and the forgetful window where there is something to forget."""
    return [*METHODS, WINDOW] if seqlen > context else list(METHODS)


def read(
    model: Any, long_text: LongText, method: str, on_layer: Callable[[], None] | None = None
) -> tuple[int, Predictions]:
    """One pass; returns the place of its first token in the long text, and predictions counted from that token."""
    context = model.config.max_position_embeddings
    tokens = long_text.tokens
    if method == WINDOW:
        offset = tokens.shape[1] - context
        return offset, predict(model, tokens[:, offset:], on_layer=on_layer)
    with reading_with(model, method, tokens.shape[1]):
        return 0, predict(model, tokens, on_layer=on_layer)


def summarise(long_text: LongText, offset: int, predictions: Predictions, tokenizer: Any) -> dict[str, Any]:
    """The figures of one pass; None where the pass did not see the tokens in question (or barely: see below).

    For the window, whose first tokens have no context, only what lies in its second half counts as seen.
    """
    seqlen = long_text.tokens.shape[1]
    first = 1 if offset == 0 else (offset + seqlen) // 2

    def loss(begin: int, end: int) -> float | None:
        return predictions.mean_loss(begin - offset, end - offset) if begin >= first else None

    width = seqlen // BUCKETS
    borders = [max(1, i * width) for i in range(BUCKETS)] + [BUCKETS * width]
    passkeys = []
    for span in long_text.answers:
        if span.begin - offset < predictions.first:
            continue
        said = predictions.at(span.begin - offset, span.end - offset)[0]
        asked = long_text.tokens[0, span.begin : span.end]
        passkeys.append(
            {
                "depth": span.depth,
                "exact": bool((said == asked).all()),
                "said": tokenizer.decode(said).strip(),
                "key": tokenizer.decode(asked).strip(),
            }
        )
    return {
        "loss_by_position": [loss(a, b) for a, b in itertools.pairwise(borders)],
        "loss_last": loss(long_text.last.begin, long_text.last.end),
        "second_copies": [{"distance": c.distance, "loss": loss(c.begin, c.end)} for c in long_text.copies],
        "passkeys": passkeys,
    }


def measure(
    model: Any, tokenizer: Any, long_text: LongText, on_method: Callable[[str], None], on_layer: Callable[[], None]
) -> dict[str, Any]:
    """All figures of act 2; seconds per pass are kept apart, since they are no property of the seed."""
    context = model.config.max_position_embeddings
    seqlen = long_text.tokens.shape[1]
    methods, seconds = {}, {}
    for method in passes(seqlen, context):
        on_method(method)
        began = time.perf_counter()
        offset, predictions = read(model, long_text, method, on_layer)
        seconds[method] = round(time.perf_counter() - began, 1)
        methods[method] = summarise(long_text, offset, predictions, tokenizer)
    return {
        "context": context,
        "dca_config": dca_config("DCA", context).to_dict(),
        "tokens": seqlen,
        "bucket": seqlen // BUCKETS,
        "last": long_text.last.end - long_text.last.begin,
        "copy_length": long_text.copies[0].end - long_text.copies[0].begin,
        "dtype": str(model.dtype).removeprefix("torch."),
        "methods": methods,
        "seconds": seconds,
    }
