"""What the benchmarks do with their results: columns of text, and a JSON file with the commit they belong to."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
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
    """Replaces the file in one step, so that it is whole whenever the run is stopped.

    A symlink stays one, and what it points to is replaced; what is no regular file, such as a pipe, is written to.
    """
    text = json.dumps(results, indent=1) + "\n"
    if is_special(path):
        path.write_text(text)
        return
    target = path.resolve()
    temporary = target.with_name(f"{target.name}.tmp{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Whether it leads to a device, a pipe or the like, which must not be replaced by a file."""
    return path.exists() and not path.is_file()


def output_file(text: str) -> Path:
    """Where results can be written, for argparse: what is no such place is refused before anything is measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file; got the folder {text}")
    if is_special(path):
        place = path
    else:
        place = path.resolve().parent
        if not place.is_dir():
            raise argparse.ArgumentTypeError(f"must lie in a folder that exists; got {text}")
    if not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be writable; got {text}")
    return path


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


def commit_and_date() -> dict[str, str | None]:
    """What every file of results says of itself: ``commit``, and ``date`` in UTC."""
    return {"commit": commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
