"""Dual Chunk Attention as fused kernels: Llama-family models at several times their training length, without training.

    from dca_ext import replace_attention
    replace_attention(model)

`functional` holds the operators, `reference` the same in readable torch, `attention` the modules for transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dca_ext.config import DCAConfig
from dca_ext.version import __version__

if TYPE_CHECKING:
    from dca_ext.attention import (
        DCALlamaAttention,
        DCAMistralAttention,
        DCAMixtralAttention,
        DCAQwen2Attention,
        DCAQwen2MoeAttention,
        DCAQwen3Attention,
        DCAQwen3MoeAttention,
    )
    from dca_ext.dca_cache import DCACache
    from dca_ext.functional import (
        dca_attention,
        dca_attention_varlen,
        dca_attention_with_kvcache,
        dca_segment_attention,
        merge_attention_states,
        rotate_and_append_kv,
        rotate_keys,
    )
    from dca_ext.installation import build_info, cmake_dir
    from dca_ext.patch import replace_attention, restore_attention
    from dca_ext.rotary import rotary_tables
    from dca_ext.scales import kv_cache_scale

#: Public names that are imported on first use: the modules need transformers, the operators load a library.
_LAZY = {
    "DCACache": "dca_cache",
    "DCALlamaAttention": "attention",
    "DCAMistralAttention": "attention",
    "DCAMixtralAttention": "attention",
    "DCAQwen2Attention": "attention",
    "DCAQwen2MoeAttention": "attention",
    "DCAQwen3Attention": "attention",
    "DCAQwen3MoeAttention": "attention",
    "build_info": "installation",
    "cmake_dir": "installation",
    "dca_attention": "functional",
    "dca_attention_varlen": "functional",
    "dca_attention_with_kvcache": "functional",
    "dca_segment_attention": "functional",
    "kv_cache_scale": "scales",
    "merge_attention_states": "functional",
    "replace_attention": "patch",
    "restore_attention": "patch",
    "rotary_tables": "rotary",
    "rotate_and_append_kv": "functional",
    "rotate_keys": "functional",
}

__all__ = [
    "DCACache",
    "DCAConfig",
    "DCALlamaAttention",
    "DCAMistralAttention",
    "DCAMixtralAttention",
    "DCAQwen2Attention",
    "DCAQwen2MoeAttention",
    "DCAQwen3Attention",
    "DCAQwen3MoeAttention",
    "__version__",
    "build_info",
    "cmake_dir",
    "dca_attention",
    "dca_attention_varlen",
    "dca_attention_with_kvcache",
    "dca_segment_attention",
    "kv_cache_scale",
    "merge_attention_states",
    "replace_attention",
    "restore_attention",
    "rotary_tables",
    "rotate_and_append_kv",
    "rotate_keys",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dca_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dca_ext.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
