"""Results of bench_attention.py as a table, a JSON file and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: One contender on one case: what was asked, and either its figures or the reason why there are none.
Row = dict[str, Any]

OURS = "dca_ext"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(line(cells) for cells in [header, ["-" * w for w in widths], *rows])


def length_name(tokens: int) -> str:
    """4096 -> 4k, 1048576 -> 1M, 5000 -> 5000."""
    if tokens % 2**20 == 0:
        return f"{tokens // 2**20}M"
    return f"{tokens // 2**10}k" if tokens % 2**10 == 0 else str(tokens)


def case_name(row: Row) -> str:
    """What the contenders of a row's case had to do, in a few words."""
    if row["kind"] == "prefill":
        return f"{row['shape']} d{row['head_dim']} {length_name(row['seqlen'])} n{row['chunk_len']}"
    return f"{row['shape']} d{row['head_dim']} {row['batch']} x {length_name(row['seqlen'])}"


def _cases(rows: Sequence[Row], kind: str) -> dict[str, dict[str, Row]]:
    """Case -> contender -> row, in the order in which they came."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == kind:
            cases.setdefault(case_name(row), {})[row["contender"]] = row
    return cases


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else "-"


def prefill_table(rows: Sequence[Row]) -> str:
    """TFLOP/s of every contender, the time of the key rotation, and ours over the others."""
    cases = _cases(rows, "prefill")
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    lines = []
    for title, case in cases.items():
        rates = {name: row["rate"] for name, row in case.items() if "rate" in row}
        ours = rates.get(OURS)
        plain = [rate for name, rate in rates.items() if name.startswith("torch")]
        composed = [rate for name, rate in rates.items() if name.startswith("composed")]
        rotation = next((row["rotate_keys_ms"] for row in case.values() if "rotate_keys_ms" in row), None)
        lines.append(
            [title]
            + [f"{rates[name] / 1e12:.1f}" if name in rates else "-" for name in names]
            + [
                _ratio(ours, max(plain, default=None)),
                _ratio(ours, max(composed, default=None)),
                f"{rotation:.3f}" if rotation is not None else "-",
            ]
        )
    return format_table(["prefill, TFLOP/s", *names, "ours/plain", "ours/composed", "K pass ms"], lines)


def decode_table(rows: Sequence[Row]) -> str:
    """GB/s of every contender, the size of K and V, and ours in percent of the copy bandwidth."""
    cases = _cases(rows, "decode")
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    lines = []
    for title, case in cases.items():
        rates = {name: row["rate"] for name, row in case.items() if "rate" in row}
        percent = case.get(OURS, {}).get("percent_of_ceiling")
        others = [rate for name, rate in rates.items() if not name.startswith(OURS)]
        lines.append(
            [title, f"{next(iter(case.values()))['work'] / 2**20:.0f}"]
            + [f"{rates[name] / 1e9:.0f}" if name in rates else "-" for name in names]
            + [f"{percent:.1f}" if percent is not None else "-", _ratio(rates.get(OURS), max(others, default=None))]
        )
    return format_table(["decode, GB/s", "K+V MiB", *names, "ours % of copy", "ours/best"], lines)


def tables(rows: Sequence[Row]) -> str:
    """All that was measured."""
    parts = []
    if any(row["kind"] == "prefill" for row in rows):
        parts.append(prefill_table(rows))
    if any(row["kind"] == "decode" for row in rows):
        parts.append(decode_table(rows))
    return "\n\n".join(parts)


def write_json(results: dict[str, Any], path: Path) -> None:
    """Replaces the file in one step, so that it is whole whenever the run is stopped."""
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def save_plot(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Rate against length, a panel per kind, shape and chunk length; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("rate"):
            what = f"n {row['chunk_len']}" if row["kind"] == "prefill" else f"batch {row['batch']}"
            panels.setdefault(f"{row['kind']}, {row['shape']}, d{row['head_dim']}, {what}", []).append(row)
    if not panels:
        return True
    columns = min(3, len(panels))
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(5 * columns, 3.6 * -(-len(panels) // columns)), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, members) in zip(axes.flat, panels.items(), strict=False):
        prefill = members[0]["kind"] == "prefill"
        for contender in dict.fromkeys(row["contender"] for row in members):
            points = sorted((r["seqlen"], r["rate"]) for r in members if r["contender"] == contender)
            scale = 1e12 if prefill else 1e9
            axis.plot([x for x, _ in points], [y / scale for _, y in points], marker="o", label=contender)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens")
        axis.set_ylabel("TFLOP/s" if prefill else "GB/s")
        axis.set_title(name, fontsize=9)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
