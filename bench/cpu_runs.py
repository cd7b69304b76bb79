"""Runs the cases of bench_cpu.py: who is right, who fits, and the timing of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accuracy import relative_error
from benchmark_results import Row
from composed_attention import exact_attend
from cpu_cases import Case, Contender, Inputs
from cpu_contenders import CONTENDERS, OURS
from cpu_timing import alternating_pairs, available_bytes, pairs_within, seconds_of
from geometries import config_for
from samples import median_of_ratios, quantile
from torch import Tensor

from dca_ext import reference

GIB = 2**30

#: Norm of the error over norm of the result that a dtype explains; a wrong kernel is far above.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 2e-2}

#: Tokens and chunk length of the comparison with float64: three chunks, the last of them short.
SMALL_SEQLEN, SMALL_CHUNK_LEN = 300, 128

#: A rate measured there is below that of real lengths, by less than this factor unless something is very wrong.
SMALL_RATE_FACTOR = 4.0


@dataclass
class Limits:
    """What a run may take."""

    pairs: int = 9
    budget_s: float = 120.0  # of the pairs of one contender on one case
    memory_bytes: Callable[[], float] = available_bytes


@dataclass
class Run:
    """Results so far, and what is known of each contender: whether it is right, and how fast it was last."""

    limits: Limits
    names: Sequence[str] = ()  # beginnings of the names of rivals that take part; empty: all
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    wrong: dict[tuple[str, str, str], dict[str, str]] = field(default_factory=dict)
    rates: dict[tuple[str, str, str, str], float] = field(default_factory=dict)

    def contenders(self, kind: str) -> list[Contender]:
        """Ours, parts and ceilings always; rivals as the command line picks them."""

        def picked(contender: Contender) -> bool:
            return contender.role != "rival" or not self.names or contender.name.startswith(tuple(self.names))

        return [contender for contender in CONTENDERS[kind] if picked(contender)]


# --- Right before fast ------------------------------------------------------------------------------------------------


def expected_results(x: Inputs) -> dict[str, Tensor]:
    """In float64 from the same numbers: "dca" and "plain"."""
    case = x.case
    chunked = reference.dca_attention_with_kvcache(
        x.q, x.k, x.v, x.cos, x.sin, case.config, cache_seqlens=case.seqlen, out_dtype=torch.float64
    )
    assert isinstance(chunked, Tensor)
    return {"dca": chunked, "plain": exact_attend(x.plain_q, x.k, x.v, case.kind == "prefill")[0]}


def check_contenders(case: Case, run: Run) -> dict[str, str]:
    """Contender -> why it takes no part: its result on a small case is wrong, or it refuses. Notes their rates."""
    small = replace(case, seqlen=SMALL_SEQLEN, chunk_len=SMALL_CHUNK_LEN)
    x = Inputs(small)
    expected = expected_results(x)
    verdicts: dict[str, str] = {}
    for contender in run.contenders(case.kind):
        if not contender.computes or contender.unfit(small):
            continue
        try:
            prepared = contender.prepare(x)
            result = contender.rows(prepared.call(), small)
            seconds = min(seconds_of(prepared.call) for _ in range(2))
        except Exception as error:
            verdicts[contender.name] = _one_line(error)
            if contender.role == "ours":
                run.failures.append(f"{case.kind} {case.shape} {case.dtype}, {contender.name}: {_one_line(error)}")
            continue
        error_norm = relative_error(result, expected[contender.computes])
        allowed = TOLERANCE[case.dtype] + contender.tolerance
        if not error_norm <= allowed:
            verdicts[contender.name] = f"off by {error_norm:.2e} (norm), allowed {allowed:g}"
            run.failures.append(f"{case.kind} {case.shape} {case.dtype}, {contender.name}: {verdicts[contender.name]}")
        run.rates[_key(case, contender)] = SMALL_RATE_FACTOR * small.work / seconds
    return verdicts


def _key(case: Case, contender: Contender) -> tuple[str, str, str, str]:
    return case.kind, case.shape, case.dtype, contender.name


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- What is left out -------------------------------------------------------------------------------------------------


def reason_to_skip(case: Case, contender: Contender, run: Run) -> str:
    """Why a contender is not even tried; empty if it is."""
    if reason := contender.unfit(case) or run.wrong[case.kind, case.shape, case.dtype].get(contender.name, ""):
        return reason
    needed, free = contender.extra_bytes(case), run.limits.memory_bytes()
    if needed > 0.9 * free:
        return f"needs about {needed / GIB:.1f} GiB more, {free / GIB:.1f} GiB are free"
    rate = run.rates.get(_key(case, contender))  # decode is short enough to be tried
    foretold = case.kind != "decode" and contender.role in ("ours", "rival")
    if foretold and rate and case.work / rate > run.limits.budget_s:
        return f"a call would take about {case.work / rate:.0f} s at its rate so far (--budget {run.limits.budget_s:g})"
    return ""


# --- Timing -----------------------------------------------------------------------------------------------------------


def figures(work: float, seconds: Sequence[float]) -> Row:
    """What a row says of its own times."""
    median = quantile(seconds, 0.5)
    return {
        "median_ms": 1e3 * median,
        "p10_ms": 1e3 * quantile(seconds, 0.1),
        "p90_ms": 1e3 * quantile(seconds, 0.9),
        "rate": work / median,
        "calls": len(seconds),
        "samples_s": list(seconds),
    }


class CaseRun:
    """One case: ours is prepared once, and called in turn with one contender after another."""

    def __init__(self, case: Case, run: Run) -> None:
        self.case, self.run = case, run
        self.x = Inputs(case)
        self.ours = next(c for c in run.contenders(case.kind) if c.role == "ours").prepare(self.x)
        self.ours_once = seconds_of(self.ours.call)
        if self.ours_once < 1:  # the first call also finds its memory
            self.ours_once = seconds_of(self.ours.call)
        self.samples: list[float] = []

    def row(self, contender: Contender) -> Row:
        """A contender's figures, or the reason why there are none."""
        base: Row = {**self.case.to_dict(), "contender": contender.name, "role": contender.role}
        if reason := reason_to_skip(self.case, contender, self.run):
            return base | {"skipped": reason}
        try:
            return base | self._timed(contender)
        except (RuntimeError, ValueError, TypeError, ImportError, MemoryError) as error:
            return base | {"skipped": _one_line(error)}

    def _timed(self, contender: Contender) -> Row:
        prepared = contender.prepare(self.x)
        work = prepared.work or self.case.work
        once = seconds_of(prepared.call)
        limits = self.run.limits
        alone = contender.role == "part"
        pair_s = once + (0.0 if alone else self.ours_once)
        pairs = pairs_within(limits.budget_s, pair_s, limits.pairs)
        if not pairs:
            self.run.rates[_key(self.case, contender)] = work / once
            what = "call" if alone else "pair of calls"
            return {"skipped": f"a {what} takes about {pair_s:.1f} s: too few fit into --budget {limits.budget_s:g}"}
        if alone:
            return figures(work, [seconds_of(prepared.call) for _ in range(pairs)]) | {"note": prepared.note}
        timed = alternating_pairs(self.ours.call, prepared.call, pairs)
        self.samples += [ours for ours, _ in timed]
        ratio = median_of_ratios(timed)
        row = figures(work, [theirs for _, theirs in timed]) | {"note": prepared.note, "pairs": pairs}
        self.run.rates[_key(self.case, contender)] = row["rate"]
        row["ours_samples_s"] = [ours for ours, _ in timed]
        if contender.role == "ceiling":  # in time, ratio * (ours' work / its work) of ours is what the ceiling needs
            return row | {"percent_of_ceiling": 100.0 * ratio * self.case.work / work}
        return row | {"speedup": ratio}

    def ours_row(self) -> Row:
        """Of all calls that were one of a pair; of its own few where there were none."""
        if not self.samples:
            limits = self.run.limits
            calls = max(1, pairs_within(limits.budget_s, self.ours_once, limits.pairs))
            self.samples = [seconds_of(self.ours.call) for _ in range(calls)]
        self.run.rates[self.case.kind, self.case.shape, self.case.dtype, OURS] = self.case.work / quantile(
            self.samples, 0.5
        )
        return {
            **self.case.to_dict(),
            "contender": OURS,
            "role": "ours",
            "note": self.ours.note,
            "kernel": kernel_name(self.case),
            **figures(self.case.work, self.samples),
        }


