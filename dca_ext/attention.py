"""Attention modules of Hugging Face models with Dual Chunk Attention inside.

`DCALlamaAttention` and its siblings are subclasses of transformers' own modules: parameters, names and constructor are
theirs, the forward pass is ours. They are installed on a loaded model by `dca_ext.replace_attention`, or before loading
by transformers' `register_patch_mapping` (see `dca_ext.patch`).
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from dca_ext import functional
from dca_ext.cache import left_padding, per_sequence, sequence_lengths, slots_in_use
from dca_ext.config import DCAConfig
from dca_ext.dca_cache import DCACacheLayer
from dca_ext.rotary import RotaryTables


def default_dca_config(config: Any) -> DCAConfig:
    """The DCAConfig of a transformers model config to which none was given.

    In this order: the one that `replace_attention` recorded (``config.dca_config``, which save_pretrained keeps); the
    one of Qwen's 1M models (``config.dual_chunk_attention_config``); `DCAConfig.from_pretraining_length` of
    ``config.max_position_embeddings``. The last is right for models with RoPE scaling too: max_position_embeddings is
    the length that such a model was tuned for with its scaling, original_max_position_embeddings the one before. Where
    YaRN was added to a config that kept its length (Qwen's recipe), factor * original_max_position_embeddings counts.
    With rope_type "linear", give a dca_config where max_position_embeddings is not the length that was tuned for.

    Raises:
        ValueError: if the config has none of the three, or a geometry that `DCAConfig` refuses.
    """
    recorded = getattr(config, "dca_config", None)
    if recorded is not None:
        return recorded if isinstance(recorded, DCAConfig) else DCAConfig(**recorded)
    qwen = getattr(config, "dual_chunk_attention_config", None)
    if qwen is not None:
        return DCAConfig.from_hf(qwen)
    pretraining_length = getattr(config, "max_position_embeddings", None)
    if pretraining_length is None:
        raise ValueError(f"dca_config must be given: {type(config).__name__} has no max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn":
        scaled = (rope.get("factor") or 1.0) * (rope.get("original_max_position_embeddings") or pretraining_length)
        pretraining_length = max(pretraining_length, int(scaled))
    return DCAConfig.from_pretraining_length(pretraining_length)


class DualChunkAttention(nn.Module):
    """What all model families share; stands before a transformers attention module among the bases of a class.

    Keys are rotated once, at (position mod chunk_len), and that is what the cache holds, whatever its class. Queries
    go to the operator unrotated.

    Args:
        config: the transformers model config.
        layer_idx: the layer's index, also into the cache.
        dca_config: the geometry; None means `default_dca_config` of ``config``.
        rope_length: the sequence length at which length-dependent RoPE frequencies (rope_type "dynamic" and
            "longrope") are frozen; None means ``config.dca_rope_length`` if recorded there, else max_position + 1.
    """

    # Set by the transformers modules.
    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    #: None in a layer with a sliding window, which works as it did.
    dca_config: DCAConfig | None
    rotary_tables: RotaryTables

    def __init__(
        self, config: Any, layer_idx: int, dca_config: DCAConfig | None = None, *, rope_length: int | None = None
    ) -> None:
        """A new module with parameters of its own; arguments as for the class."""
        super().__init__(config, layer_idx)
        window = window_of(self)
        if window is None:
            self.configure(dca_config, rope_length)
            return
        self.dca_config = None
        if layer_idx == _first_layer(config, "sliding_attention"):
            warnings.warn(sliding_window_warning(type(self).__name__, window), stacklevel=2)

    def configure(self, dca_config: DCAConfig | None, rope_length: int | None = None) -> None:
        """Sets the geometry and takes the rotary tables that go with it; arguments as for the class."""
        if dca_config is None:
            dca_config = default_dca_config(self.config)
        elif not isinstance(dca_config, DCAConfig):
            raise TypeError(f"dca_config must be a DCAConfig or None; got {type(dca_config).__name__}")
        if rope_length is None:
            rope_length = getattr(self.config, "dca_rope_length", None)
        self.rotary_tables = RotaryTables.from_config(self.config, dca_config.max_position, rope_length)
        self.dca_config = dca_config

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Dual Chunk Attention over hidden_states, with what the cache holds before them.

        Args:
            hidden_states: (batch, seqlen, hidden_size).
            position_embeddings: ignored; the layer has tables of its own.
            attention_mask: None, 2-D, 4-D or 1-D, see `dca_ext.cache.left_padding`. Only padding is taken from it.
            past_key_values: any transformers Cache, or None; rotated keys are added to it. From transformers 5.24 on
                its name is ``cache``; either is taken.
            **kwargs: read are position_ids (batch or 1, seqlen), and cu_seq_lens_q (sequences + 1,) with max_length_q
                for sequences packed into one row. Those do not go into the cache.

        Returns:
            (batch, seqlen, hidden_size) and None in place of attention weights, which a fused kernel never has.

        Raises:
            ValueError: in training with attention_dropout, for bidirectional attention, and for masks and positions
                that `left_padding` refuses. The cache is untouched then.
            TypeError: for a cache by a name that is not known here, and for one that is no Cache.
        """
        past_key_values = kwargs.pop("cache", None) if past_key_values is None else past_key_values
        if self.dca_config is None:
            # By place: the cache's name depends on the version of transformers.
            return super().forward(  # type: ignore[misc]
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        self._check(kwargs, past_key_values)
        if kwargs.get("cu_seq_lens_q") is not None:
            cu_seqlens_q, max_seqlen_q = kwargs["cu_seq_lens_q"], kwargs.get("max_length_q")
            out = self._attend_packed(hidden_states, past_key_values, cu_seqlens_q, max_seqlen_q)
        else:
            out = self._attend(hidden_states, attention_mask, past_key_values, kwargs.get("position_ids"))
        return self.o_proj(out.flatten(-2)), None

    def _attend(
        self, hidden_states: Tensor, attention_mask: Tensor | None, past_key_values: Any, position_ids: Tensor | None
    ) -> Tensor:
        """One sequence per row, behind the cached ones: (batch, seqlen, num_heads, head_dim)."""
        assert self.dca_config is not None
        batch, seqlen = hidden_states.shape[:2]
        before = slots_in_use(past_key_values, self.layer_idx)
        leftpad = left_padding(attention_mask, position_ids, before, batch, seqlen)
        options: dict[str, Any] = {"softmax_scale": self.scaling}
        # The operator's own temperature counts padding behind a sequence. One token alone has none behind it.
        if self.dca_config.temperature == "yarn" and seqlen > 1:
            options["temperature"] = self._temperature(sequence_lengths(attention_mask, before, batch, seqlen))
        q, k, v = self.project(hidden_states)
        cos, sin = self.rotary_tables.on(q.device)
        if past_key_values is None and leftpad is None:
            return cast(Tensor, functional.dca_attention(q, k, v, cos, sin, self.dca_config, **options))
        if (layer := _dca_cache_layer(past_key_values, self.layer_idx)) is not None:
            return layer.append_and_attend(q, k, v, cos, sin, self.dca_config, cache_leftpad=leftpad, **options)
        # New tensors: a static cache counts its own length up in place.
        total = per_sequence(before + seqlen, batch)
        before = per_sequence(before, batch)
        k = functional.rotate_keys(k, cos, sin, self.dca_config, cache_seqlens=before, cache_leftpad=leftpad)
        if past_key_values is not None:
            # The cache's layout is (batch, num_heads_kv, slots, head_dim); views both ways, no copies.
            keys, values = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = keys.transpose(1, 2), values.transpose(1, 2)
        out = functional.dca_attention_with_kvcache(
            q, k, v, cos, sin, self.dca_config, cache_seqlens=total, cache_leftpad=leftpad, **options
        )
        return cast(Tensor, out)

    def _temperature(self, lengths: Tensor | None) -> Tensor | None:
        """YaRN's factor on the logits of each sequence, float32 (batch,), as `DCAConfig` defines it."""
        assert self.dca_config is not None
        original = self.dca_config.original_max_position_embeddings
        if lengths is None or original is None:
            return None
        return (lengths.to(torch.float32) / original).clamp(min=1.0).log().mul(0.1).add(1.0).square()

    def _attend_packed(
        self, hidden_states: Tensor, past_key_values: Any, cu_seqlens_q: Tensor, max_seqlen_q: Any
    ) -> Tensor:
        """Sequences packed into one row, cut at cu_seqlens_q: (1, total, num_heads, head_dim)."""
        assert self.dca_config is not None
        if hidden_states.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q needs a batch of one packed row; got {hidden_states.shape[0]} rows")
        before = slots_in_use(past_key_values, self.layer_idx)
        if isinstance(before, Tensor) or before > 0:
            raise ValueError("cu_seq_lens_q must come without cached tokens: packed sequences are not continued")
        q, k, v = self.project(hidden_states)
        cos, sin = self.rotary_tables.on(q.device)
        # max_length_q only bounds the work; a device tensor would have to be waited for.
        max_seqlen_q = max_seqlen_q if isinstance(max_seqlen_q, int) else hidden_states.shape[1]
        out = functional.dca_attention_varlen(
            q[0], k[0], v[0], cu_seqlens_q, max_seqlen_q, cos, sin, self.dca_config, softmax_scale=self.scaling
        )
        return cast(Tensor, out)[None]

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (batch, seqlen, heads, head_dim), not rotated. The projections say how many heads there are: under
        tensor parallelism a part of the config's."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        return (
            self.q_proj(hidden_states).view(shape),
            self.k_proj(hidden_states).view(shape),
            self.v_proj(hidden_states).view(shape),
        )

    def _check(self, kwargs: dict[str, Any], past_key_values: Any) -> None:
        """Refuses, or warns of, what this layer was asked for and does not do."""
        if self.training and self.attention_dropout > 0:
            raise ValueError(
                f"attention_dropout must be 0 in training with DCA; got {self.attention_dropout}: "
                "set config.attention_dropout = 0 before building the model, or call model.eval()"
            )
        if kwargs.get("is_causal") is False:
            raise ValueError("is_causal must be True; Dual Chunk Attention is causal")
        require_causal_layer(self)
        # Passed over in silence, it would make every answer wrong.
        unknown = next((name for name, value in kwargs.items() if isinstance(value, Cache)), None)
        if unknown is not None:
            raise TypeError(f"{unknown} must not be a cache: Dual Chunk Attention takes it as past_key_values or cache")
        if past_key_values is not None and not hasattr(past_key_values, "get_seq_length"):
            raise TypeError(
                f"past_key_values must be a transformers Cache; got {type(past_key_values).__name__}: "
                "Dual Chunk Attention does not go with continuous batching (generate_batch)"
            )
        if kwargs.get("output_attentions") and self.layer_idx == _first_layer(self.config, "full_attention"):
            warnings.warn("output_attentions: DCA layers have no attention weights and return None", stacklevel=3)


class DCALlamaAttention(DualChunkAttention, LlamaAttention):
    """transformers' LlamaAttention with Dual Chunk Attention; see `DualChunkAttention` for arguments and forward."""


class DCAMistralAttention(DualChunkAttention, MistralAttention):
    """transformers' MistralAttention with Dual Chunk Attention; see `DualChunkAttention`."""


class DCAMixtralAttention(DualChunkAttention, MixtralAttention):
    """transformers' MixtralAttention with Dual Chunk Attention; see `DualChunkAttention`."""


class DCAQwen2Attention(DualChunkAttention, Qwen2Attention):
    """transformers' Qwen2Attention (biased q, k, v) with Dual Chunk Attention; see `DualChunkAttention`."""


class DCAQwen2MoeAttention(DualChunkAttention, Qwen2MoeAttention):
    """transformers' Qwen2MoeAttention (biased q, k, v) with Dual Chunk Attention; see `DualChunkAttention`."""


class NormalizedDualChunkAttention(DualChunkAttention):
    """What the families share that normalise q and k over head_dim; see `DualChunkAttention`."""

    q_norm: nn.Module
    k_norm: nn.Module

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As everywhere, with q and k normalised; under autocast the norms give fp32 again."""
        q, k, v = super().project(hidden_states)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v


class DCAQwen3Attention(NormalizedDualChunkAttention, Qwen3Attention):
    """transformers' Qwen3Attention (normalised q, k) with Dual Chunk Attention; see `DualChunkAttention`."""


class DCAQwen3MoeAttention(NormalizedDualChunkAttention, Qwen3MoeAttention):
    """transformers' Qwen3MoeAttention (normalised q, k) with Dual Chunk Attention; see `DualChunkAttention`."""


#: transformers' attention modules and what takes their place.
DCA_CLASSES: dict[type[nn.Module], type[DualChunkAttention]] = {
    LlamaAttention: DCALlamaAttention,
    MistralAttention: DCAMistralAttention,
    MixtralAttention: DCAMixtralAttention,
    Qwen2Attention: DCAQwen2Attention,
    Qwen2MoeAttention: DCAQwen2MoeAttention,
    Qwen3Attention: DCAQwen3Attention,
    Qwen3MoeAttention: DCAQwen3MoeAttention,
}


def _dca_cache_layer(past_key_values: Any, layer_idx: int) -> DCACacheLayer | None:
    """The layer's part of a `DCACache`; None of another cache."""
    layers = getattr(past_key_values, "layers", None) or ()
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    return layer if isinstance(layer, DCACacheLayer) else None


def window_of(layer: nn.Module) -> int | None:
    """The sliding window of an attention module in tokens, or None."""
    if isinstance(layer, (MistralAttention, MixtralAttention)):
        return getattr(layer.config, "sliding_window", None)
    return cast("int | None", getattr(layer, "sliding_window", None))


def require_causal_layer(layer: nn.Module) -> None:
    """Refuses an attention module that was made bidirectional, as embedding models do."""
    if not getattr(layer, "is_causal", True):
        raise ValueError(
            f"is_causal of {type(layer).__name__} must be True; got {layer.is_causal}: Dual Chunk Attention is causal"
        )


def sliding_window_warning(what: str, window: int) -> str:
    """The one sentence about layers that DCA leaves alone."""
    return f"{what}: attention with a sliding window (of {window} tokens) is left as it is, without DCA"


def _first_layer(config: Any, layer_type: str) -> int:
    """Index of the first layer of a type, which speaks for all of them; 0 where all layers are alike."""
    layer_types = getattr(config, "layer_types", None) or ()
    return layer_types.index(layer_type) if layer_type in layer_types else 0
