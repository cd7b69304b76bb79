"""`dca-ext demo`: a model reads a text much longer than it was trained for, in two acts.

Act 1 uses a tiny model that ships with the package and takes a minute or so; act 2 downloads a real one (93 MB, once)
and takes minutes. All figures are computed here; the same seed, text and versions give the same figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dca_ext.cli.arguments import positive

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress

NEEDS = ("matplotlib", "rich", "transformers")
TINY_NOTE = (
    "All of them use the model as it was trained. DCA: chunks of {chunk_len} bytes, no relative position above "
    "{max_position} (DCAConfig.from_pretraining_length({context})); DCA+temp also multiplies the logits by YaRN's "
    "temperature. YaRN and NTK are set anew for each length. Recall fades with length, and the work is that of causal "
    "attention, quadratic in the length."
)
REAL_NOTE = (
    "What to read from it: whether a method holds its loss past {context} tokens, and whether it copies from text that "
    "lies further back than that (DCA: chunk_len {chunk_len}, max_position {max_position}). 'window' is the plain "
    "model over the last {context} tokens alone: DCA is not meant to predict plain text better than that, but the "
    "window cannot know what lies before it. The work is that of causal attention, quadratic in the length."
)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="watch a model read further than it was trained for",
        description=(__doc__ or "").split("\n\n", 1)[1],
    )
    parser.add_argument("--tiny", action="store_true", help="act 1 only: the shipped tiny model, nothing downloaded")
    parser.add_argument("--output-dir", type=Path, default=Path("dca-demo"), help="pictures and figures.json go here")
    parser.add_argument("--seed", type=int, default=0, help="chooses windows, passkeys and their places")
    parser.add_argument("--prompts", type=positive, default=8, help="act 1: passkey prompts per depth and length")
    parser.add_argument("--windows", type=positive, default=8, help="act 1: text windows per length")
    parser.add_argument("--text", type=Path, metavar="FILE", help="act 2: read this UTF-8 text, not Python's reference")
    parser.add_argument("--tokens", type=positive, default=16384, help="act 2: length of the text in tokens")
    parser.add_argument("--device", help="cpu or cuda[:N] (default: cuda where the CUDA kernels are built, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="act 2: of the model (auto: bfloat16 where the device multiplies it)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the demo -> 0 when what could run did, 1 for an argument that does not do (after a sentence)."""
    for name in NEEDS:
        importlib.import_module(name)  # before any work: the command line turns a missing one into a sentence
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)  # users' paths are what they are
    try:
        return perform(args, console)
    except (OSError, ValueError) as error:
        print(f"dca-ext demo: {error}", file=sys.stderr)
        return 1


def perform(args: argparse.Namespace, console: Console) -> int:
    """Act 1, then act 2 unless `--tiny` or without a model; the figures are saved after each."""
    from dca_ext.cli.devices import pick_device

    device = pick_device(args.device)
    text = read_text(args.text)
    if not args.tiny:
        check_tokens(args.tokens, text)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"environment": environment(device), "seed": args.seed}
    figures["tiny"] = perform_tiny(args, device, console)
    save_json(figures, args.output_dir / "figures.json")
    if not args.tiny:
        real = perform_real(args, device, text, console)
        if real is not None:
            figures["smollm2"] = real
            save_json(figures, args.output_dir / "figures.json")
    console.print(f"Figures and pictures are in {args.output_dir}.", soft_wrap=True)
    return 0


def read_text(path: Path | None) -> str:
    """Act 2's text; raises OSError or ValueError, which name the file, for one that does not do."""
    from dca_ext.cli.tasks import topics_text

    if path is None:
        return topics_text()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text must be UTF-8; got {path}, which is not at byte {error.start:,}") from error
    if not text.strip():
        raise ValueError(f"--text must hold some text; got {path}, which is empty")
    return text


