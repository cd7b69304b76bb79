"""Machine instructions per FLOP (prefill) and per byte (decode) of the CPU kernels, which other load does not change.

    cmake -S . -B build -DDCA_BUILD_BENCH=ON && cmake --build build
    python bench/instructions.py --json instructions.json          # some minutes: valgrind runs every instruction

Runs dca_bench on one thread under valgrind's callgrind, which counts what is executed inside `dca::attention` and
nothing else: one call over one KV head of each shape (the others repeat it). With AVX2 an FMA is 16 FLOP in fp32, so a
prefill of nothing but FMAs would be 0.0625; a decode that only loads would be 0.031 per byte. Counts say nothing about
caches and memory, and bf16 is counted as the AVX2 kernels do it: valgrind knows no AVX-512.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmark_results import ROOT, Row, commit, format_table, output_file, write_json
from cpu_cases import SHAPES
from rich.console import Console

from dca_ext.cli.demo import progress_bar

BINARY = Path("bench/cpp/dca_bench")
FUNCTION = "dca::attention(*"


class CannotCountError(RuntimeError):
    """Something is missing, or a run failed; the message is for the user."""


@dataclass(frozen=True)
class Count:
    """One call to count: heads are those of one KV head."""

    operation: str
    shape: str
    group: int
    head_dim: int
    seqlen: int
    chunk_len: int
    dtype: str
    cache_dtype: str

    def arguments(self) -> list[str]:
        """Of dca_bench: one timed call on one thread, nothing before it."""
        flags = {
            "heads": self.group,
            "kv-heads": 1,
            "head-dim": self.head_dim,
            "seqlen": self.seqlen,
            "chunk-len": self.chunk_len,
            "dtype": self.dtype,
            "threads": 1,
            "repeat": 1,
            "warmup": 0,
        }
        if self.operation == "decode":
            flags["cache-dtype"] = self.cache_dtype
        return [self.operation, "--no-ceiling", *(f"--{name}={value}" for name, value in flags.items())]

    def title(self) -> str:
        """In a table."""
        cache = "" if self.cache_dtype == "same" else f", cache {self.cache_dtype}"
        return f"{self.operation} {self.group}/1 d{self.head_dim} {self.dtype}{cache}, {self.seqlen}"


def counts(args: argparse.Namespace) -> Iterator[Count]:
    """Prefills, then decodes; shapes whose KV heads are alike are counted once."""
    heads = {(SHAPES[name][0] // SHAPES[name][1], SHAPES[name][2]): name for name in reversed(args.shape)}
    for operation, seqlens in (("prefill", args.prefill), ("decode", args.decode)):
        for (group, head_dim), shape in reversed(heads.items()):
            for dtype in args.dtype:
                for cache in args.cache_dtype if operation == "decode" else ["same"]:
                    for seqlen in seqlens:
                        yield Count(operation, shape, group, head_dim, seqlen, args.chunk_len, dtype, cache)


def find_binary(build: Path) -> Path:
    """dca_bench in a build folder; raises CannotCountError where it or valgrind is missing."""
    if shutil.which("valgrind") is None:
        raise CannotCountError("valgrind is missing (Debian, Ubuntu: apt-get install valgrind)")
    binary = build / BINARY
    if not binary.is_file():
        raise CannotCountError(
            f"{binary} is missing; build it with: cmake -S . -B {build} -DDCA_BUILD_BENCH=ON && cmake --build {build}"
        )
    return binary


def instructions_of(profile: str) -> int:
    """The total in callgrind's file; raises CannotCountError where nothing was counted."""
    found = re.search(r"^(?:summary|totals): (\d+)", profile, re.MULTILINE)
    if found is None or int(found[1]) == 0:
        raise CannotCountError(f"callgrind counted nothing in {FUNCTION}: was dca_bench stripped of its symbols?")
    return int(found[1])


def run_count(count: Count, binary: Path, isa: str) -> Row:
    """Counts one call."""
    with tempfile.TemporaryDirectory() as folder:
        profile, result = Path(folder) / "profile", Path(folder) / "result.json"
        command = [
            "valgrind",
            "--tool=callgrind",
            f"--callgrind-out-file={profile}",
            f"--toggle-collect={FUNCTION}",
            str(binary),
            *count.arguments(),
            f"--json={result}",
        ]
        environment = {**os.environ, "DCA_CPU_ISA": isa}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0 or not result.is_file():
            said = [line for line in done.stderr.splitlines() if line and not line.startswith("==")]  # valgrind's own
            last = said[-1] if said else "no message"
            raise CannotCountError(f"{count.title()}: dca_bench under valgrind ended with {done.returncode}: {last}")
        told = json.loads(result.read_text())
        executed = instructions_of(profile.read_text())
    return {
        **asdict(count),
        "kernel": told["kernel"],
        "instructions": executed,
        "work": told["work"],
        "work_unit": told["work_unit"],
        "instructions_per_unit": executed / told["work"],
    }


def table(rows: Sequence[Row]) -> str:
    """A line per count."""
    lines = [
        [
            Count(**{name: row[name] for name in Count.__dataclass_fields__}).title(),
            row["kernel"],
            f"{row['instructions'] / 1e6:.2f}",
            f"{row['work'] / 1e6:.2f} M{row['work_unit']}",
            f"{row['instructions_per_unit']:.4f} per {'byte' if row['work_unit'] == 'B' else row['work_unit']}",
        ]
        for row in rows
    ]
    return format_table(["one KV head", "kernel", "M instructions", "work", "instructions"], lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="build folder that holds dca_bench")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32", "bf16"])
    parser.add_argument("--cache-dtype", nargs="+", default=["same", "e4m3"], help="of decode, as dca_bench names them")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512], help="lengths; each takes its square in time")
    parser.add_argument("--decode", type=int, nargs="*", default=[4096], help="keys")
    parser.add_argument("--chunk-len", type=int, default=160, help="short, so that a short prompt has all segments")
    parser.add_argument("--isa", default="avx2", help="DCA_CPU_ISA of the runs")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts and prints; 0, 2 with a sentence if something is missing, 130 if interrupted."""
    args = parse(arguments)
    rows: list[Row] = []
    status = 0
    try:
        binary = find_binary(args.build)
        planned = list(counts(args))
        with progress_bar(Console(stderr=True, highlight=False)) as bars:
            task = bars.add_task("counting", total=len(planned))
            for count in planned:
                bars.update(task, description=count.title())
                rows.append(run_count(count, binary, args.isa))
                bars.advance(task)
    except CannotCountError as error:
        print(f"instructions.py: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if rows:
        print(table(rows))
    if rows and args.json:
        write_json({"commit": commit(), "isa": args.isa, "function": FUNCTION, "rows": rows}, args.json)
    return status


if __name__ == "__main__":
    sys.exit(main())
