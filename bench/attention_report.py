"""Results of bench_attention.py as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmark_results import Row, format_table, length_name

OURS = "dca_ext"
OURS_E4M3 = "dca_ext e4m3"


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


def _ratio(a: float | None, b: float | None) -> str:
    """a / b, or a dash where one is missing."""
    return f"{a / b:.2f}" if a and b else "-"


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
    """GB/s of every contender, the size of K and V, ours in percent of the copy bandwidth, ours over the best of the
    others, and how many times as fast a cache of e4m3 is."""
    cases = _cases(rows, "decode")
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    lines = []
    for title, case in cases.items():
        rates = {name: row["rate"] for name, row in case.items() if "rate" in row}
        percent = case.get(OURS, {}).get("percent_of_ceiling")
        times = {name: row.get("median_ms") for name, row in case.items()}
        others = [rate for name, rate in rates.items() if not name.startswith(OURS)]
        lines.append(
            [title, f"{max(row['work'] for row in case.values()) / 2**20:.0f}"]
            + [f"{rates[name] / 1e9:.0f}" if name in rates else "-" for name in names]
            + [
                f"{percent:.1f}" if percent is not None else "-",
                _ratio(rates.get(OURS), max(others, default=None)),
                _ratio(times.get(OURS), times.get(OURS_E4M3)),
            ]
        )
    columns = ["decode, GB/s", "K+V MiB", *names, "ours % of copy", "ours/best", "e4m3 faster"]
    return format_table(columns, lines)


def tables(rows: Sequence[Row]) -> str:
    """All that was measured."""
    parts = []
    if any(row["kind"] == "prefill" for row in rows):
        parts.append(prefill_table(rows))
    if any(row["kind"] == "decode" for row in rows):
        parts.append(decode_table(rows))
    return "\n\n".join(parts)


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
