"""CUDA attention against torch's flash and cuDNN backends and against the composed form: prefill and decode.

    python bench/bench_attention.py              # all shapes and lengths
    python bench/bench_attention.py --quick      # under three minutes
    python bench/bench_attention.py --only decode --shapes llama3-8b

Prefill: plain causal attention of torch does the same work, 4 * head_dim * heads * batch * sum(i + 1) FLOP. Ours is
timed over rotated keys and unrotated queries, since rotating queries is part of the method; the pass that rotates the
keys is timed apart and printed. Rivals get q and k rotated beforehand, and the composed form (three flash calls per
chunk and a merge) all three rotations of q. A rival that refuses grouped heads gets K and V repeated beforehand.

Decode: one query per sequence behind a cache, replayed as a CUDA graph; bytes are those of K and V, in percent of a
4 GiB device-to-device copy (read plus written) of the same run. A cache of e4m3 has half the bytes; the table says how
much faster that is.

The L2 cache is flushed before every timed call, and contenders take turns. Before anything is timed, each is compared
with float64 on a small shape, and at each prefill shape ours with the composed form. Ctrl-C keeps what there is.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accuracy import relative_error
from attention_cases import (
    BACKENDS,
    SHAPES,
    Case,
    Contender,
    Inputs,
    Rivals,
    make_inputs,
    ours,
    ours_by,
    ours_e4m3,
    ours_paged,
    rotation_pass,
)
from attention_report import OURS, case_name, save_plot, tables
from benchmark_results import ROOT, Row, command_line, commit_and_date, write_json
from composed_attention import exact_attend
from cuda_timing import (
    GIB,
    CacheFlush,
    alternating_seconds,
    as_graph,
    copy_bandwidth,
    device_facts,
    matmul_rate,
    rounds_for,
)
from geometries import CONFIGS, config_for
from samples import quantile
from torch import Tensor

import dca_ext
from dca_ext import DCAConfig, reference

#: Norm of the error over norm of the result that 16-bit inputs explain; a wrong kernel is far above.
TOLERANCE = 1e-2

LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072]
DECODE_LENGTHS = [8192, 32768, 131072, 524288, 1048576, 4194304]
DECODE_BATCHES = [1, 8, 32]
MOST_KEYS = 4 * 2**20  # batch * kv_len
QUICK: dict[str, list[Any]] = {
    "shapes": ["llama3-8b"],
    "lengths": [4096, 16384, 65536],
    "chunk_lens": [2560],
    "decode_lengths": [32768, 131072],
    "decode_batches": [1, 8, 32],
}


class ContextLostError(RuntimeError):
    """The device answers nothing any more."""


# --- Which cases ------------------------------------------------------------------------------------------------------


def prefill_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Shapes, then head_dim, chunk length and length. One chunk alone is plain causal attention, which says nothing."""
    for shape in args.shapes:
        for head_dim in args.head_dims:
            for chunk_len in args.chunk_lens:
                for seqlen in args.lengths:
                    if seqlen > chunk_len:
                        yield Case("prefill", shape, *SHAPES[shape], head_dim, args.batch, seqlen, chunk_len)


def decode_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Batches and lengths of at most 4M keys in all."""
    for shape in args.shapes:
        for head_dim in args.head_dims:
            for batch in args.decode_batches:
                for kv_len in args.decode_lengths:
                    if batch * kv_len <= MOST_KEYS:
                        yield Case("decode", shape, *SHAPES[shape], head_dim, batch, kv_len, args.chunk_lens[0])


# --- Right before fast ------------------------------------------------------------------------------------------------


def check_contenders(x: Inputs, contenders: Iterable[Contender]) -> dict[str, str]:
    """Contender -> what is wrong with its result, compared with float64 from the same inputs; empty if nothing."""
    prefill = x.case.kind == "prefill"
    chunked = reference.dca_attention_with_kvcache(
        x.q, x.k, x.v, x.cos, x.sin, x.config, cache_seqlens=x.case.seqlen, out_dtype=torch.float64
    )
    assert isinstance(chunked, Tensor)
    plain = exact_attend(x.q_rotated["intra"] if prefill else x.q, x.k, x.v, prefill)[0]
    verdicts = {}
    for contender in contenders:
        try:
            expected = contender.exact() if contender.exact else plain if contender.name in BACKENDS else chunked
            error = relative_error(contender.call(), expected)
            verdicts[contender.name] = "" if error <= TOLERANCE else f"off by {error:.2e} (norm), allowed {TOLERANCE:g}"
        except Exception as reason:
            verdicts[contender.name] = one_line(reason)
    return verdicts


def one_line(error: BaseException) -> str:
    """An error's first line; raises ContextLostError if no later call can work."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    lost = ("illegal memory access", "unspecified launch failure", "misaligned address", "illegal instruction")
    if any(words in str(error) for words in lost):
        raise ContextLostError(text) from error
    return text


