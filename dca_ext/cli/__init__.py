"""The console command ``dca-ext``: ``demo``, ``ask`` and ``info``.

Each subcommand is a module here with ``add_parser(subparsers)`` and ``run(args) -> int``, imported only when it is the
one asked for, so that ``dca-ext info`` works without the packages that the others need.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence

_COMMANDS = {
    "demo": "see Dual Chunk Attention read past the length that a model was trained for",
    "ask": "answer a question about a document longer than the model's window",
    "info": "show versions, what was built, the hardware, and which kernel would run",
}

#: Top-level modules of the extra ``demo``; the library itself needs none of them.
_DEMO_MODULES = frozenset({"gguf", "matplotlib", "rich", "safetensors", "tokenizers", "transformers"})

_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

#: What a full disk, a quota, a limit or a broken disk gives for a write.
_CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: the process's) -> exit status: 0, 1 for a failure that a sentence on
    standard error explains, 130 after Ctrl-C. A command line that makes no sense exits with 2, from argparse."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if sys.stdout is None:
        print("dca-ext: standard output is closed", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a ? in an answer is better than no answer
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        _discard_output()  # whoever read it has left
        return 1
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        _discard_output()
        print(f"dca-ext: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _DEMO_MODULES:
            raise
        print(f"dca-ext: this needs the package {package}: pip install 'dca-ext[demo]'", file=sys.stderr)
        return 1


def _run(argv: Sequence[str]) -> int:
    """Parses and carries out ``argv``; what it printed is flushed here, where a reader that has left can still be told
    from an error."""
    try:
        args = _build_parser(argv).parse_args(argv)
    except SystemExit:  # after --help and --version too
        sys.stdout.flush()
        raise
    status: int = args.run(args)
    sys.stdout.flush()
    return status


def _discard_output() -> None:
    """Keeps the interpreter from complaining at exit, when it flushes what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for all commands, in full only for the one that ``argv`` names."""
    parser = argparse.ArgumentParser(
        prog="dca-ext", description="Dual Chunk Attention: language models beyond the length they were trained for."
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in _COMMANDS.items():
        if name == named:
            module = importlib.import_module(f"dca_ext.cli.{name}")
            module.add_parser(subparsers)
            subparsers.choices[name].set_defaults(run=module.run)
        else:
            subparsers.add_parser(name, help=summary, add_help=False)
    return parser


class _Version(argparse.Action):
    """Prints the version; looks it up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: object) -> None:
        super().__init__(option_strings, dest, nargs=0, help=str(kwargs.get("help")))

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from dca_ext import __version__

        print(f"dca-ext {__version__}")
        parser.exit()
