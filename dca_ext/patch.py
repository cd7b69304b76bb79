"""Dual Chunk Attention in a loaded transformers model, or in models that are about to be loaded.

    model = replace_attention(AutoModelForCausalLM.from_pretrained(path))      # and restore_attention(model) to undo

    transformers.monkey_patching.register_patch_mapping(PATCH_MAPPING)         # every model loaded from now on
    model = AutoModelForCausalLM.from_pretrained(path)

Either way ``model.save_pretrained`` writes a checkpoint of the plain architecture. The geometry given to
`replace_attention` is in its config.json as ``dca_config`` and holds again when the checkpoint is loaded and patched by
either way without another one.

With a mapping transformers looks through modules of its own that nobody asked for; where one of them cannot be imported
(torchvision is missing, say), use `replace_attention`.

`replace_attention` also chooses the attention implementation "dca"; with the mapping,
``from_pretrained(path, attn_implementation="dca")`` does. It spares padded batches a (seqlen x seqlen) mask.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from dca_ext.attention import (
    DCA_CLASSES,
    DualChunkAttention,
    default_dca_config,
    require_causal_layer,
    sliding_window_warning,
    window_of,
)
from dca_ext.cache import ATTN_IMPLEMENTATION
from dca_ext.config import DCAConfig
from dca_ext.rotary import RotaryTables

Model = TypeVar("Model", bound=nn.Module)

#: For transformers' register_patch_mapping: class name patterns and their replacements.
PATCH_MAPPING: dict[str, type[nn.Module]] = {f"^{old.__name__}$": new for old, new in DCA_CLASSES.items()}

#: What `replace_attention` writes into a model's config.
_RECORDED = ("dca_config", "dca_rope_length")


@dataclass(frozen=True)
class _Before:
    """What `restore_attention` puts back; kept by each replaced layer, so that copies of a model have it too."""

    attn_implementation: str | None
    recorded: dict[str, Any]


def replace_attention(model: Model, dca_config: DCAConfig | None = None, *, rope_length: int | None = None) -> Model:
    """Gives the attention layers of a loaded model Dual Chunk Attention, in place.

    The modules stay the same objects with the same parameters; their class changes. The model gets a config of its own
    (models built from one config object share it), in which ``dca_config`` records the geometry and, if no layer is
    left alone, the attention implementation is "dca", under which transformers builds no (seqlen x seqlen) masks.
    On a model with DCA already, this changes the geometry.

    Args:
        model: a module that contains Llama, Mistral, Mixtral, Qwen2, Qwen3 or Qwen MoE attention. Pass the outermost
            one: the config of a model around it is not touched, so that its save_pretrained would not keep the
            geometry.
        dca_config: the geometry; None means `default_dca_config` of the model's config.
        rope_length: the sequence length at which "dynamic" and "longrope" frequencies are frozen, by default
            max_position + 1.

    Returns:
        ``model``. Layers with a sliding window are left as they are, with one warning.

    Raises:
        ValueError: if the model has no such attention layer, or a bidirectional one, or if its config has no geometry
            or RoPE that can be used; the model is unchanged then.
        TypeError: if dca_config is not a DCAConfig, or rope_length not an int.
    """
    if dca_config is not None and not isinstance(dca_config, DCAConfig):
        raise TypeError(f"dca_config must be a DCAConfig or None; got {type(dca_config).__name__}")
    layers: list[Any] = [m for m in model.modules() if type(m) in DCA_CLASSES or isinstance(m, DualChunkAttention)]
    if not layers:
        supported = ", ".join(old.__name__ for old in DCA_CLASSES)
        raise ValueError(f"model must contain one of {supported}; {type(model).__name__} has no such layer")
    full = [layer for layer in layers if window_of(layer) is None]
    for layer in full:
        require_causal_layer(layer)
    windows = [window for layer in layers if (window := window_of(layer)) is not None]
    if windows:
        what = f"{len(windows)} of {len(layers)} layers of {type(model).__name__}"
        warnings.warn(sliding_window_warning(what, windows[0]), stacklevel=2)
    for config in _distinct_configs(full):
        # Whatever is to be refused is refused before anything changes.
        RotaryTables.from_config(config, (dca_config or default_dca_config(config)).max_position, rope_length)
    _give_own_configs(model, full)
    for config in _distinct_configs(full):
        sharing = [layer for layer in full if layer.config is config]
        _replace_layers(sharing, config, dca_config, rope_length, alone=not windows)
    return model


def restore_attention(model: Model) -> Model:
    """Undoes `replace_attention` (and the patch mapping): transformers' own attention, the same parameters.

    The attention implementation is again the one before, "sdpa" if that was "dca".

    Returns:
        ``model``; one without DCA is returned as it is.
    """
    layers = [m for m in model.modules() if isinstance(m, DualChunkAttention)]
    for layer in layers:
        before = vars(layer).pop("_before_dca", None)
        if before is not None:
            _restore_config(layer.config, before)
        # Loaded under it, too: plain layers cannot read its masks.
        if getattr(layer.config, "_attn_implementation", None) == ATTN_IMPLEMENTATION:
            layer.config._attn_implementation = "sdpa"
        for name in ("dca_config", "rotary_tables"):
            vars(layer).pop(name, None)
        _change_class(layer, next(old for old, new in DCA_CLASSES.items() if isinstance(layer, new)))
    return model


def _replace_layers(
    layers: list[Any], config: Any, dca_config: DCAConfig | None, rope_length: int | None, *, alone: bool
) -> None:
    """Turns ``layers``, which share ``config``, into DCA layers and records that in the config."""
    dca_config = dca_config or default_dca_config(config)
    if rope_length is None:
        rope_length = getattr(config, "dca_rope_length", None)
    before = _Before(
        getattr(config, "_attn_implementation", None),
        {name: getattr(config, name) for name in _RECORDED if hasattr(config, name)},
    )
    for layer in layers:
        _change_class(layer, DCA_CLASSES.get(type(layer), type(layer)))
        layer.configure(dca_config, rope_length)
        # Now rather than while a compiler traces. Quantised projections may have buffers only.
        for tensor in itertools.islice(itertools.chain(layer.parameters(), layer.buffers()), 1):
            layer.rotary_tables.on(tensor.device)
        vars(layer).setdefault("_before_dca", before)
    config.dca_config = dca_config.to_dict()
    if rope_length is not None:
        config.dca_rope_length = rope_length
    # Weights can be asked for under "eager" only, and a config that asks for them is not saved with another.
    if alone and not getattr(config, "output_attentions", False):
        config._attn_implementation = ATTN_IMPLEMENTATION


def _restore_config(config: Any, before: _Before) -> None:
    for name in _RECORDED:
        if name in before.recorded:
            setattr(config, name, before.recorded[name])
        elif hasattr(config, name):
            delattr(config, name)
    # Unless it was changed since.
    if getattr(config, "_attn_implementation", None) == ATTN_IMPLEMENTATION:
        config._attn_implementation = before.attn_implementation


def _distinct_configs(layers: list[Any]) -> list[Any]:
    return list({id(layer.config): layer.config for layer in layers}.values())


def _give_own_configs(model: nn.Module, layers: list[Any]) -> None:
    """Copies of the configs in the model, shared among its modules as they were. Those of ``layers`` that were replaced
    before, with the model or a part of it, are its own already; where all are, nothing is copied."""
    memo: dict[int, Any] = {id(layer.config): layer.config for layer in layers if "_before_dca" in vars(layer)}
    if all(id(layer.config) in memo for layer in layers):
        return
    for module in model.modules():
        if "config" in vars(module):
            module.config = copy.deepcopy(module.config, memo)


def _change_class(layer: nn.Module, new: type[nn.Module]) -> None:
    """Makes ``layer`` an instance of ``new``, also where a hook (accelerate's) keeps its old forward."""
    old = type(layer)
    layer.__class__ = new
    for name, value in list(vars(layer).items()):
        if isinstance(value, MethodType) and value.__self__ is layer and value.__func__ is old.forward:
            setattr(layer, name, MethodType(new.forward, layer))
