"""The demo's pictures: two panels each, drawn from the figures that the tables show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dca_ext.cli.act_tiny import mean_over_depths

COLOURS = {
    "vanilla": "#7f7f7f",
    "DCA": "#d62728",
    "DCA+temp": "#ff7f0e",
    "YaRN": "#1f77b4",
    "NTK": "#2ca02c",
    "window": "#9467bd",
}


def new_figure() -> tuple[Any, Any, Any]:
    """A figure and its two axes, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure, left, right


def save(figure: Any, path: Path) -> None:
    """Written beside its place and renamed, so that an interrupt leaves no half picture."""
    partial = path.with_suffix(".part")
    try:
        figure.savefig(partial, format="png", dpi=130)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def mark_context(axes: Any, context: int) -> None:
    """A dotted line where training ended."""
    axes.axvline(context, color="black", linestyle=":", linewidth=1)
    axes.annotate("training\ncontext", (context, 0.98), xycoords=("data", "axes fraction"), fontsize=8, va="top")


def draw_tiny(figures: dict[str, Any], path: Path) -> None:
    """Left: bits per byte by position. Right: passkeys answered, by length."""
    figure, left, right = new_figure()
    lengths = figures["lengths"]
    for method, bits in figures["bits_per_byte"].items():
        left.plot(lengths, bits, marker="o", color=COLOURS[method], label=method)
    for method, rows in figures["passkey"].items():
        right.plot(lengths, [mean_over_depths(row) for row in rows], marker="o", color=COLOURS[method], label=method)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        mark_context(axes, figures["context"])
    left.set(xlabel="position, bytes (mean from half of it on)", ylabel="bits per byte", title="Loss by position")
    right.set(xlabel="length of the prompt, bytes", ylabel="answered exactly", title="Passkey", ylim=(-0.03, 1.05))
    left.legend()
    save(figure, path)


def draw_real(figures: dict[str, Any], path: Path) -> None:
    """Left: loss by position. Right: loss on second copies, by the distance to the first copy."""
    figure, left, right = new_figure()
    width = figures["bucket"]
    for method, result in figures["methods"].items():
        points = [(i * width + width // 2, x) for i, x in enumerate(result["loss_by_position"]) if x is not None]
        left.plot(*zip(*points, strict=True), marker=".", color=COLOURS[method], label=method)
        copies = sorted((c["distance"], c["loss"]) for c in result["second_copies"] if c["loss"] is not None)
        if copies:
            right.plot(*zip(*copies, strict=True), marker="o", color=COLOURS[method], label=method)
    mark_context(left, figures["context"])
    left.set(xlabel="position, tokens", ylabel="loss, nats per token", title="Loss by position")
    right.set(
        xlabel="distance to the first copy, tokens", ylabel="loss, nats per token", title="Second copies of passages"
    )
    left.legend()
    save(figure, path)
