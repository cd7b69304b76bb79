"""Small random models, and the slow ones that the tests compare with.

The slow model is transformers' own with each attention layer exchanged for a few lines around `dca_ext.reference`. Its
tables come from the model's own rotary embedding, its keys are rotated anew in each pass, and it has no cache and no
padding, so that it shares nothing with dca_ext.attention but the projections.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dca_ext import reference
from dca_ext.cli.stream import cache_argument
from dca_ext.config import DCAConfig

#: All experts work for every token: a choice among them would turn rounding into other numbers.
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 2, "num_experts_per_tok": 2}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS),
}

#: What this version of transformers calls the cache.
CACHE_ARGUMENT = cache_argument(LlamaForCausalLM)

VOCABULARY = 89
PADDING = 0

#: Chunks of 6 tokens; the first row that differs from plain attention is 10.
SMALL = DCAConfig(chunk_len=6, max_position=9)

#: One set of RoPE parameters for each rope_type. 64 positions are max_position_embeddings of these models.
ROPE_PARAMETERS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
}


def tiny_config(family: str = "llama", **overrides: object):
    """Two layers, 4 heads of 16 channels over 2 KV heads. Large weights: position matters to these models."""
    config_class, _, extra = FAMILIES[family]
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": PADDING,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return config_class(**{**values, **extra, **overrides})


def tiny_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object):
    """A random model in eval mode, with its own config; biases are random too."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family][1](config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "_norm." in name:
                nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return cast(model, dtype).eval()


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The parameters in another dtype, in place, as from_pretrained does it. ``model.to(dtype)`` would round the
    frequencies of the plain model's rotary embedding too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Random token ids other than padding."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


class SlowAttention(nn.Module):
    """The reference around the projections of a transformers attention module."""

    def __init__(self, attention: nn.Module, cos: Tensor, sin: Tensor, dca_config: DCAConfig) -> None:
        super().__init__()
        self.attention, self.cos, self.sin, self.dca_config = attention, cos, sin, dca_config

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        a = self.attention
        q, k, v = (p(hidden_states).unflatten(-1, (-1, a.head_dim)) for p in (a.q_proj, a.k_proj, a.v_proj))
        if hasattr(a, "q_norm"):
            q, k = a.q_norm(q), a.k_norm(k)
        out = reference.dca_attention(q, k, v, self.cos, self.sin, self.dca_config)
        return a.o_proj(out.flatten(-2)), None


def slow_model(plain: PreTrainedModel, dca_config: DCAConfig = SMALL) -> PreTrainedModel:
    """A copy of an unpatched model with the reference inside: whole, unpadded sequences only, no cache."""
    slow = copy.deepcopy(plain)
    # Dynamic frequencies follow the length of the last call; here they are frozen at that of the table.
    positions = torch.arange(dca_config.max_position + 1)[None]
    cos, sin = slow.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
    cos, sin = (table[0, :, : table.shape[-1] // 2] for table in (cos, sin))
    for layer in slow.model.layers:
        layer.self_attn = SlowAttention(layer.self_attn, cos, sin, dca_config)
    return slow


def logits(model: PreTrainedModel, ids: Tensor, *, past: Cache | None = None, **kwargs: object) -> Tensor:
    """fp32 logits of one pass (batch, seqlen, vocabulary), behind what a cache holds."""
    if past is not None:
        kwargs[CACHE_ARGUMENT] = past
    with torch.no_grad():
        return model(ids, **kwargs).logits.float()


def greedy_by_recomputing(model: PreTrainedModel, ids: Tensor, steps: int) -> Tensor:
    """ids followed by the most likely tokens, each from a pass over all tokens before it."""
    for _ in range(steps):
        ids = torch.cat((ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)), dim=1)
    return ids


def tolerance(plain: PreTrainedModel, ids: Tensor) -> float:
    """The whole-model rule: twice the difference between transformers' own eager and sdpa, plus 1e-5 of the largest
    logit."""
    results = []
    for implementation in ("eager", "sdpa"):
        model = copy.deepcopy(plain)
        model.set_attn_implementation(implementation)
        results.append(logits(model, ids))
    return float(2 * (results[0] - results[1]).abs().max() + 1e-5 * results[1].abs().max())


def assert_same(actual: Tensor, expected: Tensor, limit: float) -> None:
    """max |actual - expected| <= limit, no NaN anywhere."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= limit, f"max difference {difference:.3e} exceeds {limit:.3e}"
