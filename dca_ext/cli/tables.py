"""The demo's tables, from the same figures that the pictures and the JSON file hold."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from dca_ext.cli.act_tiny import mean_over_depths


def number(value: float | None, digits: int = 2) -> str:
    """A cell; empty where nothing was measured."""
    return "" if value is None else f"{value:.{digits}f}"


def grid(title: str, first_column: str, columns: list[str]) -> Table:
    """An empty table with its figures to the right."""
    table = Table(title=title, title_justify="left")
    table.add_column(first_column)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def tiny_tables(figures: dict[str, Any]) -> list[Table]:
    """Act 1: loss by position, passkey by length, passkey by depth and length."""
    lengths = figures["lengths"]
    multiples = [f"{n // figures['context']}x" for n in lengths]

    loss = grid("Bits per byte by position", "", [f"{n // 2}-{n}" for n in lengths])
    recall = grid(
        "Passkeys answered exactly, by length of the prompt",
        "",
        [f"{n} ({m})" for n, m in zip(lengths, multiples, strict=True)],
    )
    for method in figures["bits_per_byte"]:
        loss.add_row(method, *(number(x) for x in figures["bits_per_byte"][method]))
        recall.add_row(method, *(number(mean_over_depths(row)) for row in figures["passkey"][method]))

    by_depth = grid("The same by depth of the key (0 start, 1 end)", "", ["depth", *multiples])
    for method, rows in figures["passkey"].items():
        for j, depth in enumerate(figures["depths"]):
            by_depth.add_row(method if j == 0 else "", number(depth), *(number(row[j]) for row in rows))
        by_depth.add_section()
    return [loss, recall, by_depth]


def real_tables(figures: dict[str, Any]) -> list[Table]:
    """Act 2: loss by position, then loss on the last tokens, on second copies, and passkeys."""
    methods = figures["methods"]
    by_position = grid("Loss by position, nats per token", "tokens", list(methods))
    for i in range(len(next(iter(methods.values()))["loss_by_position"])):
        begin = i * figures["bucket"]
        cells = [number(result["loss_by_position"][i]) for result in methods.values()]
        by_position.add_row(f"{begin}-{begin + figures['bucket']}", *cells)

    distances = [copy["distance"] for copy in next(iter(methods.values()))["second_copies"]]
    columns = [f"last {figures['last']}", *(f"copy, {d} back" for d in distances), "passkeys", "seconds"]
    summary = grid(
        "Loss over plain text and over second copies, nats per token; passkeys answered exactly", "", columns
    )
    for method, result in methods.items():
        keys = result["passkeys"]
        summary.add_row(
            method,
            number(result["loss_last"]),
            *(number(copy["loss"]) for copy in result["second_copies"]),
            f"{sum(key['exact'] for key in keys)} of {len(keys)}",
            number(figures["seconds"][method], 0),
        )

    recall = grid("Passkeys by depth (0 start, 1 end): what the model says", "method", [])
    for key in next(iter(methods.values()))["passkeys"]:
        recall.add_column(f"{key['depth']:.2f}: {key['key']}", justify="right")
    for method, result in methods.items():
        recall.add_row(
            method,
            *(
                Text(" ".join(key["said"].split()), style="green" if key["exact"] else "red")
                for key in result["passkeys"]
            ),
        )
    return [by_position, summary, recall]
