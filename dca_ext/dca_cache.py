"""A KV cache for models with Dual Chunk Attention that holds 16 or 8 bits per number and never copies what it holds.

    cache = DCACache(model.config, dtype=torch.float8_e4m3fn)
    model.generate(**inputs, past_key_values=cache)

DCA layers work with every transformers Cache. This one is what the operators themselves work on: new keys are rotated,
rounded and written in one pass with their values, where a DynamicCache makes a new tensor of the whole cache in every
step, and 8-bit numbers are read as they are, where a QuantizedCache turns all of them into 16 bits first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig

from dca_ext import functional
from dca_ext.config import DCAConfig
from dca_ext.scales import kv_cache_scale

#: What a cache may hold instead of the model's own dtype.
EIGHT_BIT_DTYPES = (torch.float8_e4m3fn, torch.int8)

#: Slots that a full cache grows by at the least. Else it grows by a quarter, so that each slot is copied four times.
_LEAST_GROWTH = 256


class DCACache(Cache):
    """KV cache of a model whose attention layers have DCA; for ``past_key_values`` of forward and generate.

    Beams, assisted generation, several turns and prefill in chunks work as with a DynamicCache. Layers with a sliding
    window, which DCA leaves alone, have what they have there. torch.compile would compile anew for every length: it
    needs a StaticCache.

    Args:
        config: the model's config.
        dtype: None to hold keys and values in the model's dtype; torch.float8_e4m3fn, one byte each, with a scale for
            each KV head, that of `kv_cache_scale` for the tokens that come first, which ought to be a prompt;
            torch.int8, on the CPU alone, one byte each with a scale for every token and KV head.
        capacity: slots to begin with, left padding included. A cache that is full grows by a quarter, for which the
            old and the new one are in memory side by side: say what you need where memory is short.
        scale_margin: margin of `kv_cache_scale`.

    Raises:
        TypeError: if config is no transformers config, or dtype is none of these.
        ValueError: if capacity is negative or scale_margin below 1.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        dtype: torch.dtype | None = None,
        capacity: int = 0,
        scale_margin: float = 2.0,
    ) -> None:
        """An empty cache; arguments as for the class."""
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be a transformers config, such as model.config; got {type(config).__name__}")
        if dtype is not None and dtype not in EIGHT_BIT_DTYPES:
            raise TypeError(f"dtype must be None, torch.float8_e4m3fn or torch.int8; got {dtype}")
        if capacity < 0:
            raise ValueError(f"capacity must not be negative; got {capacity}")
        if not scale_margin >= 1:
            raise ValueError(f"scale_margin must be at least 1; got {scale_margin}")
        layers = DynamicCache(config=config).layers
        super().__init__(
            layers=[
                DCACacheLayer(dtype, capacity, scale_margin) if type(layer) is DynamicLayer else layer
                for layer in layers
            ]
        )


