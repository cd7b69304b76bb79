"""CPU attention against torch, transformers and the composed form: prefill, decode, ceilings, memory.

    python bench/bench_cpu.py                                     # two shapes, float32, a few minutes on two cores
    python bench/bench_cpu.py --full --json cpu.json --plot cpu.png          # all shapes, 1k to 32k: some hours
    python bench/bench_cpu.py --shape llama3-8b --dtype float32 bfloat16 --prefill --decode 32768
    python bench/bench_cpu.py --prefill 8192 --decode --contenders torch --budget 200

Prefill, 4 * head_dim * heads * sum(i + 1) FLOP. dca_ext is the attention over rotated keys, with the rotation of q,
which is part of the method; the pass that rotates the keys is timed apart ("K pass"), and "dca_ext + K pass" is both.
"torch sdpa" is scaled_dot_product_attention(is_causal=True), "transformers ..." the attention functions that
LlamaAttention calls, "composed" three calls per chunk and their merge in torch; all of them get q and k rotated
beforehand. The ceiling is torch's bmm of the kernel's own block shapes.

Decode, one query behind a cache, bytes of K and V. "torch ..." are three formulations of the same attention over K and
V in (1, kv_heads, seqlen, head_dim); "dca_ext head-major" reads those very tensors. "dca_ext e4m3" and "int8" are
caches of 8-bit numbers: their speedup below 1 says that they are faster. The ceiling is the quickest read of K and V
that torch offers.

Before anything is timed, everyone is compared with float64 on a small case. Then dca_ext and each of the others take
turns (A B A B ...), so that a machine whose speed drifts slows both. Contenders that do not fit into memory or into
--budget are left out, with the reason. Ctrl-C keeps what there is.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_results import Row, command_line, commit_and_date, output_file, write_json
from cpu_cases import KINDS, SHAPES, Case
from cpu_contenders import CONTENDERS
from cpu_plot import plot_file, save_plot
from cpu_report import DIRECTION, case_name, report
from cpu_runs import Limits, Run, run_case
from cpu_timing import cpu_facts
from peak_memory import peak_memory
from rich.console import Console

from dca_ext import build_info
from dca_ext.cli.arguments import integer, positive, positive_int, positive_number
from dca_ext.cli.demo import progress_bar

DEFAULTS: dict[str, Any] = {
    "shape": ["llama3-8b", "smollm2"],
    "dtype": ["float32"],
    "prefill": [1024, 4096],
    "decode": [4096, 32768],
    "budget": 120.0,
}
FULL: dict[str, Any] = {
    "shape": list(SHAPES),
    "dtype": ["float32", "bfloat16"],
    "prefill": [1024, 2048, 4096, 8192, 16384, 32768],
    "decode": [1024, 4096, 16384, 32768],
    "budget": 600.0,
}
MEMORY_LENGTHS = [4096, 8192, 16384, 32768]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Kinds, then shapes, dtypes and lengths: shorter ones first, whose rates tell what longer ones would take."""
    for kind in KINDS:
        for shape in args.shape:
            for dtype in args.dtype:
                for seqlen in sorted(set(getattr(args, kind))):
                    yield Case(kind, shape, *SHAPES[shape], seqlen, dtype, args.chunk_len)


