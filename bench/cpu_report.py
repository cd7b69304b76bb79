"""Results of bench_cpu.py as text: every contender of every case, and one line per case for what matters most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmark_results import Row, format_table, length_name
from cpu_contenders import OURS

DIRECTION = (
    f"speedup: time of that contender / time of {OURS}, median over neighbouring calls; above 1 {OURS} is faster.\n"
    f"of ceiling: the rate of {OURS} in percent of the ceiling's, from neighbouring calls as well."
)

#: Work unit -> name of the rate and what it is divided by.
RATES = {"FLOP": ("GFLOP/s", 1e9), "B": ("GB/s", 1e9)}


def shape_name(row: Row) -> str:
    """smollm2 9/3 d64 float32."""
    return f"{row['shape']} {row['heads']}/{row['kv_heads']} d{row['head_dim']} {row['dtype']}"


def case_name(row: Row) -> str:
    """Kind, shape, dtype and length."""
    return f"{row['kind']} {shape_name(row)} {length_name(row['seqlen'])}"


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    """Rows by the values of some keys, in the order in which they came."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _number(row: Row, key: str, digits: str, scale: float = 1.0) -> str:
    return format(row[key] / scale, digits) if key in row else "-"


def contender_table(rows: Sequence[Row]) -> str:
    """All contenders of the cases of one kind, shape and dtype; below it what is to be said of them."""
    first = rows[0]
    rate_name, scale = RATES[first["unit"]]
    lines = []
    for row in rows:
        is_part = row["role"] == "part"
        lines.append(
            [
                f"{length_name(row['seqlen']):>5}  {row['contender']}",
                _number(row, "median_ms", ".4g"),
                _number(row, "p10_ms", ".4g"),
                _number(row, "p90_ms", ".4g"),
                "-" if is_part else _number(row, "rate", ".4g", scale),
                _number(row, "speedup", ".2f"),
                f"{row['percent_of_ceiling']:.0f} %" if "percent_of_ceiling" in row else "-",
                str(row.get("pairs") or row.get("calls") or "-"),
            ]
        )
    title = f"{first['kind']}, {shape_name(first)}, chunk_len {first['chunk_len']}"
    header = ["tokens", "ms", "p10", "p90", rate_name, "speedup", "of ceiling", "calls"]
    return "\n".join([title, format_table(header, lines), *remarks(rows)])


def remarks(rows: Sequence[Row]) -> list[str]:
    """Notes once per contender, and every reason for leaving one out."""
    notes: dict[str, str] = {}
    for row in rows:
        if row.get("note"):
            notes.setdefault(row["contender"], row["note"])
    lines = [f"  {name}: {note}" for name, note in notes.items()]
    for (name, reason), members in grouped([row for row in rows if "skipped" in row], "contender", "skipped").items():
        lengths = ", ".join(length_name(row["seqlen"]) for row in members)
        lines.append(f"  {name} left out at {lengths}: {reason}")
    return lines


def best(rows: Iterable[Row], beginning: str) -> Row | None:
    """The quickest contender whose name begins so, as the one over which the speedup is smallest."""
    timed = [row for row in rows if row["contender"].startswith(beginning) and "speedup" in row]
    return min(timed, key=lambda row: row["speedup"], default=None)


def summary_table(rows: Sequence[Row]) -> str:
    """One line per case: ours, its speedup over the best of each kind of rival, its percentage of the ceiling."""
    lines = []
    for members in grouped(rows, "kind", "shape", "dtype", "seqlen").values():
        ours = next((row for row in members if row["role"] == "ours"), members[0])
        rate_name, scale = RATES[ours["unit"]]
        rivals = [best(members, beginning) for beginning in ("torch", "transformers", "composed")]
        ceiling = next((row for row in members if "percent_of_ceiling" in row), None)
        lines.append(
            [
                case_name(ours),
                f"{ours['rate'] / scale:.4g} {rate_name}" if "rate" in ours else "-",
                *(f"{rival['speedup']:.2f}" if rival else "-" for rival in rivals),
                rivals[0]["contender"].removeprefix("torch ") if rivals[0] else "-",
                f"{ceiling['percent_of_ceiling']:.0f} %" if ceiling else "-",
                str(min((row["pairs"] for row in members if "pairs" in row), default="-")),
            ]
        )
    header = ["speedup of dca_ext", OURS, "torch", "transformers", "composed", "best torch", "of ceiling", "pairs"]
    return format_table(header, lines)


def memory_table(rows: Sequence[Row]) -> str:
    """How far one prefill raises the resident size."""
    lines = [
        [
            f"{shape_name(row)} {length_name(row['seqlen'])}",
            f"{row['added_mib']:.1f}",
            f"{row['out_and_rotated_k_mib']:.1f}",
        ]
        for row in rows
    ]
    return format_table(["memory of one prefill", "MiB added", "out and rotated K"], lines)


def report(rows: Sequence[Row], memory: Sequence[Row]) -> str:
    """All that was measured."""
    parts = [contender_table(members) for members in grouped(rows, "kind", "shape", "dtype").values()]
    if rows:
        parts += [summary_table(rows), DIRECTION]
    if memory:
        parts.append(memory_table(memory))
    return "\n\n".join(parts) or "nothing was measured"
