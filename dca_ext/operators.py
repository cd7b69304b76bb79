"""Loads the compiled operators and tells torch what it cannot know from them: output shapes and the missing backward.

The kernels are in ``csrc``; the schemas are in ``csrc/torch/operators.cpp``. `dca_ext.functional` is the public face.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dca_ext.installation import not_built


def _load() -> None:
    folder = Path(__file__).resolve().parent
    library = next(iter(sorted(folder.glob("_dca_torch*.so"))), None)
    if library is None:
        raise not_built("_dca_torch")
    torch.ops.load_library(library)


_load()


# --- Output shapes for tracing: fake tensors in, fake tensors out -----------------------------------------------------


@torch.library.register_fake("dca_ext::attention")
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    chunk_len: int,
    max_position: int,
    segment: int,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int,
    cache_seqlens: Tensor | None,
    cache_seqlen: int,
    lengths_before_append: bool,
    cache_leftpad: Tensor | None,
    page_table: Tensor | None,
    k_scale: Tensor | None,
    k_scale_value: float,
    v_scale: Tensor | None,
    v_scale_value: float,
    softmax_scale: float,
    temperature: Tensor | None,
    original_max_position_embeddings: int,
    num_splits: int,
    interleaved: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    lse_shape = (0,) if not return_lse else (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("dca_ext::rotate_keys")
def _rotate_keys_fake(k: Tensor, *_: object) -> Tensor:
    return k.new_empty(k.shape)


@torch.library.register_fake("dca_ext::rotate_and_append_kv")
def _rotate_and_append_kv_fake(*_: object) -> None:
    return None


@torch.library.register_fake("dca_ext::merge_attention_states")
def _merge_attention_states_fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


# --- Backward: none yet, and never silent zeros -----------------------------------------------------------------------


def _refuse_backward(name: str) -> None:
    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(f"dca_ext::{name} has no backward; run it under torch.no_grad()")

    torch.library.register_autograd(f"dca_ext::{name}", backward)


for _name in ("attention", "rotate_keys", "merge_attention_states"):
    _refuse_backward(_name)
