"""Texts and passkey prompts that the demo and `bench/quality/train_tiny.py` share.

The tiny model reads bytes: a token is a byte value, 0 to 255. Text comes from `pydoc_data.topics`, the language
reference that ships with every Python; it changes with the Python version, so whoever prints a figure also prints
`describe_text`.
"""

from __future__ import annotations

import hashlib
import platform
import random
import zlib

import torch

NEEDLE = " Pass key: {key}. "
QUESTION = " Pass key: "
KEY_DIGITS = 5

# One topic in four is never trained on. The choice hangs on the name alone, so a topic stays on its side of the split
# in every Python version.
HELD_OUT_EVERY = 4


def topics_text(split: str = "all") -> str:
    """Topics of Python's language reference in the order of their names; split is "train", "held_out" or "all"."""
    from pydoc_data.topics import topics

    if split not in ("train", "held_out", "all"):
        raise ValueError(f'split must be "train", "held_out" or "all"; got {split!r}')
    names = sorted(topics)
    if split != "all":
        names = [n for n in names if (zlib.crc32(n.encode()) % HELD_OUT_EVERY == 0) == (split == "held_out")]
    return "\n".join(topics[name] for name in names)


def describe_text(text: str) -> dict[str, str]:
    """What identifies a text in a report: its sha256 and size, and the Python version it may have come from."""
    data = text.encode()
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": str(len(data)),
        "python": platform.python_version(),
    }


def to_bytes(text: str) -> torch.Tensor:
    """The text's UTF-8 bytes as int64 token ids, shape (number of bytes,)."""
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def random_key(rng: random.Random) -> str:
    """Five decimal digits, the first not zero."""
    return str(rng.randrange(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS))


def passkey_row(text: torch.Tensor, length: int, depth: float, rng: random.Random) -> torch.Tensor:
    """One passkey prompt of exactly `length` bytes: text, needle at `depth` (0 start, 1 end), text, question, answer.

    text: (n,) int64 bytes to draw the filling from; returns (length,) int64.
    """
    key = random_key(rng)
    needle = to_bytes(NEEDLE.format(key=key))
    closing = to_bytes(QUESTION + key)
    room = length - len(needle) - len(closing)
    if room < 0:
        raise ValueError(
            f"length must be at least {len(needle) + len(closing)} to hold needle and question; got {length}"
        )
    start = rng.randrange(len(text) - room + 1)
    filling = text[start : start + room]
    cut = round(depth * room)
    return torch.cat([filling[:cut], needle, filling[cut:], closing])


def passkey_prompts(text: torch.Tensor, length: int, depth: float, count: int, rng: random.Random) -> torch.Tensor:
    """`count` independent prompts with the needle at the same depth, (count, length) int64."""
    return torch.stack([passkey_row(text, length, depth, rng) for _ in range(count)])


def exact_matches(predicted: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Which prompts greedy decoding would answer exactly, (count,) bool.

    predicted: (count, digits) token ids, the likeliest at each step with the true answer before it fed in; answers:
    (count, digits). Greedy decoding reproduces a whole answer if and only if it is right at every step given the true
    steps before, so one teacher-forced pass decides it.
    """
    return (predicted == answers).all(-1)