def memory_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Of prefill in the first dtype."""
    for shape in args.shape:
        for seqlen in args.memory:
            yield peak_memory(Case("prefill", shape, *SHAPES[shape], seqlen, args.dtype[0], args.chunk_len))


# --- The command line -------------------------------------------------------------------------------------------------


MOST_THREADS = 4096
#: Of a chunk: twelve times what a model trained at 128k takes. The rotary tables grow with it.
MOST_CHUNK_LEN = 2**20


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --full and else the defaults set what it does not say."""
    rivals = dict.fromkeys(c.name for kind in CONTENDERS.values() for c in kind if c.role == "rival")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all shapes, float32 and bfloat16, 1k to 32k")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], metavar="DTYPE")
    parser.add_argument("--prefill", type=positive_int, nargs="*", help="lengths in tokens; none given: no prefill")
    parser.add_argument("--decode", type=positive_int, nargs="*", help="keys in the cache; none given: no decode")
    parser.add_argument(
        "--module", type=positive_int, nargs="*", default=[], help="lengths at which LlamaAttention is timed as a whole"
    )
    parser.add_argument(
        "--memory", type=positive_int, nargs="*", help="also measure the memory of a prefill (at 4k to 32k)"
    )
    parser.add_argument("--chunk-len", type=integer(1, MOST_CHUNK_LEN), default=2560)
    parser.add_argument(
        "--contenders", nargs="+", default=[], metavar="NAME", help=f"beginnings of rivals' names: {', '.join(rivals)}"
    )
    parser.add_argument(
        "--pairs", type=positive, default=9, help="alternating pairs of calls behind each median, at the least (9)"
    )
    parser.add_argument(
        "--budget",
        type=positive_number,
        help="seconds that the pairs of one contender on one case may take; then fewer pairs, and below three it is "
        "left out (120; --full: 600)",
    )
    parser.add_argument("--threads", type=integer(1, MOST_THREADS), help="torch's; default: its own choice")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="figures and samples, written after each case")
    parser.add_argument("--plot", type=plot_file, metavar="FILE", help="a picture; needs matplotlib")
    args = parser.parse_args(arguments)
    build = build_info()
    if not build["cpu_isa"]:
        sets = ", ".join(build["cpu_instruction_sets"])
        parser.error(f"DCA_CPU_ISA={os.environ.get('DCA_CPU_ISA')} is no compiled set that runs here; compiled: {sets}")
    for name, value in (FULL if args.full else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.memory = [] if args.memory is None else args.memory or MEMORY_LENGTHS
    unknown = [name for name in args.contenders if not any(rival.startswith(name) for rival in rivals)]
    if unknown:
        parser.error(f"--contenders: no name begins with {unknown[0]!r}; there are {', '.join(rivals)}")
    return args


# --- A run ------------------------------------------------------------------------------------------------------------


class Results:
    """What goes into the JSON file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path: Path | None = args.json
        self.run = Run(Limits(args.pairs, args.budget), args.contenders)
        self.memory: list[Row] = []
        self.facts = {
            **cpu_facts(),
            **commit_and_date(),
            "command": command_line(sys.argv),
            "pairs": args.pairs,
            "budget_s": args.budget,
            "direction": DIRECTION,
        }

    def save(self) -> None:
        """Writes what there is, if a file was asked for."""
        if self.path:
            rows = {"rows": self.run.rows, "memory": self.memory, "failures": self.run.failures}
            write_json(self.facts | rows, self.path)

    def title(self) -> str:
        """What the figures depend on, in one line."""
        facts = self.facts
        isa = facts["build"]["cpu_isa"]
        return (
            f"{facts['machine']} ({facts['processors']} processors, {facts['threads']} threads, kernels {isa}), "
            f"torch {facts['torch']}, commit {facts['commit']}, {facts['date']}"
        )


def measure(args: argparse.Namespace, results: Results, console: Console) -> None:
    """Case after case, saved after each."""
    run, planned = results.run, list(cases(args))
    total = sum(len(run.contenders(case.kind)) for case in planned)
    with progress_bar(console) as bars:
        task = bars.add_task("measuring", total=total)
        done = 0
        for case in planned:
            name = case_name(case.to_dict())
            bars.update(task, description=f"{name}: comparing with float64")

            def next_contender(contender: str, name: str = name) -> None:
                bars.update(task, description=f"{name}: {contender}", advance=1)

            run_case(case, run, next_contender)
            done += len(run.contenders(case.kind))  # a case that was left out passed over its contenders
            bars.update(task, completed=done)
            results.save()
    for row in memory_rows(args):
        results.memory.append(row)
        results.save()


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; 0, 1 if a result was wrong, 130 if interrupted."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = Results(args)
    console = Console(stderr=True, highlight=False)
    status = 0
    try:
        measure(args, results, console)
    except KeyboardInterrupt:
        console.print("Interrupted; what was measured so far follows.")
        status = 130
    results.save()
    print(f"{results.title()}\n\n{report(results.run.rows, results.memory)}")
    for failure in results.run.failures:
        print(f"WRONG: {failure}")
    if args.plot:
        save_plot(results.run.rows, results.title(), args.plot)
    return status or (1 if results.run.failures else 0)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the first too: a shell starts background jobs without it
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