def kernel_name(case: Case) -> str:
    """Of the kernel that ours runs."""
    from dca_ext import _core

    config = config_for(case.chunk_len)
    return _core.describe_kernel(
        seqlen_q=1 if case.kind == "decode" else case.seqlen,
        seqlen_k=case.seqlen,
        num_heads=case.heads,
        num_heads_kv=case.kv_heads,
        head_dim=case.head_dim,
        chunk_len=config.chunk_len,
        max_position=config.max_position,
        dtype=case.dtype,
        device="cpu",
    )


def run_case(case: Case, run: Run, on_contender: Callable[[str], None] = lambda name: None) -> None:
    """Appends the case's rows to run.rows, ours first; `on_contender` is told who comes next."""
    key = (case.kind, case.shape, case.dtype)
    if key not in run.wrong:
        run.wrong[key] = check_contenders(case, run) if case.kind != "module" else {}
    ours = next(c for c in run.contenders(case.kind) if c.role == "ours")
    base: dict[str, Any] = {**case.to_dict(), "contender": ours.name, "role": "ours"}
    needed, free = case.inputs_bytes + ours.extra_bytes(case), run.limits.memory_bytes()
    reason = f"needs about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free" if needed > 0.9 * free else ""
    if reason := reason or reason_to_skip(case, ours, run):
        run.rows.append(base | {"skipped": reason})
        return
    on_contender(ours.name)
    case_run = CaseRun(case, run)
    first, complete = len(run.rows), False
    try:
        for contender in run.contenders(case.kind):
            if contender.role != "ours":
                on_contender(contender.name)
                run.rows.append(case_run.row(contender))
        complete = True
    finally:  # also where Ctrl-C ends it
        if complete or case_run.samples:
            run.rows.insert(first, case_run.ours_row())
