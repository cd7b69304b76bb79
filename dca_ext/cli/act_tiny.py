"""Act 1 of the demo: a byte-level Llama trained at 128 bytes reads up to 16 times as far.

It ships with the package (trained by bench/quality/train_tiny.py), so nothing is downloaded. All takes a minute or so.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dca_ext.cli.methods import METHODS, dca_config, reading_with
from dca_ext.cli.models import quiet_transformers
from dca_ext.cli.quality import BITS_PER_NAT, predict_in_batches
from dca_ext.cli.tasks import KEY_DIGITS, describe_text, exact_matches, passkey_prompts, to_bytes, topics_text

WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "tiny"
MULTIPLES = (1, 2, 4, 8, 16)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Budget:
    """How much to measure: text windows per length, and passkey prompts per depth and length."""

    windows: int = 8
    prompts: int = 8
    multiples: tuple[int, ...] = MULTIPLES

    @property
    def steps(self) -> int:
        """Units of work that `measure` reports as progress."""
        return len(METHODS) * len(self.multiples) * (1 + len(DEPTHS))


def load_tiny(device: torch.device | str = "cpu") -> Any:
    """The shipped model: fp32 on the CPU, bf16 on a GPU, whose kernels have no fp32."""
    from transformers import LlamaForCausalLM

    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    with quiet_transformers():
        return LlamaForCausalLM.from_pretrained(WEIGHTS, dtype=dtype).to(device).eval()


def loss_windows(text: torch.Tensor, length: int, count: int, rng: random.Random) -> torch.Tensor:
    """`count` windows of `length` bytes at random places of the text, (count, length)."""
    starts = [rng.randrange(len(text) - length + 1) for _ in range(count)]
    return torch.stack([text[start : start + length] for start in starts])


def measure(model: Any, seed: int, budget: Budget, on_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """All figures of act 1.

    `bits_per_byte[method][i]` is the mean loss over the second half of windows of `lengths[i]` bytes, that is over the
    positions from lengths[i] / 2 on; the windows are the same text for every method, the shorter ones the beginnings of
    the longer. `passkey[method][i][j]` is the share of prompts of `lengths[i]` bytes with the key at `depths[j]` that
    greedy decoding answers exactly.
    """
    context = model.config.max_position_embeddings
    lengths = [context * m for m in budget.multiples]
    source = topics_text("held_out")
    text = to_bytes(source)
    rng = random.Random(seed)
    windows = loss_windows(text, max(lengths), budget.windows, rng)
    prompts = {(n, d): passkey_prompts(text, n, d, budget.prompts, rng) for n in lengths for d in DEPTHS}

    bits: dict[str, list[float]] = {method: [] for method in METHODS}
    passkey: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for method in METHODS:
        for length in lengths:
            with reading_with(model, method, length):
                half = length // 2
                predictions = predict_in_batches(model, windows[:, :length], first=half)
                bits[method].append(predictions.mean_loss(half, length) * BITS_PER_NAT)
                on_step()
                row = []
                for depth in DEPTHS:
                    row.append(share_answered(model, prompts[length, depth]))
                    on_step()
                passkey[method].append(row)
    return {
        "context": context,
        "dca_config": dca_config("DCA", context).to_dict(),
        "text": describe_text(source),
        "windows": budget.windows,
        "prompts_per_depth": budget.prompts,
        "lengths": lengths,
        "depths": list(DEPTHS),
        "bits_per_byte": bits,
        "passkey": passkey,
    }


def share_answered(model: Any, prompts: torch.Tensor) -> float:
    """Share of prompts (count, length), each ending with its key, that the model answers exactly."""
    length = prompts.shape[1]
    predictions = predict_in_batches(model, prompts, first=length - KEY_DIGITS)
    answers = prompts[:, -KEY_DIGITS:]
    return exact_matches(predictions.at(length - KEY_DIGITS, length), answers).double().mean().item()


def mean_over_depths(by_depth: list[float]) -> float:
    """The depths weigh the same: they have the same number of prompts."""
    return sum(by_depth) / len(by_depth)
