"""The ways to read past the training context that the demo compares; none of them trains anything.

vanilla   the model as it is: positions past the context are used although it never saw them in training
DCA       Dual Chunk Attention as published: relative positions stay inside the context
DCA+temp  the same with YaRN's temperature on the logits, as Qwen's models use it (`DCAConfig.temperature="yarn"`)
YaRN      frequencies interpolated by wavelength, and that temperature (Peng et al. 2023, arXiv 2309.00071)
NTK       the rotary base raised so that the slowest frequency stretches over the text ("NTK-aware" scaling)

YaRN and NTK are transformers' own, with the factor that the measured length asks for, seqlen / context, and frozen
there for the whole pass: each method gets its best case at every length.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from dca_ext import DCAConfig, replace_attention, restore_attention

METHODS = ("vanilla", "DCA", "DCA+temp", "YaRN", "NTK")


def scaled_rope_parameters(method: str, config: Any, seqlen: int) -> dict[str, Any]:
    """transformers' `rope_parameters` for YaRN or NTK at `seqlen` tokens.

    NTK raises the base to theta * s^(d / (d - 2)) with s = seqlen / context and d = head_dim, which divides the slowest
    frequency by s and leaves the fastest alone.
    """
    context = config.max_position_embeddings
    factor = seqlen / context
    theta = config.rope_parameters["rope_theta"]
    if method == "YaRN":
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": context,
        }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"rope_type": "default", "rope_theta": theta * factor ** (head_dim / (head_dim - 2))}


def dca_config(method: str, context: int) -> DCAConfig:
    """ChunkLlama's geometry for a model trained at `context` tokens."""
    if method == "DCA+temp":
        return DCAConfig.from_pretraining_length(context, temperature="yarn", original_max_position_embeddings=context)
    return DCAConfig.from_pretraining_length(context)


@contextlib.contextmanager
def reading_with(model: Any, method: str, seqlen: int) -> Iterator[None]:
    """Inside the block, `model` (a LlamaForCausalLM) reads `seqlen` tokens by `method`; afterwards it is as before."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    context = model.config.max_position_embeddings
    if method.startswith("DCA"):
        replace_attention(model, dca_config(method, context))
        try:
            yield
        finally:
            restore_attention(model)
    elif method == "vanilla" or seqlen <= context:
        yield
    else:
        config = copy.deepcopy(model.config)
        config.rope_parameters = scaled_rope_parameters(method, model.config, seqlen)
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config).to(model.device)
        try:
            yield
        finally:
            model.model.rotary_emb = rotary
