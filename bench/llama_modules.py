"""transformers' LlamaAttention and DCALlamaAttention as whole modules: projections, rotation, attention.

Both have the same random weights; hidden_size is heads * head_dim, and no cache is used.
"""

from __future__ import annotations

from typing import Any

import torch
from cpu_cases import Case, Contender, Inputs, Prepared


def _config(case: Case, implementation: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=case.heads * case.head_dim,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_position_embeddings=max(case.seqlen, 4096),
        attn_implementation=implementation,
    )


def _prepared(layer: torch.nn.Module, case: Case, **arguments: Any) -> Prepared:
    """The layer in the case's dtype over random hidden states (1, seqlen, hidden_size)."""
    layer = layer.to(case.torch_dtype).eval()
    hidden = torch.randn(1, case.seqlen, case.heads * case.head_dim).to(case.torch_dtype)
    return Prepared(lambda: layer(hidden, **arguments), note="with projections, without a cache")


def ours(x: Inputs) -> Prepared:
    """DCALlamaAttention; it ignores position_embeddings."""
    from dca_ext import DCALlamaAttention

    torch.manual_seed(0)
    return _prepared(DCALlamaAttention(_config(x.case, "sdpa"), 0, x.case.config), x.case)


def _llama(case: Case, implementation: str, mask: torch.Tensor | None) -> Prepared:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    torch.manual_seed(0)
    config = _config(case, implementation)
    like = torch.empty(0, dtype=case.torch_dtype)
    tables = LlamaRotaryEmbedding(config)(like, torch.arange(case.seqlen)[None])
    return _prepared(LlamaAttention(config, 0), case, position_embeddings=tables, attention_mask=mask)


def llama_sdpa(x: Inputs) -> Prepared:
    """LlamaAttention under attn_implementation="sdpa"."""
    return _llama(x.case, "sdpa", None)


def llama_eager(x: Inputs) -> Prepared:
    """LlamaAttention under "eager" with its causal mask, which the model makes once for all layers."""
    rows = x.case.seqlen
    mask = torch.zeros(1, 1, rows, rows, dtype=x.case.torch_dtype)
    mask.masked_fill_(torch.ones(rows, rows, dtype=torch.bool).triu_(1), torch.finfo(mask.dtype).min)
    return _llama(x.case, "eager", mask)


def weights_bytes(case: Case) -> float:
    """Of the four projections, once in float32 and once in the dtype, and of the tensors between them."""
    hidden = case.heads * case.head_dim
    return (4.0 + case.torch_dtype.itemsize) * 2 * hidden * (hidden + case.kv_heads * case.head_dim) + 4 * case.q_bytes


def eager_bytes(case: Case) -> float:
    """The same, and the squares of eager attention."""
    return weights_bytes(case) + float(case.seqlen) ** 2 * (case.heads * 10 + 5)


LAYERS = [
    Contender("dca_ext", ours, role="ours", computes="", extra_bytes=weights_bytes),
    Contender("transformers sdpa", llama_sdpa, computes="", extra_bytes=weights_bytes),
    Contender("transformers eager", llama_eager, computes="", extra_bytes=eager_bytes),
]