def check_tokens(tokens: int, text: str) -> None:
    """Refuses now what `act_real.compose` would refuse after act 1, as far as it shows without the tokenizer."""
    from dca_ext.cli.act_real import MIN_TOKENS

    if tokens < MIN_TOKENS:
        raise ValueError(f"--tokens must be at least {MIN_TOKENS}; got {tokens}")
    size = len(text.encode())
    if size < tokens:  # a token is a byte or more
        raise ValueError(f"--tokens must be at most what the text has, which is {size} bytes long; got {tokens}")


def perform_tiny(args: argparse.Namespace, device: torch.device, console: Console) -> dict[str, Any]:
    """Act 1: measure, show, draw."""
    from dca_ext.cli import act_tiny, charts, tables

    console.rule("Act 1: a byte-level Llama of 0.4M parameters, trained at a context of 128 bytes")
    began = time.perf_counter()
    budget = act_tiny.Budget(windows=args.windows, prompts=args.prompts)
    model = act_tiny.load_tiny(device)
    with progress_bar(console) as bars:
        task = bars.add_task("reading", total=budget.steps)
        figures = act_tiny.measure(model, args.seed, budget, lambda: bars.advance(task))
    show(console, tables.tiny_tables(figures), figures["text"])
    console.print(TINY_NOTE.format(context=figures["context"], **figures["dca_config"]))
    charts.draw_tiny(figures, args.output_dir / "tiny.png")
    console.print(f"Act 1 took {time.perf_counter() - began:.0f} s.")
    return figures


def perform_real(args: argparse.Namespace, device: torch.device, text: str, console: Console) -> dict[str, Any] | None:
    """Act 2: load, measure, show, draw; None, with the reason printed, where the model cannot be had."""
    from dca_ext.cli import act_real, charts, models, tables
    from dca_ext.cli.tasks import describe_text

    console.rule("Act 2: SmolLM2-135M-Instruct, trained at 8192 positions")
    source = str(args.text or "pydoc_data.topics, the language reference")
    try:
        with models.progress_bar() as progress:
            model, tokenizer = models.load_smollm2(progress=progress)
    except models.ModelUnavailable as error:
        console.print(f"Act 2 is left out: {error}")
        return None
    model = model.to(device, pick_dtype(args.dtype, device)).eval()
    long_text = act_real.compose(tokenizer, text, args.tokens, args.seed)
    methods = act_real.passes(args.tokens, model.config.max_position_embeddings)
    with progress_bar(console) as bars:
        task = bars.add_task("reading", total=len(methods) * len(model.model.layers))
        figures = act_real.measure(
            model,
            tokenizer,
            long_text,
            lambda method: bars.update(task, description=f"{method}, {args.tokens} tokens"),
            lambda: bars.advance(task),
        )
    figures["text"] = {"source": source, **describe_text(text)}
    show(console, tables.real_tables(figures), figures["text"])
    console.print(REAL_NOTE.format(context=figures["context"], **figures["dca_config"]))
    charts.draw_real(figures, args.output_dir / "smollm2.png")
    return figures


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """What --dtype says, or what the device is quickest at."""
    import torch

    from dca_ext.cli.devices import native_dtype

    return native_dtype(device) if name == "auto" else getattr(torch, name)


def show(console: Console, parts: list[Any], text: dict[str, str]) -> None:
    """Prints tables, and the text that their figures come from."""
    for table in parts:
        console.print(table)
    source = text.get("source", "pydoc_data.topics, held-out part")
    console.print(
        f"Text: {source}; Python {text['python']}; {text['bytes']} bytes; sha256 {text['sha256']}", soft_wrap=True
    )


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Bars with what is done, how long it took and how long the rest will take; gone when complete."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True) as bars:
        yield bars


def environment(device: torch.device) -> dict[str, Any]:
    """Versions that the figures hang on."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def save_json(figures: dict[str, Any], path: Path) -> None:
    """Written beside its place and renamed, so that an interrupt leaves no half file."""
    partial = path.with_suffix(".part")
    try:
        partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