def uses_our_operators(contender: str) -> bool:
    """Whether an error of this contender is one of this library."""
    return contender.startswith(OURS) or "our merge" in contender


class Checks:
    """Which contenders are right, asked once per kind, shape and head_dim on a few hundred tokens."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype) -> None:
        self.args, self.dtype = args, dtype
        self.known: dict[tuple[str, str, int], dict[str, str]] = {}
        self.failures: list[str] = []

    def wrong(self, case: Case, rivals: Rivals) -> dict[str, str]:
        """Contender -> why it does not take part."""
        key = (case.kind, case.shape, case.head_dim)
        if key not in self.known:
            small = Case(*key[:2], case.heads, case.kv_heads, case.head_dim, 2, 1024, 256)
            x = make_inputs(small, DCAConfig(256, 300), self.dtype)
            verdicts = check_contenders(x, everyone(x, rivals, self.args, head_by_head=True))
            self.known[key] = {name: verdict for name, verdict in verdicts.items() if verdict}
            good = [name for name, verdict in verdicts.items() if not verdict]
            print(f"  compared with float64 ({case.kind}, {case.shape}, d{case.head_dim}): {', '.join(good)} agree")
            for name, verdict in self.known[key].items():
                print(f"  {name} takes no part: {verdict}")
                if uses_our_operators(name) or verdict.startswith("off by"):  # a rival may refuse, but not be wrong
                    self.failures.append(f"{case.kind} {case.shape} d{case.head_dim}, {name}: {verdict}")
        return self.known[key]


# --- Timing -----------------------------------------------------------------------------------------------------------


def everyone(x: Inputs, rivals: Rivals, args: argparse.Namespace, *, head_by_head: bool) -> list[Contender]:
    """Ours first."""
    own = [ours(x)]
    # Variants are kernels of prefill.
    own += [ours_by(x, name) for name in args.kernels if x.case.kind == "prefill" or ":" not in name]
    if x.case.kind == "decode":
        if args.page_size and x.case.seqlen % args.page_size == 0:
            own.append(ours_paged(x, args.page_size))
        if not args.no_e4m3:
            own.append(ours_e4m3(x))
    return own + rivals.contenders(x, head_by_head=head_by_head)


def run_case(case: Case, run: Run) -> list[Row]:
    """Rows of all contenders of one case; a row without a rate has a reason."""
    args = run.args
    common = {**vars(case), "work": case.work, "dtype": args.dtype}
    rivals = run.rivals_for(case)
    needed = case.bytes_needed(repeated_kv=rivals.need_repeated_kv(case)) + GIB
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        reason = f"needs about {needed / GIB:.0f} GiB, {free / GIB:.0f} GiB are free"
        return [{**common, "contender": OURS, "skipped": reason}]
    wrong = run.checks.wrong(case, rivals)
    x = make_inputs(case, config_for(case.chunk_len), run.dtype)
    head_by_head = case.kind == "prefill" and case.seqlen <= args.per_head_up_to
    contenders = [c for c in everyone(x, rivals, args, head_by_head=head_by_head) if c.name not in wrong]

    rows: dict[str, Row] = {c.name: {**common, "contender": c.name, "note": c.note} for c in contenders}
    for contender in contenders:
        if contender.work is not None:
            rows[contender.name]["work"] = contender.work
    calls: dict[str, Any] = {}
    for contender in contenders:
        try:
            calls[contender.name] = as_graph(contender.call) if case.kind == "decode" else contender.call
            calls[contender.name]()
            torch.cuda.synchronize()
        except Exception as reason:
            calls.pop(contender.name, None)
            rows[contender.name]["skipped"] = one_line(reason)
            if uses_our_operators(contender.name) and not isinstance(reason, torch.OutOfMemoryError):
                run.checks.failures.append(f"{case_name(rows[contender.name])}, {contender.name}: {one_line(reason)}")
            torch.cuda.empty_cache()
    if calls:
        rounds = rounds_for(calls, run.flush, most=args.rounds, budget_s=args.case_seconds)
        for name, seconds in alternating_seconds(calls, rounds, run.flush).items():
            rows[name] |= figures(rows[name]["work"], seconds, run.ceilings[case.kind])
    if case.kind == "prefill" and OURS in calls:
        pass_over_k = {"rotate_keys": rotation_pass(x)}
        times = alternating_seconds(pass_over_k, 2 + args.rounds, run.flush)["rotate_keys"][2:]
        rows[OURS]["rotate_keys_ms"] = 1e3 * quantile(times, 0.5)
        if "composed" in calls:
            error = relative_error(calls[OURS](), calls["composed"]())
            rows[OURS]["difference_to_composed"] = error
            if not error <= 2 * TOLERANCE:
                run.checks.failures.append(f"{case_name(rows[OURS])}: ours and composed differ by {error:.2e} (norm)")
    return list(rows.values())


def figures(work: float, seconds: list[float], ceiling: float) -> Row:
    """What a row says of its times."""
    median = quantile(seconds, 0.5)
    return {
        "median_ms": 1e3 * median,
        "p10_ms": 1e3 * quantile(seconds, 0.1),
        "p90_ms": 1e3 * quantile(seconds, 0.9),
        "rounds": len(seconds),
        "rate": work / median,
        "percent_of_ceiling": 100.0 * work / median / ceiling,
    }


class Run:
    """What all cases share, and the results so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dtype = getattr(torch, args.dtype)
        self.flush = CacheFlush()
        self.checks = Checks(args, self.dtype)
        self.rivals: dict[tuple[str, str, int], Rivals] = {}
        bandwidth, copied = copy_bandwidth()
        self.ceilings = {"prefill": matmul_rate(self.dtype), "decode": bandwidth}
        self.results: dict[str, Any] = {
            **device_facts(),
            "dca_ext": dca_ext.__version__,
            "build": dca_ext.build_info(),
            **commit_and_date(),
            "command": command_line(sys.argv),
            "copy_bytes_per_s": bandwidth,
            "copied_bytes": copied,
            "matmul_flop_per_s": self.ceilings["prefill"],
            "flushed_bytes": self.flush.buffer.numel() * 4,
            "rows": [],
        }

    def rivals_for(self, case: Case) -> Rivals:
        """Asked once per kind, shape and head_dim."""
        key = (case.kind, case.shape, case.head_dim)
        if key not in self.rivals:
            self.rivals[key] = Rivals(case, self.dtype)
            for name, support in self.rivals[key].support.items():
                if support.reason and (case.kind == "prefill" or name in BACKENDS):
                    print(f"  {name} takes no part: {support.reason}")
        return self.rivals[key]

    def save(self) -> None:
        """Writes what there is."""
        write_json(self.results, self.args.out / "attention.json")


