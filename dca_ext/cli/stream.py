"""Generation in the open: prefill in pieces and decoding token by token, so that a caller can show both as they go."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def cache_argument(model: Any) -> str:
    """What the forward of a transformers model, or of a class of them, calls its cache: ``cache`` from transformers
    5.24 on, ``past_key_values`` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def prefill(
    model: Any, prompt: Tensor, piece_len: int, cache: Any, advance: Callable[[int], None] | None = None
) -> Tensor:
    """Reads ``prompt`` (1, seqlen), int64, into ``cache``, ``piece_len`` tokens at a time -> logits (vocab,) after it.

    Pieces bound the memory of the activations; what they compute does not depend on where the cuts are.
    ``advance(tokens)`` is called after each piece.
    """
    logits, options = None, {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
    with torch.inference_mode():
        for piece in prompt.to(model.device).split(piece_len, dim=1):
            logits = model(piece, **options).logits
            if advance is not None:
                advance(piece.shape[1])
    if logits is None:
        raise ValueError("prompt must hold at least one token; got none")
    return logits[0, -1]


def decode(
    model: Any,
    logits: Tensor,
    cache: Any,
    choose: Callable[[Tensor], int],
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Continues after `prefill`: yields up to ``max_new_tokens`` token ids, and ends before one of ``stop_ids``.

    ``choose`` picks a token from logits (vocab,).
    """
    options = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
    for produced in range(max_new_tokens):
        token = choose(logits)
        if token in stop_ids:
            return
        yield token
        if produced + 1 < max_new_tokens:
            with torch.inference_mode():
                step = torch.tensor([[token]], device=model.device)
                logits = model(step, **options).logits[0, -1]


def greedy(logits: Tensor) -> int:
    """The likeliest token of logits (vocab,)."""
    return int(logits.argmax())


def sampler(temperature: float, seed: int) -> Callable[[Tensor], int]:
    """Draws from softmax(logits / temperature), on the CPU, so that a seed means the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    divisor = max(temperature, torch.finfo(torch.float32).tiny)

    def choose(logits: Tensor) -> int:
        logits = logits.float().cpu()
        # Less the largest, which stays 0 however small the divisor; softmax of an inf would be NaN.
        weights = torch.softmax((logits - logits.max()) / divisor, dim=-1)
        return int(torch.multinomial(weights, 1, generator=generator))

    return choose


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer, according to the model's generation config and its tokenizer."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    ids = [stated] if isinstance(stated, int) else list(stated or ())
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)
