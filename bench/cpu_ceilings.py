"""What a CPU can do at best, measured beside the kernels: reads of K and V, products of the kernel's block shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cpu_cases import Case, Contender, Inputs, Prepared
from cpu_timing import seconds_of
from torch import Tensor

from dca_ext import build_info

KEYS_PER_BLOCK = 128


# What sizes a query tile, by csrc/dispatch/heuristics.h and, of strip_rows, csrc/cpu.
LEAST_TASK_ELEMENTS = 32768
MOST_TASK_ELEMENTS = 131072
STRIP_ROWS = 24
AMX_STRIP_ROWS = 32


def positions_per_tile(group: int, head_dim: int, elements: int, strip_rows: int = STRIP_ROWS) -> int:
    """Positions of a query tile, which holds the rows of all `group` heads: cpu_tile_shape of
    csrc/dispatch/heuristics.h."""
    rows = max(1, elements // max(1, head_dim))
    positions = min(max(rows // max(1, group), 8), 40 * strip_rows)
    return positions // strip_rows * strip_rows if positions >= strip_rows else positions


def rows_per_tile(case: Case) -> int:
    """Rows of the query tiles that the kernel in use would have."""
    amx = case.dtype == "bfloat16" and build_info()["cpu_isa"] == "amx_bf16"
    share = case.seqlen * case.heads * case.head_dim // (8 * torch.get_num_threads())
    elements = min(max(share, LEAST_TASK_ELEMENTS), MOST_TASK_ELEMENTS)
    strip_rows = AMX_STRIP_ROWS if amx else STRIP_ROWS
    return positions_per_tile(case.group, case.head_dim, elements, strip_rows) * case.group


# --- Decode: reading the buffers --------------------------------------------------------------------------------------


def reads(k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """Ways in which torch reads all bytes of two contiguous tensors with all threads.

    Which one is fastest changes with the machine and from run to run. Sums of 16-bit and of 32-bit numbers are left
    out: they compute more than they read.
    """
    words = [x.view(-1).view(torch.int64) for x in (k, v)]
    floats = [x.view(-1).view(torch.float32) for x in (k, v)]
    return {
        "sum of int64": lambda: [x.sum() for x in words],
        "amax of int64": lambda: [x.amax() for x in words],
        "dot of float32": lambda: torch.dot(*floats),
    }


def read_of_kv(x: Inputs) -> Prepared:
    """The fastest of `reads` over K and V themselves."""
    ways = reads(x.k, x.v)
    times = {name: min(seconds_of(call) for _ in range(5)) for name, call in ways.items()}
    best = min(times, key=lambda name: times[name])
    return Prepared(ways[best], note=best)


# --- Prefill: products of the block shapes ----------------------------------------------------------------------------


def block_products(case: Case, tiles: int, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """S = Q K^T and O += P V for as many query tiles at once, each with one block of keys; and the FLOP of that."""
    rows = rows_per_tile(case)

    def random(*shape: int) -> Tensor:
        return torch.randn(tiles, *shape).to(dtype)

    q, out = random(rows, case.head_dim), random(rows, case.head_dim)
    k, v = random(KEYS_PER_BLOCK, case.head_dim), random(KEYS_PER_BLOCK, case.head_dim)
    s, p = random(rows, KEYS_PER_BLOCK), random(rows, KEYS_PER_BLOCK) / KEYS_PER_BLOCK

    def call() -> None:
        torch.bmm(q, k.transpose(1, 2), out=s)
        torch.baddbmm(out, p, v, out=out)

    return call, 4.0 * tiles * rows * KEYS_PER_BLOCK * case.head_dim


def products_of_blocks(x: Inputs, at_least_s: float = 0.05) -> Prepared:
    """The fastest number of tiles per call, called as often as takes 50 ms.

    16-bit products may also be computed in float32, which is the faster way where a CPU has no units for them.
    """
    case, choices = x.case, {}
    for dtype in dict.fromkeys([case.torch_dtype, torch.float32]):
        for tiles in (torch.get_num_threads() * n for n in (1, 4, 8)):
            call, flop = block_products(case, tiles, dtype)
            call()
            seconds = min(seconds_of(call) for _ in range(3))
            choices[flop / seconds] = (call, flop, seconds, f"{dtype}".removeprefix("torch."), tiles)
    call, flop, seconds, dtype_name, tiles = choices[max(choices)]
    repeats = max(1, round(at_least_s / seconds))

    def repeated() -> None:
        for _ in range(repeats):
            call()

    rows = rows_per_tile(case)
    note = f"{dtype_name}, {tiles} tiles of {rows} rows and {KEYS_PER_BLOCK} keys at a time"
    return Prepared(repeated, work=repeats * flop, note=note)


READ = Contender("read of K and V", read_of_kv, role="ceiling", computes="")
PRODUCTS = Contender("bmm of the blocks", products_of_blocks, role="ceiling", computes="")