def summary_of(row: Row) -> str:
    """One contender in a progress line."""
    if "rate" not in row:
        return f"{row['contender']} skipped ({row.get('skipped', 'no reason given')})"
    rate = f"{row['rate'] / 1e12:.1f} TFLOP/s" if row["kind"] == "prefill" else f"{row['rate'] / 1e9:.0f} GB/s"
    return f"{row['contender']} {rate}"


def run_cases(cases: Sequence[Case], run: Run) -> str:
    """Runs and saves case after case; returns why it ended early, or nothing."""
    start = time.monotonic()
    for index, case in enumerate(cases, 1):
        title = case_name(vars(case))
        if run.args.limit and time.monotonic() - start > run.args.limit:
            return f"--limit of {run.args.limit} s reached before case {index} of {len(cases)} ({title})"
        print(f"[{index}/{len(cases)}] {case.kind} {title}", flush=True)
        try:
            rows = run_case(case, run)
        except ContextLostError as error:
            return f"{title}: {error}; the device's context is lost"
        except torch.OutOfMemoryError as error:
            rows = [{**vars(case), "work": case.work, "contender": OURS, "skipped": one_line(error)}]
        torch.cuda.empty_cache()
        run.results["rows"] += rows
        run.save()
        print("  " + "; ".join(summary_of(row) for row in rows), flush=True)
    return ""


