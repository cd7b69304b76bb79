"""What a step of generation costs with each KV cache: SmolLM2-135M behind a long prompt, plain and with DCA.

    python bench/cache_steps.py                              # behind 8192 tokens, some minutes on two cores
    python bench/cache_steps.py --random llama3-8b --tokens 32768 --dtype bfloat16 --device cuda --json steps.json

All caches read the prompt, of random tokens; then they take steps of one token in turn, so that a machine whose speed
drifts slows all of them. Medians, with the bytes that each cache holds. Time depends neither on the tokens nor on the
weights, so that a model of random ones (--random) needs no download.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from benchmark_results import Row, commit_and_date, format_table, output_file, write_json
from cpu_timing import cpu_facts
from rich.console import Console
from samples import quantile
from torch import Tensor

from dca_ext import DCACache, replace_attention, restore_attention
from dca_ext.cli import models
from dca_ext.cli.arguments import positive
from dca_ext.cli.demo import progress_bar
from dca_ext.cli.stream import cache_argument

#: Of models of random weights: what of a LlamaConfig makes time.
SHAPES = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}

#: Tokens that are read at a time.
PIECE = 2048

#: Steps that each cache takes before any is timed.
WARM_UP = 2


def caches(config: Any, slots: int, device: torch.device) -> dict[str, tuple[Callable[[Any], Any], Any]]:
    """Name -> (what gives the model its attention, an empty cache)."""
    from transformers import DynamicCache, StaticCache

    ways: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "plain, DynamicCache": (restore_attention, DynamicCache(config=config)),
        "DCA, DynamicCache": (replace_attention, DynamicCache(config=config)),
        "DCA, StaticCache": (replace_attention, StaticCache(config=config, max_cache_len=slots)),
        "DCA, DCACache": (replace_attention, DCACache(config, capacity=slots)),
    }
    eight_bits = [torch.float8_e4m3fn, *([torch.int8] if device.type == "cpu" else [])]
    for dtype in eight_bits:
        name = f"DCA, DCACache, {str(dtype).removeprefix('torch.')}"
        ways[name] = (replace_attention, DCACache(config, dtype=dtype, capacity=slots))
    return ways


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A Llama of this shape."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with device:
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype).eval()


def bytes_held(cache: Any) -> int:
    """Bytes of the keys and values of all tokens, and of their scales."""
    held = 0
    for layer in cache.layers:
        tensors = [layer.keys, layer.values, *(getattr(layer, "scales", None) or ())]
        held += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return held


def seconds_of_pass(model: Any, tokens: Tensor, cache: Any) -> float:
    """One pass over tokens (1, seqlen) behind what the cache holds."""
    options = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
    start = time.perf_counter()
    model(tokens, **options)
    if tokens.device.type == "cuda":
        torch.cuda.synchronize(tokens.device)
    return time.perf_counter() - start


def measure(
    model: Any, tokens: Tensor, steps: int, advance: Callable[[str], None], results: dict[str, Row]
) -> Iterator[None]:
    """Reads tokens (1, seqlen) into each cache, then yields after every round of steps, with results as they are."""
    device = tokens.device
    ways = caches(model.config, tokens.shape[1] + WARM_UP + steps, device)
    model.set_attn_implementation("sdpa")
    for name, (change, cache) in ways.items():
        change(model)
        for piece in tokens.split(PIECE, dim=1):
            seconds_of_pass(model, piece, cache)
            advance(name)
    token = tokens[:, :1]
    for step in range(WARM_UP + steps):
        for name, (change, cache) in ways.items():
            change(model)
            taken = seconds_of_pass(model, token, cache)
            if step >= WARM_UP:
                row = results.setdefault(name, {"cache": name, "held_mib": bytes_held(cache) / 2**20, "samples_s": []})
                row["samples_s"].append(taken)
        yield


def table(rows: Sequence[Row]) -> str:
    """Milliseconds of a step and mebibytes held, and both as shares of the first row's."""
    lines = []
    first = rows[0]
    for row in rows:
        step, of = quantile(row["samples_s"], 0.5), quantile(first["samples_s"], 0.5)
        lines.append(
            [
                row["cache"],
                f"{1e3 * step:.1f}",
                f"{step / of:.2f}",
                f"{row['held_mib']:.0f}",
                f"{row['held_mib'] / first['held_mib']:.2f}",
            ]
        )
    return format_table(["", "ms a step", "of the first", "MiB held", "of the first"], lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="a folder, GGUF file or hub name of a Llama; default: SmolLM2 as the demo's")
    which.add_argument("--random", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--tokens", type=positive, default=8192, help="of the prompt; default: 8192")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda[:N]")
    parser.add_argument("--steps", type=positive, default=15, help="of each cache; medians are printed")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; 0, 1 with a sentence where the model cannot be had, 130 if interrupted."""
    args = parse(arguments)
    name = f"{args.random}, random weights," if args.random else args.model or models.SMOLLM2
    dtype = getattr(torch, args.dtype)
    results: dict[str, Row] = {}
    status = 0
    try:
        if args.random:
            model = random_model(args.random, dtype, args.device)
        else:
            model, _ = models.load_model(name, dtype=dtype, device=args.device)
        torch.manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (1, args.tokens)).to(args.device)
        with progress_bar(Console(stderr=True, highlight=False)) as bars:
            pieces = -(-args.tokens // PIECE) * len(caches(model.config, 1, args.device))
            reading = bars.add_task("reading", total=pieces)
            stepping = bars.add_task("steps", total=WARM_UP + args.steps)
            advance = partial(bars.update, reading, advance=1)
            for _ in measure(model, tokens, args.steps, lambda what: advance(description=what), results):
                bars.advance(stepping)
    except models.ModelUnavailable as error:
        print(f"cache_steps.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what was measured so far follows.", file=sys.stderr)
        status = 130
    show(args, name, list(results.values()))
    return status


def show(args: argparse.Namespace, name: str, rows: Sequence[Row]) -> None:
    """Prints the table, and writes the file if one was asked for."""
    if not rows:
        print("nothing was measured")
        return
    facts = {
        **cpu_facts(),
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu",
        **commit_and_date(),
        "model": name,
        "tokens": args.tokens,
        "dtype": args.dtype,
    }
    place = facts["device"] if args.device.type == "cuda" else f"{facts['machine']}, {facts['threads']} threads"
    print(f"{name} behind {args.tokens} tokens, {args.dtype}, {place}\n\n{table(rows)}")
    if args.json:
        write_json(facts | {"rows": list(rows)}, args.json)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the first too: a shell starts background jobs without it
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
