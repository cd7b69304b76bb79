"""What bench_attention.py times: shapes, their work and memory, and who takes part."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from attention_report import OURS, OURS_E4M3
from composed_attention import Attend, Merge, composed_attention, merge_in_torch, per_head, rotated_queries
from geometries import rotary_tables
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dca_ext import DCAConfig, dca_attention_with_kvcache, merge_attention_states, reference, rotate_keys

DEVICE = "cuda"

#: Name -> query heads, KV heads.
SHAPES = {"llama2-7b": (32, 32), "llama3-8b": (32, 8), "llama3-70b": (64, 8)}

BACKENDS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Case:
    """One line of the table. Prefill: whole prompts of seqlen tokens; decode: one query behind seqlen keys."""

    kind: str
    shape: str
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    seqlen: int
    chunk_len: int

    @property
    def work(self) -> float:
        """Prefill: FLOP, 4 * head_dim per head and visible pair. Decode: bytes of K and V, 2 per number."""
        if self.kind == "prefill":
            return 4.0 * self.batch * self.heads * self.head_dim * (self.seqlen * (self.seqlen + 1) // 2)
        return 2.0 * self.batch * self.kv_heads * self.head_dim * self.seqlen * 2

    def bytes_needed(self, *, repeated_kv: bool) -> int:
        """Device memory of all contenders, rather too much; repeated_kv: some need K and V per query head."""
        kv = 2 * self.batch * self.seqlen * self.kv_heads * self.head_dim
        repeated = 2 * kv * (self.heads // self.kv_heads) if repeated_kv else 0
        if self.kind == "decode":
            return 3 * kv + repeated  # in pages, and in 8 bits, too
        q = 2 * self.batch * self.seqlen * self.heads * self.head_dim
        chunk = 2 * self.batch * min(self.chunk_len, self.seqlen) * self.heads * self.head_dim
        # q, three rotated q, two results and a spare; K, rotated K, V; the float32 temporaries of the merge.
        return 7 * q + 3 * kv + repeated + 10 * chunk


@dataclass
class Contender:
    """Something to time: its result is (batch, rows, heads, head_dim)."""

    name: str
    call: Callable[[], Tensor]
    note: str = ""  # what it was given that others were not
    exact: Callable[[], Tensor] | None = None  # its own result in float64, where that is not the case's
    work: float | None = None  # FLOP or bytes, where not the case's


@dataclass
class Inputs:
    """The tensors of a case, (batch, rows, heads, head_dim), keys rotated already."""

    case: Case
    config: DCAConfig
    cos: Tensor
    sin: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    k_unrotated: Tensor | None = None  # prefill
    q_rotated: dict[str, Tensor] = field(default_factory=dict)  # prefill
    lengths: Tensor | None = None  # decode


def make_inputs(case: Case, config: DCAConfig, dtype: torch.dtype) -> Inputs:
    """Random tensors, and the rotations that are no part of any timing."""
    cos, sin = rotary_tables(config, case.head_dim, DEVICE)
    rows = case.seqlen if case.kind == "prefill" else 1

    def random(length: int, heads: int) -> Tensor:
        return torch.randn(case.batch, length, heads, case.head_dim, dtype=dtype, device=DEVICE)

    q, k, v = random(rows, case.heads), random(case.seqlen, case.kv_heads), random(case.seqlen, case.kv_heads)
    if case.kind == "decode":  # any keys are the rotated keys of some others
        lengths = torch.full((case.batch,), case.seqlen, dtype=torch.int32, device=DEVICE)
        return Inputs(case, config, cos, sin, q, k, v, lengths=lengths)
    rotated = rotated_queries(q, cos, sin, config)
    return Inputs(case, config, cos, sin, q, rotate_keys(k, cos, sin, config), v, k_unrotated=k, q_rotated=rotated)


def rotation_pass(x: Inputs) -> Callable[[], Tensor]:
    """The pass over K that precedes a prefill, timed apart."""
    assert x.k_unrotated is not None
    return lambda: rotate_keys(x.k_unrotated, x.cos, x.sin, x.config)


# --- Ours -------------------------------------------------------------------------------------------------------------


def ours(x: Inputs) -> Contender:
    """The fused operator over rotated keys and unrotated queries."""
    lengths = x.case.seqlen if x.lengths is None else x.lengths
    return Contender(
        OURS,
        lambda: dca_attention_with_kvcache(x.q, x.k, x.v, x.cos, x.sin, x.config, cache_seqlens=lengths),
    )


@contextlib.contextmanager
def kernels_named(name: str) -> Iterator[None]:
    """Calls of this library run these kernels: "sm80", or a variant such as "sm90:three_consumers"."""
    before = os.environ.get("DCA_CUDA_KERNELS")
    os.environ["DCA_CUDA_KERNELS"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["DCA_CUDA_KERNELS"]
        else:
            os.environ["DCA_CUDA_KERNELS"] = before


def ours_by(x: Inputs, kernels: str) -> Contender:
    """ours() by the kernels of another name than those that the device would choose."""
    call = ours(x).call

    def call_by_name() -> Tensor:
        with kernels_named(kernels):
            return call()

    return Contender(f"{OURS} {kernels}", call_by_name)


def ours_paged(x: Inputs, page_size: int) -> Contender:
    """A decode over as many keys in pages in random order: the bytes of the contiguous cache, shuffled."""
    case = x.case
    pages = [cache.view(-1, page_size, case.kv_heads, case.head_dim) for cache in (x.k, x.v)]
    table = torch.randperm(pages[0].shape[0], device=x.q.device).to(torch.int32).view(case.batch, -1)

    def attend(function: Callable[..., Tensor], **kwargs: Any) -> Tensor:
        return function(x.q, *pages, x.cos, x.sin, x.config, cache_seqlens=x.lengths, page_table=table, **kwargs)

    return Contender(
        f"{OURS} paged",
        lambda: attend(dca_attention_with_kvcache),
        exact=lambda: attend(reference.dca_attention_with_kvcache, out_dtype=torch.float64),
    )


def ours_e4m3(x: Inputs) -> Contender:
    """A decode over K and V as float8_e4m3fn, half the bytes; numbers of this size need no scales."""
    caches = [cache.to(torch.float8_e4m3fn) for cache in (x.k, x.v)]

    def exact() -> Tensor:
        rounded = (cache.to(x.q.dtype) for cache in caches)
        out = reference.dca_attention_with_kvcache(
            x.q, *rounded, x.cos, x.sin, x.config, cache_seqlens=x.lengths, out_dtype=torch.float64
        )
        assert isinstance(out, Tensor)
        return out

    return Contender(
        OURS_E4M3,
        lambda: dca_attention_with_kvcache(x.q, *caches, x.cos, x.sin, x.config, cache_seqlens=x.lengths),
        exact=exact,
        work=x.case.work / 2,
    )


# --- Rivals -----------------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool, enable_gqa: bool) -> Tensor:
    """torch's attention by one backend; the transposes are views."""
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=enable_gqa
        )
    return out.transpose(1, 2)


