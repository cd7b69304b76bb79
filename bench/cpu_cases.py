"""What bench_cpu.py measures: shapes, their work and memory, and their tensors. One sequence, batch 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from composed_attention import rotated_queries
from geometries import config_for, rotary_tables
from torch import Tensor

from dca_ext import DCAConfig, rotate_keys

#: Name -> query heads, KV heads, head_dim.
SHAPES = {
    "llama2-7b": (32, 32, 128),
    "llama3-8b": (32, 8, 128),
    "llama3.2-1b": (32, 8, 64),
    "smollm2": (9, 3, 64),
}

KINDS = ("prefill", "decode", "module")


@dataclass(frozen=True)
class Case:
    """Prefill: a prompt of seqlen tokens; decode: one query behind seqlen keys; module: an attention layer's forward
    pass over seqlen tokens, projections included."""

    kind: str
    shape: str
    heads: int
    kv_heads: int
    head_dim: int
    seqlen: int
    dtype: str
    chunk_len: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of q, K, V and out."""
        return getattr(torch, self.dtype)

    @property
    def config(self) -> DCAConfig:
        """The chunk geometry."""
        return config_for(self.chunk_len)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def work(self) -> float:
        """Prefill: FLOP, 4 * head_dim per head and visible pair. Decode: bytes of K and V. Module: FLOP with those of
        the four projections, hidden_size being heads * head_dim."""
        if self.kind == "decode":
            return 2.0 * self.kv_bytes
        attention = 4.0 * self.heads * self.head_dim * (self.seqlen * (self.seqlen + 1) // 2)
        if self.kind == "prefill":
            return attention
        hidden = self.heads * self.head_dim
        return attention + 2.0 * self.seqlen * hidden * (2 * hidden + 2 * self.kv_heads * self.head_dim)

    @property
    def work_unit(self) -> str:
        """Of `work`."""
        return "B" if self.kind == "decode" else "FLOP"

    @property
    def q_bytes(self) -> int:
        """Of q over all seqlen tokens, or of out."""
        return self.seqlen * self.heads * self.head_dim * self.torch_dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        """Of K, or of V."""
        return self.seqlen * self.kv_heads * self.head_dim * self.torch_dtype.itemsize

    @property
    def inputs_bytes(self) -> int:
        """What `Inputs` and one result take, whichever contenders ask for them."""
        if self.kind == "decode":
            return 4 * self.kv_bytes  # K and V in two layouts
        return 4 * self.q_bytes + 5 * self.kv_bytes  # q, rotated q in two layouts, out; K, rotated K and V

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "max_position": self.config.max_position, "work": self.work, "unit": self.work_unit}


class Inputs:
    """Random tensors of a case, (1, rows, heads, head_dim), each made when first asked for."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.cos, self.sin = rotary_tables(case.config, case.head_dim)

    def _random(self, rows: int, heads: int) -> Tensor:
        return torch.randn(1, rows, heads, self.case.head_dim).to(self.case.torch_dtype)

    @cached_property
    def q(self) -> Tensor:
        """Unrotated queries: one row in decode."""
        return self._random(1 if self.case.kind == "decode" else self.case.seqlen, self.case.heads)

    @cached_property
    def k_unrotated(self) -> Tensor:
        """Keys as a model computes them; prefill only."""
        return self._random(self.case.seqlen, self.case.kv_heads)

    @cached_property
    def k(self) -> Tensor:
        """Rotated keys. In decode any keys: they are the rotated keys of some others."""
        if self.case.kind == "decode":
            return self._random(self.case.seqlen, self.case.kv_heads)
        return rotate_keys(self.k_unrotated, self.cos, self.sin, self.case.config)

    @cached_property
    def v(self) -> Tensor:
        """Values."""
        return self._random(self.case.seqlen, self.case.kv_heads)

    def rotated_q(self) -> dict[str, Tensor]:
        """Segment -> q rotated for it, made anew: three tensors of q's size that only one contender needs."""
        return rotated_queries(self.q, self.cos, self.sin, self.case.config)

    @cached_property
    def plain_q(self) -> Tensor:
        """What attention without chunks takes for q: rotated once in prefill, as it is in decode."""
        return self.q if self.case.kind == "decode" else self.rotated_q()["intra"]

    @cached_property
    def head_major(self) -> tuple[Tensor, Tensor, Tensor]:
        """plain_q, k and v contiguous as (1, heads, rows, head_dim): the layout that torch's attention likes best."""
        return to_head_major(self.plain_q), to_head_major(self.k), to_head_major(self.v)


def to_head_major(x: Tensor) -> Tensor:
    """(1, rows, heads, head_dim) -> contiguous (1, heads, rows, head_dim)."""
    return x.transpose(1, 2).contiguous()


@dataclass
class Prepared:
    """A contender on a case, ready to be called."""

    call: Callable[[], Any]
    work: float | None = None  # of one call, where it is not the case's
    note: str = ""


def _nothing_more(case: Case) -> float:
    return 0.0


def _always_fits(case: Case) -> str:
    return ""


@dataclass(frozen=True)
class Contender:
    """Something to time.

    role: "ours"; "rival", which ours is compared with; "part", timed alone; "ceiling", what ours is a percentage of.
    computes: "dca", "plain" (attention without chunks) or "" for what is not compared with float64.
    """

    name: str
    prepare: Callable[[Inputs], Prepared]
    role: str = "rival"
    computes: str = "plain"
    #: A call's result and the case -> out (1, rows, heads, head_dim).
    rows: Callable[[Any, Case], Tensor] = field(default=lambda out, case: out)
    #: Memory beyond the case's inputs.
    extra_bytes: Callable[[Case], float] = _nothing_more
    #: Why it takes no part in a case; empty if it does.
    unfit: Callable[[Case], str] = _always_fits
    #: Error in norm that is explained by the format of its cache.
    tolerance: float = 0.0
