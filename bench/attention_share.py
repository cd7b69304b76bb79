"""How much of a model's forward pass is attention: SmolLM2-135M over a long prompt, plain and with DCA.

    python bench/attention_share.py                          # 16384 tokens, some minutes on two cores
    python bench/attention_share.py --model FOLDER --tokens 4096 --repeats 3 --json share.json

One prefill in one piece without a cache, logits of the last token only, as generate() begins. Attention of the plain
model is transformers' sdpa function; with DCA it is `dca_attention`, which also rotates q and k, while the plain
model's rotation counts as the rest. The tokens are random: time does not depend on them, and beyond its training
length the plain model's answer is of no use anyway.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from benchmark_results import Row, commit_and_date, format_table, output_file, write_json
from cpu_timing import cpu_facts
from rich.console import Console
from samples import quantile
from torch import Tensor

from dca_ext import functional, replace_attention, restore_attention
from dca_ext.cli import models
from dca_ext.cli.arguments import positive
from dca_ext.cli.demo import progress_bar
from dca_ext.cli.quality import watching_layers

DTYPES = ("float32", "bfloat16")

#: Way of attention -> a sample of each finished pass.
Samples = dict[str, list[dict[str, float]]]


class Stopwatch:
    """Seconds spent in the functions that it wraps, and the number of calls."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        return timed


@contextmanager
def watching_dca(watch: Stopwatch) -> Iterator[None]:
    """Times the operator that DCA layers call."""
    with mock.patch.object(functional, "dca_attention", watch.around(functional.dca_attention)):
        yield


@contextmanager
def watching_sdpa(watch: Stopwatch) -> Iterator[None]:
    """Times transformers' sdpa function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["sdpa"] = watch.around(ALL_ATTENTION_FUNCTIONS["sdpa"])  # in front of the class's own
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def forward_once(model: Any, tokens: Tensor, watching: Callable[[Stopwatch], Any]) -> dict[str, float]:
    """Seconds of one pass over tokens (1, seqlen), and of the attention in it."""
    watch = Stopwatch()
    with watching(watch):
        start = time.perf_counter()
        model(tokens, use_cache=False, logits_to_keep=1)
        total = time.perf_counter() - start
    layers = model.config.num_hidden_layers
    if watch.calls != layers:
        raise RuntimeError(f"{layers} layers, but attention was called {watch.calls} times")
    return {"total_s": total, "attention_s": watch.seconds}


def summary(name: str, samples: Sequence[dict[str, float]]) -> Row:
    """Medians over the repeats, and the share in percent."""
    total, attention = (quantile([s[key] for s in samples], 0.5) for key in ("total_s", "attention_s"))
    share = quantile([100.0 * s["attention_s"] / s["total_s"] for s in samples], 0.5)
    return {
        "model": name,
        "total_s": total,
        "attention_s": attention,
        "rest_s": total - attention,
        "attention_percent": share,
        "samples": list(samples),
    }


def measure(model: Any, tokens: Tensor, repeats: int, on_layer: Callable[[str], None], samples: Samples) -> None:
    """Passes of the plain model and with DCA in turn, after one of each over a few tokens; each adds its sample."""
    model.set_attn_implementation("sdpa")
    ways = {"plain, sdpa": (restore_attention, watching_sdpa), "DCA": (replace_attention, watching_dca)}
    for repeat in range(repeats + 1):
        for name, (change, watching) in ways.items():
            change(model)
            if repeat == 0:
                forward_once(model, tokens[:, :256], watching)
                continue
            with watching_layers(model, partial(on_layer, name)):
                taken = forward_once(model, tokens, watching)
            samples.setdefault(name, []).append(taken)


def table(rows: Sequence[Row]) -> str:
    """Seconds and share."""
    lines = [
        [
            row["model"],
            *(f"{row[key]:.3f}" for key in ("total_s", "attention_s", "rest_s")),
            f"{row['attention_percent']:.1f} %",
        ]
        for row in rows
    ]
    return format_table(["model", "forward s", "attention s", "rest s", "attention"], lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, GGUF file or hub name of a Llama; default: SmolLM2 as the demo's")
    parser.add_argument("--tokens", type=positive, default=16384)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=positive, default=1, help="passes of each model; medians are printed")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; 0, 1 with a sentence where the model cannot be had, 130 if interrupted."""
    args = parse(arguments)
    name = args.model or models.SMOLLM2
    samples: Samples = {}
    status = 0
    try:
        model, _ = models.load_model(name, dtype=getattr(torch, args.dtype))
        torch.manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (1, args.tokens))
        with progress_bar(Console(stderr=True, highlight=False)) as bars:
            task = bars.add_task("reading", total=2 * args.repeats * model.config.num_hidden_layers)
            advance = partial(bars.update, task, advance=1)
            measure(model, tokens, args.repeats, lambda what: advance(description=what), samples)
    except models.ModelUnavailable as error:
        print(f"attention_share.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what was measured so far follows.", file=sys.stderr)
        status = 130
    show(args, name, [summary(way, taken) for way, taken in samples.items()])
    return status


def show(args: argparse.Namespace, name: str, rows: Sequence[Row]) -> None:
    """Prints the table, and writes the file if one was asked for."""
    if not rows:
        print("nothing was measured")
        return
    facts = {
        **cpu_facts(),
        **commit_and_date(),
        "model": name,
        "tokens": args.tokens,
        "dtype": args.dtype,
        "repeats": args.repeats,
    }
    print(
        f"{name}, {args.tokens} tokens, {args.dtype}, {facts['machine']}, {facts['threads']} threads\n\n{table(rows)}"
    )
    if args.json:
        write_json(facts | {"rows": rows}, args.json)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the first too: a shell starts background jobs without it
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
