"""What a KV cache's number format costs a real model: loss over one long text, with K and V as each format stores them.

    python bench/quality/cache_formats.py --tokens 12288

Loads SmolLM2-135M-Instruct as `dca-ext demo` does (its folder with --model, or any other Llama), gives it Dual Chunk
Attention, and reads the text once per format in one pass; only what the attention reads differs:

    fp32          K and V as they are computed
    bf16          rotated K, and V, rounded to bfloat16
    e4m3          in float8_e4m3fn caches, one scale per KV head and layer from the text's first tokens (--calibrate)
    e4m3, no scale
    int8          in int8 caches, a scale for each token and KV head
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

from dca_ext import (
    DCAConfig,
    dca_attention_with_kvcache,
    functional,
    kv_cache_scale,
    replace_attention,
    rotate_and_append_kv,
    rotate_keys,
)
from dca_ext.cli import models
from dca_ext.cli.demo import progress_bar
from dca_ext.cli.quality import predict
from dca_ext.cli.tasks import describe_text, topics_text

#: Attention of whole sequences from unrotated q, k and v, as `dca_ext.dca_attention`.
Attention = Callable[..., Tensor]


def through_rounded(dtype: torch.dtype) -> Attention:
    """Keys rotated and then rounded to ``dtype``, values rounded to it, and attention over those numbers."""

    def attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, config: DCAConfig, **kwargs: Any) -> Tensor:
        k = rotate_keys(k, cos, sin, config)
        k, v = (x.to(dtype).to(q.dtype) for x in (k, v))
        return dca_attention_with_kvcache(q, k, v, cos, sin, config, cache_seqlens=k.shape[1], **kwargs)

    return attend


def through_e4m3(calibrate: int) -> Attention:
    """The library's own 8-bit caches; scales from the first ``calibrate`` tokens, 0: none."""

    def attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, config: DCAConfig, **kwargs: Any) -> Tensor:
        caches = [torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format) for x in (k, v)]
        scales = [kv_cache_scale(x[:, :calibrate]) if calibrate else None for x in (k, v)]
        named = dict(k_scale=scales[0], v_scale=scales[1])
        rotate_and_append_kv(k, v, *caches, cos, sin, config, cache_seqlens=0, **named)
        return dca_attention_with_kvcache(q, *caches, cos, sin, config, cache_seqlens=k.shape[1], **named, **kwargs)

    return attend


def through_int8(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, config: DCAConfig, **kwargs: Any) -> Tensor:
    """The library's own int8 caches."""
    caches = [torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format) for x in (k, v)]
    named = {name: torch.empty(x.shape[:-1]) for name, x in (("k_scale", k), ("v_scale", v))}
    rotate_and_append_kv(k, v, *caches, cos, sin, config, cache_seqlens=0, **named)
    return dca_attention_with_kvcache(q, *caches, cos, sin, config, cache_seqlens=k.shape[1], **named, **kwargs)


def formats(calibrate: int) -> dict[str, Attention]:
    """Name of each format and how attention goes through it."""
    return {
        "fp32": functional.dca_attention,
        "bf16": through_rounded(torch.bfloat16),
        "e4m3": through_e4m3(calibrate),
        "e4m3, no scale": through_e4m3(0),
        "int8": through_int8,
    }


def measure(model: Any, tokens: Tensor, chosen: dict[str, Attention]) -> dict[str, Tensor]:
    """Loss of every token but the first, in nats, for each format."""
    losses = {}
    layers = model.config.num_hidden_layers
    with progress_bar(Console(stderr=True)) as bars:
        for name, attention in chosen.items():
            bar = bars.add_task(name, total=layers)
            with mock.patch.object(functional, "dca_attention", attention):
                predictions = predict(model, tokens, on_layer=partial(bars.advance, bar))
            losses[name] = predictions.loss[0].double()
    return losses


def summarise(losses: dict[str, Tensor], last: int) -> list[dict[str, Any]]:
    """Perplexity per format, and its difference from fp32 in nats per token with the standard error of that mean."""
    rows = []
    for name, loss in losses.items():
        difference = loss - losses["fp32"]
        rows.append(
            {
                "format": name,
                "perplexity": math.exp(loss.mean().item()),
                "perplexity_last": math.exp(loss[-last:].mean().item()),
                "difference": difference.mean().item(),
                "standard_error": difference.std().item() / math.sqrt(len(difference)),
            }
        )
    return rows


def main() -> int:
    """Measures and prints a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder or GGUF file; default: SmolLM2 as the demo has it")
    parser.add_argument("--text", type=Path, help="what to read; default: pydoc_data.topics")
    parser.add_argument("--tokens", type=int, default=12288, help="how much of it")
    parser.add_argument("--last", type=int, default=2048, help="tokens at the end that are also given alone")
    parser.add_argument(
        "--formats", metavar="NAME,NAME", help="some of the above; fp32 is always read, to compare with"
    )
    parser.add_argument("--calibrate", type=int, default=256, help="tokens that the scales come from")
    args = parser.parse_args()
    chosen = formats(args.calibrate)
    if args.formats is not None:
        names = ["fp32", *(name for name in args.formats.split(",") if name != "fp32")]
        if unknown := [name for name in names if name not in chosen]:
            parser.error(f"--formats must be some of {', '.join(chosen)}; got {unknown[0]!r}")
        chosen = {name: chosen[name] for name in names}
    model, tokenizer = models.load_smollm2() if args.model is None else models.load_model(str(args.model))
    text = topics_text() if args.text is None else args.text.read_text(encoding="utf-8")
    tokens = tokenizer(text[: 16 * args.tokens], return_tensors="pt", add_special_tokens=False)["input_ids"]
    tokens = tokens[:, : args.tokens]
    if tokens.shape[1] < max(args.tokens, 2):
        parser.error(f"--tokens must be at least 2, and at most the text's {tokens.shape[1]}; got {args.tokens}")
    replace_attention(model.eval().float())
    start = time.perf_counter()
    rows = summarise(measure(model, tokens, chosen), args.last)
    print(f"{tokens.shape[1]} tokens, {time.perf_counter() - start:.0f} s")
    print(f"{'cache':16} {'perplexity':>10} {f'last {args.last}':>10} {'nats more than fp32':>24}")
    for row in rows:
        more = f"{row['difference']:+.5f} +- {row['standard_error']:.5f}"
        print(f"{row['format']:16} {row['perplexity']:10.4f} {row['perplexity_last']:10.4f} {more:>24}")
    print(json.dumps({"tokens": tokens.shape[1], "text": describe_text(text), "formats": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
