"""Rotary tables for Dual Chunk Attention, built from a Hugging Face model config.

DCA needs the cosines and sines of the positions 0 ... max_position and of no others, so the whole of RoPE, with
whatever scaling a model uses (linear, NTK, YaRN, llama3, LongRoPE), is two small tables. Frequencies come from
transformers' own functions: they are the model's, also where a model ignores one of its rope_parameters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor


def inverse_frequencies(config: Any, length: int | None = None) -> tuple[Tensor, float]:
    """The inverse RoPE frequencies of a model and the factor on its cosines and sines.

    Args:
        config: a transformers model config with one set of ``rope_parameters``.
        length: the sequence length at which length-dependent frequencies (rope_type "dynamic" and "longrope") are
            frozen; None is the length of the first forward pass of an unpatched model, at most the pretraining one.

    Returns:
        inv_freq: fp32 (rotary_dim / 2,) on the CPU, in radians per token.
        attention_scaling: 1.0 unless YaRN or LongRoPE scale the tables.

    Raises:
        ValueError: for a rope_type that transformers does not know, for a config without, or with several sets of,
            rope_parameters, and for a length below 1.
        TypeError: for a length that is not an int.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if length is not None:
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"the length of RoPE frequencies must be an int; got {type(length).__name__} {length!r}")
        if length < 1:
            raise ValueError(f"the length of RoPE frequencies must be at least 1; got {length}")
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or "rope_type" not in parameters:
        raise ValueError(f"config.rope_parameters must be one set of parameters with a rope_type; got {parameters}")
    rope_type = parameters["rope_type"]
    # A model is created on the meta device by from_pretrained; the frequencies are needed in earnest.
    with torch.device("cpu"):
        if rope_type == "default":
            return _default_inverse_frequencies(config), 1.0
        if rope_type not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
            raise ValueError(f"rope_type must be one of {known}; got {rope_type!r}")
        inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=length)
    return inv_freq.to(torch.float32), float(attention_scaling)


def _default_inverse_frequencies(config: Any) -> Tensor:
    """Those of the model's own function, for some models ignore partial_rotary_factor (Llama and its relatives) and
    some do not. The formula, with the factor, for a config that is of no transformers model."""
    own = _own_default_function(config)
    if own is not None:
        # transformers 5.24 takes no device besides.
        return own(config)[0].to(torch.float32)
    parameters = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim
    return 1.0 / parameters["rope_theta"] ** exponents


def _own_default_function(config: Any) -> Callable[..., tuple[Tensor, float]] | None:
    """compute_default_rope_parameters of the one rotary embedding in the modelling file beside the config's."""
    files = [base.__module__ for base in type(config).__mro__ if base.__module__.startswith("transformers.models.")]
    if not files or ".configuration_" not in files[0]:
        return None
    name = "compute_default_rope_parameters"
    try:
        file = importlib.import_module(files[0].replace(".configuration_", ".modeling_"))
    except ImportError:
        return None
    own = {getattr(c, name) for c in vars(file).values() if isinstance(c, type) and name in vars(c)}
    return own.pop() if len(own) == 1 else None


class RotaryTables:
    """cos and sin of the positions 0 ... rows - 1, built once for each device and shared by all layers.

    Not a module, and its tables are not buffers: ``model.to(torch.bfloat16)`` must not round them, and from_pretrained
    replaces non-persistent buffers by uninitialised memory. `on` gives the tables of the device that asks.
    Equal frequencies give the same object (see `shared`); copies of a model share it as well.
    """

    #: Every set of tables in use; an entry goes when the last layer that holds it goes.
    _in_use: ClassVar[WeakValueDictionary[tuple[tuple[float, ...], float, int], RotaryTables]] = WeakValueDictionary()

    def __init__(self, inv_freq: tuple[float, ...], attention_scaling: float, rows: int) -> None:
        """Called by `shared`: inverse frequencies in radians per token, the factor on the tables, and their length."""
        self.inv_freq = inv_freq
        self.attention_scaling = attention_scaling
        self.rows = rows
        self._by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def shared(cls, inv_freq: tuple[float, ...], attention_scaling: float, rows: int) -> RotaryTables:
        """The one object with these values."""
        key = (inv_freq, attention_scaling, rows)
        tables = cls._in_use.get(key)
        if tables is None:
            tables = cls._in_use[key] = cls(*key)
        return tables

    @classmethod
    def from_config(cls, config: Any, max_position: int, length: int | None = None) -> RotaryTables:
        """Tables of max_position + 1 rows with the frequencies of a model config.

        Length-dependent frequencies are frozen at ``length`` tokens, by default at max_position + 1: cached keys
        cannot change with the sequence, and no position that DCA uses lies beyond. So "dynamic" NTK stays unscaled
        while max_position is within max_position_embeddings, and "longrope" takes its long factors if max_position + 1
        exceeds original_max_position_embeddings.
        """
        inv_freq, scaling = inverse_frequencies(config, max_position + 1 if length is None else length)
        return cls.shared(tuple(inv_freq.tolist()), scaling, max_position + 1)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin on ``device``: fp32, contiguous, (rows, rotary_dim / 2), row p for position p."""
        tables = self._by_device.get(device)
        if tables is None:
            tables = _build_tables(self.inv_freq, self.attention_scaling, self.rows, device)
            # What torch.export and other fake runs build has no values, or belongs to their graph alone.
            if type(tables[0]) is Tensor:
                self._by_device[device] = tables
        return tables

    def __deepcopy__(self, memo: dict[int, Any]) -> RotaryTables:
        """The object itself: its values never change."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without the tables, which are built again where they are needed."""
        return RotaryTables.shared, (self.inv_freq, self.attention_scaling, self.rows)


# torch.compile runs this while it traces, so that a compiled model does not build its tables in every call.
@torch.compiler.assume_constant_result
def _build_tables(
    inv_freq: tuple[float, ...], attention_scaling: float, rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    # Angles in fp32 and on the CPU: the same products, and so the same roundings, on every device. They are those of
    # the model's own rotary embedding. The device is named because a model may be created under another one.
    positions = torch.arange(rows, dtype=torch.float32, device="cpu")
    angles = positions[:, None] * torch.tensor(inv_freq, dtype=torch.float32, device="cpu")
    return (angles.cos() * attention_scaling).to(device), (angles.sin() * attention_scaling).to(device)


def rotary_tables(
    config: Any, max_position: int, *, length: int | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """``rotary_cos, rotary_sin`` of a model config, as the operators take them.

    Args:
        config: a transformers model config.
        max_position: the largest rotary position, `DCAConfig.max_position`.
        length: the sequence length at which "dynamic" and "longrope" frequencies are frozen, by default
            max_position + 1.
        device: where the tables go.

    Returns:
        Two fp32 tensors (max_position + 1, rotary_dim / 2), YaRN's and LongRoPE's attention_scaling multiplied in.

    Raises:
        ValueError: see `inverse_frequencies`.
    """
    return RotaryTables.from_config(config, max_position, length).on(torch.device(device))
