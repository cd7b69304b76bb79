"""What the benchmarks do with their results: columns of text, and a JSON file with the commit they belong to."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: One contender on one case: what was asked, and either its figures or the reason why there are none.
Row = dict[str, Any]


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


def write_json(results: dict[str, Any], path: Path) -> None:
    """Replaces the file in one step, so that it is whole whenever the run is stopped."""
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def command_line(arguments: Sequence[str]) -> list[str]:
    """sys.argv as it may be published: of paths outside of the tree only the names."""

    def published(word: str) -> str:
        option, equals, value = word.rpartition("=")
        path = Path(value)
        if not path.is_absolute():
            return word
        inside = path.resolve().is_relative_to(ROOT)
        return f"{option}{equals}{path.resolve().relative_to(ROOT) if inside else path.name}"

    return [published(word) for word in arguments]


def commit() -> str | None:
    """Of the tree that this file is in; a tree that was copied without its history says it by DCA_COMMIT."""
    if os.environ.get("DCA_COMMIT"):
        return os.environ["DCA_COMMIT"]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
