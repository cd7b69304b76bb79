"""The two numbers that define Dual Chunk Attention, and where they come from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

TEMPERATURES = ("none", "yarn")

#: Keys of Qwen's ``dual_chunk_attention_config`` that describe attention; all others are about sparse attention.
_HF_KEYS = frozenset({"chunk_size", "local_size", "original_max_position_embeddings"})
_warned_about_sparse_keys = False


@dataclass(frozen=True)
class DCAConfig:
    """Geometry of Dual Chunk Attention (An et al. 2024, arXiv 2402.17463), in tokens.

    A key at position ``j`` is rotated at ``j mod chunk_len``, for ever. A query at position ``i`` is rotated at
    ``i mod chunk_len`` against keys of its own chunk (intra), at ``min(i mod chunk_len + chunk_len, max_position)``
    against the previous chunk (successive), and at ``max_position`` against all chunks before that (inter).

    Attributes:
        chunk_len: the stride of the chunks, n.
        max_position: the largest rotary position in use, P; no relative distance exceeds it.
        temperature: ``"none"`` (the paper), or ``"yarn"``: logits times ``s * s`` with
            ``s = max(1, 0.1 ln(kv_len / original_max_position_embeddings) + 1)``.
        original_max_position_embeddings: the pretraining length that ``"yarn"`` divides by.

    Raises:
        ValueError: unless ``1 <= chunk_len <= max_position <= 2 * chunk_len - 1``, for an unknown temperature, for
            ``"yarn"`` without ``original_max_position_embeddings``, and for lengths of 2**31 or more.
        TypeError: for a length that is not an int.
    """

    chunk_len: int
    max_position: int
    temperature: str = "none"
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        for name in ("chunk_len", "max_position"):
            _require_int(name, getattr(self, name))
        if not 1 <= self.chunk_len <= self.max_position <= 2 * self.chunk_len - 1:
            raise ValueError(
                "DCAConfig needs 1 <= chunk_len <= max_position <= 2 * chunk_len - 1; "
                f"got chunk_len={self.chunk_len}, max_position={self.max_position}"
            )
        if self.max_position >= 2**31:
            raise ValueError(f"max_position must be below 2**31; got {self.max_position}")
        if self.temperature not in TEMPERATURES:
            raise ValueError(f"temperature must be one of {', '.join(TEMPERATURES)}; got {self.temperature!r}")
        original = self.original_max_position_embeddings
        if original is not None:
            _require_int("original_max_position_embeddings", original)
            if not 1 <= original < 2**31:
                raise ValueError(f"original_max_position_embeddings must be at least 1 and below 2**31; got {original}")
        elif self.temperature == "yarn":
            raise ValueError("temperature='yarn' needs original_max_position_embeddings; got None")

    @classmethod
    def from_chunk_size(cls, chunk_size: int, local_window: int, **kwargs: Any) -> DCAConfig:
        """The public codes' terms, in tokens: chunk_len = chunk_size - local_window,
        max_position = min(chunk_size, 2 * chunk_len - 1)."""
        _require_int("chunk_size", chunk_size)
        _require_int("local_window", local_window)
        if not 0 <= local_window < chunk_size:
            raise ValueError(
                f"local_window must be at least 0 and below chunk_size; got local_window={local_window}, "
                f"chunk_size={chunk_size}"
            )
        chunk_len = chunk_size - local_window
        return cls(chunk_len, max(chunk_len, min(chunk_size, 2 * chunk_len - 1)), **kwargs)

    @classmethod
    def from_pretraining_length(cls, context_len: int, **kwargs: Any) -> DCAConfig:
        """ChunkLlama's defaults for a model trained at ``context_len`` tokens: chunk_size 3c/4, local_window c/8."""
        _require_int("context_len", context_len)
        return cls.from_chunk_size(context_len * 3 // 4, context_len // 8, **kwargs)

    @classmethod
    def paper(cls, context_len: int, **kwargs: Any) -> DCAConfig:
        """The paper's geometry for a model trained at ``context_len`` tokens: chunk_len 3c/4, max_position c - 1."""
        _require_int("context_len", context_len)
        return cls(context_len * 3 // 4, context_len - 1, **kwargs)

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> DCAConfig:
        """The ``dual_chunk_attention_config`` of Qwen's 1M models: chunk_size, local_size and, if the models' engines
        are to scale logits by YaRN's temperature, original_max_position_embeddings.

        Sparse-attention keys are ignored with one warning: attention here is dense.
        """
        global _warned_about_sparse_keys
        missing = {"chunk_size", "local_size"} - set(mapping)
        if missing:
            raise ValueError(f"dual_chunk_attention_config needs {', '.join(sorted(missing))}; got {sorted(mapping)}")
        ignored = sorted(set(mapping) - _HF_KEYS)
        if ignored and not _warned_about_sparse_keys:
            _warned_about_sparse_keys = True
            warnings.warn(
                f"dual_chunk_attention_config: ignoring {', '.join(ignored)}; dca_ext computes dense attention",
                stacklevel=2,
            )
        original = mapping.get("original_max_position_embeddings")
        return cls.from_chunk_size(
            mapping["chunk_size"],
            mapping["local_size"],
            temperature="none" if original is None else "yarn",
            original_max_position_embeddings=original,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; ``DCAConfig(**d)`` restores them."""
        return asdict(self)


def _require_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {type(value).__name__} {value!r}")
