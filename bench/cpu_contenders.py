"""Who takes part in bench_cpu.py: this library, torch's attention, transformers' functions, and the composed form.

Rivals get q and k rotated beforehand, and K and V in the layout that suits them best; ours rotates q as part of the
method. `CONTENDERS` lists them by kind, ours first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from composed_attention import composed_attention, merge_in_torch
from cpu_cases import Case, Contender, Inputs, Prepared, to_head_major
from cpu_ceilings import PRODUCTS, READ
from llama_modules import LAYERS
from torch import Tensor

from dca_ext import dca_attention, dca_attention_with_kvcache, rotate_keys

OURS = "dca_ext"

# --- Ours -------------------------------------------------------------------------------------------------------------


def attend_cached(x: Inputs, k: Tensor, v: Tensor, **scales: Any) -> Callable[[], Any]:
    """The fused operator over rotated keys (1, seqlen, kv_heads, head_dim) and unrotated queries."""
    length = x.case.seqlen
    return lambda: dca_attention_with_kvcache(x.q, k, v, x.cos, x.sin, x.case.config, cache_seqlens=length, **scales)


def ours(x: Inputs) -> Prepared:
    """K and V as this library allocates them, (1, seqlen, kv_heads, head_dim) contiguous."""
    return Prepared(attend_cached(x, x.k, x.v), note="" if x.case.kind == "decode" else "keys rotated beforehand")


def ours_with_rotation(x: Inputs) -> Prepared:
    """`dca_attention`: the pass over K and the attention."""
    return Prepared(lambda: dca_attention(x.q, x.k_unrotated, x.v, x.cos, x.sin, x.case.config))


def rotation_of_keys(x: Inputs) -> Prepared:
    """The pass over K that precedes a prefill."""
    return Prepared(lambda: rotate_keys(x.k_unrotated, x.cos, x.sin, x.case.config), work=2.0 * x.case.kv_bytes)


def ours_head_major(x: Inputs) -> Prepared:
    """K and V as caches of transformers hold them: transposed views of (1, kv_heads, seqlen, head_dim)."""
    _, k, v = x.head_major
    return Prepared(attend_cached(x, k.transpose(1, 2), v.transpose(1, 2)), note="caches of transformers")


def ours_e4m3(x: Inputs) -> Prepared:
    """Caches of float8_e4m3fn without scales, which numbers of this size do not need."""
    k, v = (cache.to(torch.float8_e4m3fn) for cache in (x.k, x.v))
    return Prepared(attend_cached(x, k, v), work=2.0 * k.numel())


def ours_int8(x: Inputs) -> Prepared:
    """Caches of int8 with a float32 scale per token and KV head, (1, seqlen, kv_heads). A build whose operator does not
    take them refuses, and that refusal is what the table says."""
    (k, k_scale), (v, v_scale) = (rounded_to_int8(cache) for cache in (x.k, x.v))
    call = attend_cached(x, k, v, k_scale=k_scale, v_scale=v_scale)
    return Prepared(call, work=2.0 * (k.numel() + 4 * k_scale.numel()))


def rounded_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as int8, and the scales (1, seqlen, kv_heads) that an element is multiplied by."""
    scale = x.float().abs().amax(-1).clamp_min(1e-20) / 127
    return (x.float() / scale[..., None]).round().to(torch.int8), scale


# --- torch, prefill ---------------------------------------------------------------------------------------------------


def sdpa_causal(x: Inputs) -> Prepared:
    """scaled_dot_product_attention(is_causal=True) with K and V repeated per query head beforehand."""
    q, *kv = x.head_major
    k, v = (cache.repeat_interleave(x.case.group, 1) for cache in kv)
    return Prepared(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), note="K, V repeated beforehand")