# --- The command line -------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --quick sets what it does not say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, under three minutes")
    parser.add_argument("--only", choices=["prefill", "decode"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=1, help="of prefill")
    parser.add_argument("--lengths", type=int, nargs="+", help="of prefill, in tokens")
    parser.add_argument("--chunk-lens", type=int, nargs="+", help="decode takes the first")
    parser.add_argument("--decode-batches", type=int, nargs="+")
    parser.add_argument("--decode-lengths", type=int, nargs="+", help="keys of each sequence")
    parser.add_argument("--page-size", type=int, default=64, help="of the paged decode; 0: none")
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further contenders: dca_ext by kernels that the device would not choose, such as sm80 or "
        "sm90:three_consumers, or variants of a build with DCA_CUDA_VARIANTS=ON, such as sm90:per_tile",
    )
    parser.add_argument("--no-e4m3", action="store_true", help="no decode over caches of e4m3")
    parser.add_argument(
        "--per-head-up-to", type=int, default=8192, help="tokens up to which the per-head form is timed"
    )
    parser.add_argument("--rounds", type=int, default=25, help="timed calls of each contender at most")
    parser.add_argument("--case-seconds", type=float, default=6.0, help="device time of a case, about")
    parser.add_argument("--limit", type=float, help="start no case after so many seconds")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results/DATE-DEVICE)")
    args = parser.parse_args(arguments)
    full: dict[str, list[Any]] = {
        "shapes": list(SHAPES),
        "lengths": LENGTHS,
        "chunk_lens": list(CONFIGS),
        "decode_lengths": DECODE_LENGTHS,
        "decode_batches": DECODE_BATCHES,
    }
    for name, value in (QUICK if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.quick:
        args.limit = args.limit or 140.0
        args.case_seconds = min(args.case_seconds, 3.0)
    return args


def refusal() -> str:
    """Why nothing can be timed here; empty if it can."""
    if not torch.cuda.is_available():
        return f"bench_attention.py needs a CUDA device; torch {torch.__version__} sees none."
    if not dca_ext.build_info()["cuda_architectures"]:
        return "bench_attention.py needs dca_ext built with CUDA kernels (DCA_CUDA=ON); this build has none."
    return ""


@torch.inference_mode()
def main() -> int:
    """Runs what the command line asks for; 0, 1 if something was wrong, 2 if nothing can run, 130 if interrupted."""
    args = parse()
    if reason := refusal():
        print(reason, file=sys.stderr)
        return 2
    if args.out is None:
        device = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-")
        args.out = ROOT / "bench" / "results" / f"{datetime.now(timezone.utc):%Y-%m-%d}-{device}"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"bench_attention.py: --out must be a folder or become one; got {args.out} ({error})", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    run = Run(args)
    print(
        f"{run.results['device']}, torch {torch.__version__}, this run: copy {run.ceilings['decode'] / 1e12:.2f} TB/s, "
        f"{args.dtype} matrix product {run.ceilings['prefill'] / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    cases: list[Case] = []
    if args.only != "decode":
        cases += prefill_cases(args)
    if args.only != "prefill":
        cases += decode_cases(args)
    status = 0
    try:
        if ended := run_cases(cases, run):
            print(f"Ended early: {ended}.")
            status = 1 if "context is lost" in ended else 0
    except KeyboardInterrupt:
        print("\nInterrupted; what was measured so far follows.")
        status = 130
    run.results["failures"] = run.checks.failures
    run.save()
    title = f"{run.results['device']}, {args.dtype}, commit {run.results['commit']}, {run.results['date']}"
    plotted = save_plot(run.results["rows"], title, args.out / "attention.png")
    text = tables(run.results["rows"])
    (args.out / "attention.txt").write_text(f"{title}\n\n{text}\n")
    print(f"\nResults: {args.out}{'' if plotted else ' (no matplotlib: no picture)'}")
    for failure in run.checks.failures:
        print(f"WRONG: {failure}")
    print(f"\n{text}")
    return status or (1 if run.checks.failures else 0)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the first too: a shell starts background jobs without it
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