def flash_attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's flash attention with its LSE.

    scaled_dot_product_attention does not return the LSE, which the merge needs; this operator, which its flash backend
    calls, does.
    """
    result = torch.ops.aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, False
    )
    return result[0].transpose(1, 2), result[1][..., : q.shape[1]]


def merge_fused(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The merge by this library's operator: the composed form at its best."""
    return merge_attention_states([out for out, _ in parts], [lse for _, lse in parts])[0]


def plain(name: str, backend: SDPBackend, x: Inputs, k: Tensor, v: Tensor, note: str) -> Contender:
    """Plain causal attention of the same work: prefill over rotated q; decode's one query sees all keys."""
    prefill = x.case.kind == "prefill"
    q = x.q_rotated["intra"] if prefill else x.q
    grouped = k.shape[2] != q.shape[2]
    return Contender(name, lambda: _sdpa(backend, q, k, v, prefill, grouped), note)


def composed(name: str, attend: Attend, merge: Merge, x: Inputs, k: Tensor, v: Tensor, note: str) -> Contender:
    """The composed form over its three rotations of q."""
    return Contender(name, lambda: composed_attention(x.q_rotated, k, v, x.config, attend, merge), note)


@dataclass(frozen=True)
class Support:
    """What a rival can do on this device: nothing (and why), or equal heads only, or grouped heads as well."""

    reason: str = ""
    grouped: bool = False


def _refusal(call: Callable[[], object]) -> str:
    """Why a call does not work here; empty if it does."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call()
            torch.cuda.synchronize()
    except (RuntimeError, ValueError) as error:
        # The reasons of scaled_dot_product_attention are warnings before an error that says nothing.
        return " ".join(str(warning.message).splitlines()[0] for warning in said) or str(error).splitlines()[0]
    return ""


def probe(attend: Callable[[Tensor, Tensor, Tensor, bool], object], case: Case, dtype: torch.dtype) -> Support:
    """Tries a rival on a few tokens, with grouped heads first. `attend` takes q, k, v and whether heads are grouped."""
    q, k = (torch.randn(1, 256, heads, case.head_dim, dtype=dtype, device=DEVICE) for heads in (4, 2))
    if case.heads != case.kv_heads and not _refusal(lambda: attend(q, k, k, True)):
        return Support(grouped=True)
    return Support(reason=_refusal(lambda: attend(q, q, q, False)))


class Rivals:
    """torch's backends and the composed form, with K and V repeated beforehand for those that refuse grouped heads."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.support = {
            name: probe(lambda q, k, v, gqa, b=backend: _sdpa(b, q, k, v, True, gqa), case, dtype)  # type: ignore[misc]
            for name, backend in BACKENDS.items()
        }
        self.support["composed"] = probe(lambda q, k, v, gqa: flash_attend(q, k, v, True), case, dtype)

    def need_repeated_kv(self, case: Case) -> bool:
        """Whether any rival needs K and V per query head."""
        used = [s for name, s in self.support.items() if case.kind == "prefill" or name in BACKENDS]
        return case.heads != case.kv_heads and any(not s.reason and not s.grouped for s in used)

    def contenders(self, x: Inputs, *, head_by_head: bool) -> list[Contender]:
        """All that work here. Queries are rotated beforehand, as are keys."""
        case = x.case
        repeated = x.k, x.v
        if self.need_repeated_kv(case):
            group = case.heads // case.kv_heads
            repeated = x.k.repeat_interleave(group, 2), x.v.repeat_interleave(group, 2)

        def keys(name: str) -> tuple[Tensor, Tensor, str]:
            if self.support[name].grouped or case.heads == case.kv_heads:
                return x.k, x.v, ""
            return *repeated, "K and V repeated beforehand"

        found = []
        for name, backend in BACKENDS.items():
            if not self.support[name].reason:
                found.append(plain(name, backend, x, *keys(name)))
        if case.kind == "prefill" and not self.support["composed"].reason:
            forms: dict[str, tuple[Attend, Merge]] = {
                "composed": (flash_attend, merge_in_torch),
                "composed, our merge": (flash_attend, merge_fused),
            }
            if head_by_head:
                forms["composed per head"] = (per_head(flash_attend), merge_in_torch)
            for name, (attend, merge) in forms.items():
                found.append(composed(name, attend, merge, x, *keys("composed")))
        return found
