"""The picture of bench_cpu.py: rate over length in prefill, bars in decode."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_results import Row, length_name, output_file
from cpu_contenders import OURS
from cpu_report import grouped, shape_name

#: Contender -> colour: ours stands out, a family of rivals shares a hue, and a name keeps its colour in all panels.
COLOURS = {
    "dca_ext": "#c2352b",
    "dca_ext + K pass": "#e58a7f",
    "dca_ext head-major": "#e58a7f",
    "dca_ext e4m3": "#f0b43c",
    "dca_ext int8": "#d98a1e",
    "torch sdpa": "#2b6cb0",
    "torch sdpa gqa": "#63a0d4",
    "torch sdpa folded": "#2b6cb0",
    "torch bmm": "#9cc4e4",
    "transformers sdpa": "#3c8d5a",
    "transformers eager": "#93c9a3",
    "composed": "#7a5aa6",
}
MUTED = "#5a5a5a"


def plot_file(text: str) -> Path:
    """`output_file` for a picture, whose suffix says which kind."""
    try:
        import matplotlib.backend_bases as backend
    except ImportError as error:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib") from error
    path, known = output_file(text), backend.FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise argparse.ArgumentTypeError(f"must end in one of .{', .'.join(sorted(known))}; got {text}")
    return path


def save_plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """A panel per kind, shape and dtype; nothing where nothing was timed."""
    timed = [row for row in rows if "rate" in row and row["role"] != "part"]
    panels = list(grouped(timed, "kind", "shape", "dtype").values())
    if not panels:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(7.2 * columns, 4.2 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, members in zip(axes.flat, panels, strict=False):
        (draw_bars if members[0]["kind"] == "decode" else draw_lines)(axis, members)
        axis.set_title(f"{members[0]['kind']}, {shape_name(members[0])}", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=9, color=MUTED)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_lines(axis: Any, members: Sequence[Row]) -> None:
    """GFLOP/s over tokens, a line per contender; the ceiling is dashed."""
    for (name,), points in grouped(members, "contender").items():
        points = sorted(points, key=lambda row: row["seqlen"])
        ours, ceiling = name == OURS, points[0]["role"] == "ceiling"
        axis.plot(
            [row["seqlen"] for row in points],
            [row["rate"] / 1e9 for row in points],
            label=name,
            color=MUTED if ceiling else COLOURS.get(name),
            linestyle="--" if ceiling else "-",
            linewidth=2.6 if ours else 1.4,
            marker=None if ceiling and len(points) > 1 else "o",
            markersize=6 if ours else 4,
            zorder=3 if ours else 2,
        )
    lengths = sorted({row["seqlen"] for row in members})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [length_name(n) for n in lengths])
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    axis.set_ylabel("GFLOP/s")
    axis.grid(axis="y", alpha=0.25)
    _legend(axis)


def draw_bars(axis: Any, members: Sequence[Row]) -> None:
    """GB/s of each contender's own K and V at each length, its milliseconds above; the ceiling is a dashed line."""
    lengths = sorted({row["seqlen"] for row in members})
    names = [name for (name,) in grouped([row for row in members if row["role"] != "ceiling"], "contender")]
    width = 0.84 / max(1, len(names))
    for index, name in enumerate(names):
        bars = [row for row in members if row["contender"] == name]
        places = [lengths.index(row["seqlen"]) - 0.42 + (index + 0.5) * width for row in bars]
        drawn = axis.bar(places, [row["rate"] / 1e9 for row in bars], 0.92 * width, color=COLOURS.get(name), label=name)
        labels = [f"{row['median_ms']:.3g} ms" for row in bars]
        axis.bar_label(drawn, labels, fontsize=7, rotation=90, padding=3, color=MUTED)
    ceilings = [row for row in members if row["role"] == "ceiling"]
    for row in ceilings:
        place = lengths.index(row["seqlen"])
        label = row["contender"] if row is ceilings[0] else None
        axis.hlines(row["rate"] / 1e9, place - 0.45, place + 0.45, color=MUTED, linestyle="--", label=label)
    axis.set_xticks(range(len(lengths)), [length_name(n) for n in lengths])
    axis.set_xlabel("tokens in the cache")
    axis.set_ylabel("GB/s of K and V")
    axis.margins(y=0.25)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    _legend(axis)


def _legend(axis: Any) -> None:
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
