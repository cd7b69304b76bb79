"""Breaks the kernels one way at a time and expects the C++ tests to turn red.

    python tests/mutations.py cpu                    # a minute or less each
    python tests/mutations.py cuda                   # on a GPU or under the simulator; minutes each
    python tests/mutations.py cpu --only mask,merge

Each mutation is one edit of a scratch copy of the tree, which is rebuilt and tested; mutations of synchronisation are
tested in the order of warps and copies that ought to show them. By hand or nightly.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from mutation_suite import Suite, survivors


def main() -> int:
    """Returns the number of mutations that no test saw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=["cpu", "cuda"])
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="mutations whose name contains TEXT, or one of several with commas between",
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    suite: Suite = importlib.import_module(f"mutations_{arguments.backend}").SUITE
    wanted = arguments.only.split(",")
    chosen = [mutation for mutation in suite.mutations if any(text in mutation.name for text in wanted)]
    if arguments.list or not chosen:
        print("\n".join(mutation.name for mutation in suite.mutations))
        return 0 if arguments.list else 2
    missed = survivors(suite, chosen)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutations turn a test red")
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
