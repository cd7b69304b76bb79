"""Greedy generation behind a long prompt: the fused operators against the reference implementation, token by token.

    python bench/quality/greedy_reference.py --tokens 12288 --new 16

Loads SmolLM2-135M-Instruct as `dca-ext demo` does (its folder with --model, or any other), gives it Dual Chunk
Attention, and generates twice: with the fused operators, and with the functions of `dca_ext.reference` in their place.
Exits with 1 if a token differs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from unittest import mock

import torch

from dca_ext import functional, reference, replace_attention
from dca_ext.cli import models
from dca_ext.cli.tasks import topics_text

SWAPPED = ("dca_attention", "dca_attention_with_kvcache", "rotate_keys")


def reference_in_place(dtype: torch.dtype) -> mock._patch_multiple:  # type: ignore[name-defined]
    """Puts the reference functions, computing in ``dtype``, where the attention modules look for the fused ones."""

    def slow(name: str) -> object:
        return lambda *args, **kwargs: getattr(reference, name)(*args, compute_dtype=dtype, **kwargs)

    return mock.patch.multiple(functional, **{name: slow(name) for name in SWAPPED})


@torch.inference_mode()
def generate(model: torch.nn.Module, prompt: torch.Tensor, new: int, label: str) -> list[int]:
    """Greedy tokens behind ``prompt`` (1, seqlen)."""
    start = time.perf_counter()
    out = model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)  # type: ignore[operator]
    tokens = out[0, prompt.shape[1] :].tolist()
    print(f"{label}: {tokens} in {time.perf_counter() - start:.0f} s", flush=True)
    return tokens


def main() -> int:
    """Runs both and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder or GGUF file; default: SmolLM2 as the demo has it")
    parser.add_argument("--text", type=Path, help="the prompt's text; default: pydoc_data.topics")
    parser.add_argument("--tokens", type=int, default=12288, help="length of the prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate")
    parser.add_argument("--float64", action="store_true", help="the reference computes in float64 (slower)")
    args = parser.parse_args()
    model, tokenizer = models.load_smollm2() if args.model is None else models.load_model(str(args.model))
    text = topics_text() if args.text is None else args.text.read_text(encoding="utf-8")
    prompt = tokenizer(text[: 8 * args.tokens], return_tensors="pt", add_special_tokens=False)["input_ids"]
    prompt = prompt[:, : args.tokens]
    replace_attention(model.eval())
    fused = generate(model, prompt, args.new, f"fused, {prompt.shape[1]} tokens")
    with reference_in_place(torch.float64 if args.float64 else torch.float32):
        exact = generate(model, prompt, args.new, "reference")
    print("equal" if fused == exact else "DIFFERENT")
    return 0 if fused == exact else 1


if __name__ == "__main__":
    raise SystemExit(main())
