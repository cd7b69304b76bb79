"""Measuring how a language model reads a long text: loss by position and exact recall, in one pass without a cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

# Rows of logits in memory at once: 512 rows of a 49152-word vocabulary are 100 MB in fp32.
ROWS_PER_BLOCK = 512
BITS_PER_NAT = 1 / math.log(2)


@dataclass(frozen=True)
class Predictions:
    """What a model thinks of each token given those before it; column t is about token first + t of the input.

    loss: (batch, count) fp32, in nats; likeliest: (batch, count) int64 token ids.
    """

    first: int
    loss: torch.Tensor
    likeliest: torch.Tensor

    def mean_loss(self, begin: int, end: int) -> float:
        """Mean over the batch and the tokens begin <= t < end, in nats."""
        return self.loss[:, begin - self.first : end - self.first].double().mean().item()

    def at(self, begin: int, end: int) -> torch.Tensor:
        """Likeliest token ids for the tokens begin <= t < end, (batch, end - begin)."""
        return self.likeliest[:, begin - self.first : end - self.first]


@contextlib.contextmanager
def watching_layers(model: Any, on_layer: Callable[[], None] | None) -> Iterator[None]:
    """Calls `on_layer` after each decoder layer of a pass, for progress bars."""
    hooks = []
    if on_layer is not None:
        hooks = [layer.register_forward_hook(lambda *_: on_layer()) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def predict(
    model: Any, tokens: torch.Tensor, first: int = 1, on_layer: Callable[[], None] | None = None
) -> Predictions:
    """One pass of a LlamaForCausalLM over `tokens` (batch, seqlen) int64; predictions for tokens `first` and later.

    The pass runs where the model is; the predictions are on the CPU. The vocabulary is applied to ROWS_PER_BLOCK rows
    at a time, so memory is linear in seqlen and independent of seqlen x vocabulary.
    """
    if not 1 <= first < tokens.shape[1]:
        raise ValueError(f"first must be from 1 to {tokens.shape[1] - 1} for {tokens.shape[1]} tokens; got {first}")
    tokens = tokens.to(model.device)
    with watching_layers(model, on_layer):
        hidden = model.model(tokens, use_cache=False).last_hidden_state[:, first - 1 : -1]
    targets = tokens[:, first:].flatten()
    rows = hidden.flatten(0, 1)
    losses, likeliest = [], []
    for begin in range(0, len(rows), ROWS_PER_BLOCK):
        block = slice(begin, begin + ROWS_PER_BLOCK)
        logits = model.lm_head(rows[block]).float()
        losses.append(F.cross_entropy(logits, targets[block], reduction="none"))
        likeliest.append(logits.argmax(-1))
    shape = (tokens.shape[0], -1)
    return Predictions(first, torch.cat(losses).view(shape).cpu(), torch.cat(likeliest).view(shape).cpu())


def predict_in_batches(model: Any, tokens: torch.Tensor, first: int = 1, tokens_per_batch: int = 16384) -> Predictions:
    """`predict` over (count, seqlen) a few rows at a time."""
    size = max(1, tokens_per_batch // tokens.shape[1])
    parts = [predict(model, rows, first) for rows in tokens.split(size)]
    return Predictions(first, torch.cat([p.loss for p in parts]), torch.cat([p.likeliest for p in parts]))