def sdpa_causal_grouped(x: Inputs) -> Prepared:
    """The same with enable_gqa=True and K and V as they are."""
    q, k, v = x.head_major
    return Prepared(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def heads_are_equal(case: Case) -> str:
    """Why a formulation for grouped heads takes no part."""
    return "as many KV heads as query heads: the same call as torch sdpa" if case.group == 1 else ""


def heads_second(out: Tensor, case: Case) -> Tensor:
    """Rows of (1, heads, rows, head_dim)."""
    return out.transpose(1, 2)


def repeated_kv_bytes(case: Case) -> float:
    """K and V per query head."""
    return 2.0 * case.group * case.kv_bytes


# --- torch, decode ----------------------------------------------------------------------------------------------------


def sdpa_grouped(x: Inputs) -> Prepared:
    """(1, heads, 1, head_dim) against (1, kv_heads, seqlen, head_dim) with enable_gqa=True."""
    q, k, v = x.head_major
    return Prepared(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def sdpa_folded(x: Inputs) -> Prepared:
    """The heads of a group as query rows: (1, kv_heads, group, head_dim) against (1, kv_heads, seqlen, head_dim)."""
    q, k, v = x.head_major
    q = q.view(1, x.case.kv_heads, x.case.group, x.case.head_dim)
    return Prepared(lambda: F.scaled_dot_product_attention(q, k, v))


def two_products(x: Inputs) -> Prepared:
    """bmm, softmax, bmm over the folded shapes; the logits are as many as heads * seqlen."""
    q, k, v = x.head_major
    q = q.view(x.case.kv_heads, x.case.group, x.case.head_dim)
    k, v, scale = k[0].transpose(1, 2), v[0], 1 / math.sqrt(x.case.head_dim)
    return Prepared(lambda: torch.bmm(torch.bmm(q * scale, k).softmax(-1), v))


def one_row(out: Tensor, case: Case) -> Tensor:
    """Decode's row, whatever the heads are folded into."""
    return out.reshape(1, 1, case.heads, case.head_dim)


# --- transformers -----------------------------------------------------------------------------------------------------


def as_llama_gives_them(x: Inputs) -> tuple[Any, Tensor, Tensor, Tensor]:
    """module, query, key, value as LlamaAttention passes them on: in prefill views of projections, (1, seqlen, heads,
    head_dim) in memory, in decode K and V out of a cache."""
    module = SimpleNamespace(num_key_value_groups=x.case.group, is_causal=True, training=False)
    if x.case.kind == "decode":
        return module, *x.head_major
    return module, x.plain_q.transpose(1, 2), x.k.transpose(1, 2), x.v.transpose(1, 2)


def transformers_sdpa(x: Inputs) -> Prepared:
    """ALL_ATTENTION_FUNCTIONS["sdpa"] without a mask, which LlamaModel does not make where all is causal."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend, inputs, scale = ALL_ATTENTION_FUNCTIONS["sdpa"], as_llama_gives_them(x), 1 / math.sqrt(x.case.head_dim)
    return Prepared(lambda: attend(*inputs, None, scaling=scale), note="attention function alone")


def transformers_eager(x: Inputs) -> Prepared:
    """eager_attention_forward of modeling_llama with the causal mask that LlamaModel makes once for all layers."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    inputs, scale = as_llama_gives_them(x), 1 / math.sqrt(x.case.head_dim)
    rows = x.q.shape[1]
    mask = torch.zeros(1, 1, rows, x.case.seqlen, dtype=x.case.torch_dtype)
    if rows > 1:
        mask.masked_fill_(torch.ones(rows, x.case.seqlen, dtype=torch.bool).triu_(1), torch.finfo(mask.dtype).min)
    return Prepared(lambda: eager_attention_forward(*inputs, mask, scaling=scale), note="attention function alone")


def eager_bytes(case: Case) -> float:
    """Logits and their softmax at once, the softmax of 16-bit logits in float32 on both sides; the mask; K, V
    repeated."""
    rows = 1 if case.kind == "decode" else case.seqlen
    size = case.torch_dtype.itemsize
    squares = case.heads * (2 * size if size == 4 else size + 8) + size + 1
    return float(rows * case.seqlen * squares) + repeated_kv_bytes(case)


def first_of_two(out: tuple[Tensor, Any], case: Case) -> Tensor:
    """Attention functions of transformers return out (1, rows, heads, head_dim) and weights or None."""
    return out[0]


# --- The composed form ------------------------------------------------------------------------------------------------


def flash_on_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's flash attention on the CPU with its LSE.

    scaled_dot_product_attention does not return the LSE, which the merge needs; this operator, which it calls, does.
    It takes grouped heads as they are.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal
    )
    return out.transpose(1, 2), lse


def composed(x: Inputs) -> Prepared:
    """Three flash calls per chunk of queries and the merge in torch; the three rotations of q are made beforehand."""
    q = {segment: to_head_major(rotated).transpose(1, 2) for segment, rotated in x.rotated_q().items()}
    k, v = (cache.transpose(1, 2) for cache in x.head_major[1:])
    call = composed_attention
    return Prepared(lambda: call(q, k, v, x.case.config, flash_on_cpu, merge_in_torch), note="q rotated beforehand")


def composed_bytes(case: Case) -> float:
    """q in three rotations and two layouts at once, and the float32 parts of one chunk's merge."""
    return 6.0 * case.q_bytes + 4.0 * 4 * min(case.seqlen, case.chunk_len) * case.heads * case.head_dim


# --- All of them ------------------------------------------------------------------------------------------------------

#: What 8-bit numbers may add to the error in norm.
_ROUNDING = {"e4m3": 8e-2, "int8": 2e-2}

CONTENDERS: dict[str, list[Contender]] = {
    "prefill": [
        Contender(OURS, ours, role="ours", computes="dca"),
        Contender("dca_ext + K pass", ours_with_rotation, computes="dca"),
        Contender("K pass", rotation_of_keys, role="part", computes=""),
        Contender("torch sdpa", sdpa_causal, rows=heads_second, extra_bytes=repeated_kv_bytes),
        Contender("torch sdpa gqa", sdpa_causal_grouped, rows=heads_second, unfit=heads_are_equal),
        Contender("transformers sdpa", transformers_sdpa, rows=first_of_two, extra_bytes=repeated_kv_bytes),
        Contender("transformers eager", transformers_eager, rows=first_of_two, extra_bytes=eager_bytes),
        Contender("composed", composed, computes="dca", extra_bytes=composed_bytes),
        PRODUCTS,
    ],
    "decode": [
        Contender(OURS, ours, role="ours", computes="dca"),
        Contender("dca_ext head-major", ours_head_major, computes="dca"),
        Contender("dca_ext e4m3", ours_e4m3, computes="dca", tolerance=_ROUNDING["e4m3"]),
        Contender("dca_ext int8", ours_int8, computes="dca", tolerance=_ROUNDING["int8"]),
        Contender("torch sdpa gqa", sdpa_grouped, rows=one_row, extra_bytes=repeated_kv_bytes),
        Contender("torch sdpa folded", sdpa_folded, rows=one_row),
        Contender("torch bmm", two_products, rows=one_row),
        Contender("transformers sdpa", transformers_sdpa, rows=first_of_two, extra_bytes=repeated_kv_bytes),
        Contender("transformers eager", transformers_eager, rows=first_of_two, extra_bytes=eager_bytes),
        READ,
    ],
    "module": LAYERS,
}
