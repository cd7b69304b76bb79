"""Arguments as the compiled operators take them, and the refusal of those of the wrong kind.

Only kinds are looked at here, which torch would refuse in its own terms and with errors of its own. Shapes, dtypes,
devices and numbers are looked at in C++ (``csrc/torch``, ``csrc/dispatch``). What is traced may be a symbol instead of
a number, and is never compared: that would pin it down.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from dca_ext.config import DCAConfig

# The abstract classes, which numpy's numbers are of, come last: they are slow to ask.
_INTS = (int, torch.SymInt, Integral)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, Real)
_BOOLS = (bool, torch.SymBool)


def require_config(config: object) -> None:
    """A DCAConfig."""
    if not isinstance(config, DCAConfig):
        raise TypeError(f"config must be a DCAConfig; got {type(config).__name__}")


def require_tensors(**tensors: object) -> None:
    """Tensors all."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")


def require_tensors_or_none(**tensors: object) -> None:
    """A tensor or None each."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor or None; got {type(value).__name__}")


def require_no_tangents(*tensors: object) -> None:
    """No forward-mode AD, to which operators cannot say that they have no derivative: it would go on with zeros.

    Asked in grad mode alone, for it takes a while: inference is not to wait for it.
    """
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if isinstance(tensor, Tensor) and unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("dca_ext's operators have no forward-mode derivative; call them without tangents")


def require_no_grad_of_caches(*caches: Tensor) -> None:
    """Caches that are written belong to no graph: what they held before would get the gradients of what they hold."""
    if torch.is_grad_enabled() and any(cache.requires_grad for cache in caches):
        raise NotImplementedError("caches that are written must not require grad; detach them, or use torch.no_grad()")


def require_bools(**flags: object) -> None:
    """True or False each."""
    for name, value in flags.items():
        if not isinstance(value, _BOOLS):
            raise TypeError(f"{name} must be True or False; got {value!r}")


def require_int(name: str, value: object) -> None:
    """An int of 32 bits; numpy's will do."""
    if isinstance(value, bool) or not isinstance(value, _INTS):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    require_32_bits(name, value)


def require_32_bits(name: str, value: object) -> None:
    """An int that fits in 32 bits, if it is a number and not a symbol."""
    if isinstance(value, int) and not torch.compiler.is_compiling() and not -(2**31) <= value < 2**31:
        raise ValueError(f"{name} must fit in 32 bits; got {value}")


def require_number_or_none(name: str, value: object) -> None:
    """A float or an int, numpy's too, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, _NUMBERS)):
        raise TypeError(f"{name} must be a float or None; got {type(value).__name__}")


def require_pair(first_name: str, first: object, second_name: str, second: object) -> None:
    """Both or neither."""
    if (first is None) != (second is None):
        given, missing = (first_name, second_name) if second is None else (second_name, first_name)
        raise ValueError(f"{first_name} and {second_name} go together; got {given} without {missing}")


def require_borders(cu_seqlens_q: object, max_seqlen_q: object) -> None:
    """The borders of ragged rows and the longest sequence between them, or neither."""
    require_pair("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q)
    if cu_seqlens_q is not None:
        require_tensors(cu_seqlens_q=cu_seqlens_q)
        require_int("max_seqlen_q", max_seqlen_q)


def split_lengths(cache_seqlens: int | Tensor) -> tuple[Tensor | None, int]:
    """The operators take lengths as a tensor, or else as one number for all sequences."""
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens, 0
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, int | torch.SymInt):
        raise TypeError(f"cache_seqlens must be an int or an int32 tensor (batch,); got {type(cache_seqlens).__name__}")
    require_32_bits("cache_seqlens", cache_seqlens)
    return None, cache_seqlens


def split_scales(
    k_scale: float | Tensor | None, v_scale: float | Tensor | None, k_cache: Tensor, v_cache: Tensor
) -> tuple[Tensor | None, float, Tensor | None, float]:
    """The operators take a scale as a tensor, or else as a number, which then needs no memory on the device."""
    return (*_split_scale("k_scale", k_scale, k_cache), *_split_scale("v_scale", v_scale, v_cache))


def split_written_scales(
    k_scale: float | Tensor | None, v_scale: float | Tensor | None, k_cache: Tensor, v_cache: Tensor
) -> tuple[Tensor | None, float, Tensor | None, float, Tensor | None, Tensor | None]:
    """To operators that append, scales that they read and scales that they write are different arguments."""
    scales = split_scales(k_scale, v_scale, k_cache, v_cache)
    if k_cache.dtype == torch.int8:
        return None, 1.0, None, 1.0, scales[0], scales[2]
    return (*scales, None, None)


def _split_scale(name: str, scale: float | Tensor | None, cache: Tensor) -> tuple[Tensor | None, float]:
    if cache.dtype == torch.int8:
        if not isinstance(scale, Tensor):
            given = "none" if scale is None else type(scale).__name__
            raise ValueError(
                f"{name} of an int8 cache must be a float32 tensor with a scale for each slot and KV head; got {given}"
            )
        return scale, 1.0
    if scale is None:
        return None, 1.0
    if cache.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"{name} must be None unless the caches are float8_e4m3fn or int8; got a scale for {cache.dtype}"
        )
    if isinstance(scale, Tensor):
        return scale, 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float | torch.SymFloat):
        raise TypeError(
            f"{name} must be a float, or a float32 tensor (), (1,) or (num_heads_kv,); got {type(scale).__name__}"
        )
    return None, scale