class DCACacheLayer(CacheLayerMixin):
    """The rotated keys and the values of one layer, (batch, slots, num_heads_kv, head_dim) each."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, dtype: torch.dtype | None = None, capacity: int = 0, scale_margin: float = 2.0) -> None:
        """Nothing is allocated before the first tokens come; arguments as for `DCACache`."""
        self._dtype = dtype
        self._capacity = capacity
        self._scale_margin = scale_margin
        self._used = 0
        # Of batch and slots first: keys, values and, of int8, their scales.
        self._tensors: list[Tensor] = []
        self._head_scales: tuple[Tensor, Tensor] | None = None  # of float8_e4m3fn

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there is memory for a batch."""
        return bool(self._tensors)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """A view of the rotated keys as they are held: (batch, num_heads_kv, tokens, head_dim)."""
        return self._tensors[0][:, : self._used].transpose(1, 2) if self._tensors else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """A view of the values as they are held: (batch, num_heads_kv, tokens, head_dim)."""
        return self._tensors[1][:, : self._used].transpose(1, 2) if self._tensors else None

    @property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        """What the held keys and values are to be multiplied by: float32 (num_heads_kv,) each for float8_e4m3fn,
        (batch, tokens, num_heads_kv) for int8; else None."""
        if len(self._tensors) == 4:
            return self._tensors[2][:, : self._used], self._tensors[3][:, : self._used]
        return self._head_scales

    def append_and_attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        config: DCAConfig,
        *,
        cache_leftpad: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """`dca_attention_with_kvcache` with new k and v over this layer's cache; arguments and result as there."""
        self._make_room(k)
        head_scales = self._head_scales if self._used > 0 else None
        if self._dtype == torch.float8_e4m3fn and head_scales is None and k.numel() > 0:
            head_scales = kv_cache_scale(k, margin=self._scale_margin), kv_cache_scale(v, margin=self._scale_margin)
        k_scale, v_scale = self._tensors[2:] or head_scales or (None, None)
        out = functional.dca_attention_with_kvcache(
            q,
            self._tensors[0],
            self._tensors[1],
            rotary_cos,
            rotary_sin,
            config,
            k=k,
            v=v,
            cache_seqlens=self._used,
            cache_leftpad=cache_leftpad,
            k_scale=k_scale,
            v_scale=v_scale,
            **options,
        )
        # Not before: a refused call leaves the cache as it was.
        self._used += k.shape[1]
        self._head_scales = head_scales
        assert isinstance(out, Tensor)
        return out

    # --- What transformers asks of a layer ---

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for a batch like key_states (batch, num_heads_kv, seqlen, head_dim)."""
        self._make_room(key_states.transpose(1, 2))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuses: DCA layers append by `append_and_attend`.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "DCACache is for DCA layers; call dca_ext.replace_attention(model), or use a DynamicCache for this model"
        )

    def get_seq_length(self) -> int:
        """Slots in use, left padding included."""
        return self._used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots in use behind a call with so many new tokens, and the first slot."""
        return self._used + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1, by the name of older transformers."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens or, if it is positive, all behind the first so many."""
        tokens_to_remove = int(tokens_to_remove)  # assisted generation has it in a tensor
        if tokens_to_remove > 0:
            self._used = min(self._used, tokens_to_remove)
        else:
            self._used = max(self._used + tokens_to_remove, 0)

    def reset(self) -> None:
        """Forgets all tokens; the memory stays for a batch alike."""
        self._used = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence beam_idx[b] was, in place."""
        for tensor in self._tensors:
            used = _copyable(tensor)[:, : self._used]
            used.copy_(used.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        self._exchange(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These sequences alone."""
        self._exchange(lambda tensor: tensor[indices.to(tensor.device)])

    # --- Memory ---

    def _make_room(self, k: Tensor) -> None:
        """Slots for k (batch, seqlen, num_heads_kv, head_dim) behind those in use."""
        needed = self._used + k.shape[1]
        if self._used == 0 and not self._fits(k):
            self._allocate(k, max(self._capacity, needed))
        batch = self._tensors[0].shape[0]
        if k.shape[0] != batch:
            raise ValueError(f"the batch must have the {batch} sequences of the cache; got {k.shape[0]}")
        if needed > self._tensors[0].shape[1]:
            slots = needed + max(_LEAST_GROWTH, needed // 4)
            self._exchange(lambda tensor: _with_slots(tensor, slots, self._used))

    def _fits(self, k: Tensor) -> bool:
        """Whether there is memory for sequences like k, be it for fewer tokens."""
        if not self._tensors:
            return False
        keys = self._tensors[0]
        alike = keys.shape[0] == k.shape[0] and keys.shape[2:] == k.shape[2:] and keys.device == k.device
        return alike and keys.dtype == (self._dtype or k.dtype)

    def _allocate(self, k: Tensor, slots: int) -> None:
        batch, _, heads, head_dim = k.shape
        # Kernels may load, and then mask, what lies behind the last slot in use: nothing there may be NaN.
        self._tensors = [
            torch.zeros(batch, slots, heads, head_dim, dtype=self._dtype or k.dtype, device=k.device) for _ in range(2)
        ]
        if self._dtype == torch.int8:
            self._tensors += [torch.zeros(batch, slots, heads, device=k.device) for _ in range(2)]

    def _exchange(self, change: Callable[[Tensor], Tensor]) -> None:
        self._tensors = [change(_copyable(tensor)).view(tensor.dtype) for tensor in self._tensors]


def _copyable(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that all of torch's copies know."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _with_slots(tensor: Tensor, slots: int, used: int) -> Tensor:
    larger = tensor.new_zeros(tensor.shape[0], slots, *tensor.shape[2:])
    larger[:, :used] = tensor[:, :used]
    return larger
