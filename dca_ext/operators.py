"""Loads the compiled operators and tells torch what it cannot know from them: output shapes and the missing backward.

The kernels are in ``csrc``; the schemas are in ``csrc/torch/operators.cpp``. `dca_ext.functional` is the public face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

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


def call(operator: Callable[..., Any], *arguments: object) -> Any:
    """The operator's results; what it refuses is a ValueError, also where torch makes every error a RuntimeError."""
    try:
        result = operator(*arguments)
    except RuntimeError as error:
        refusal = torch.ops.dca_ext.last_refusal()
        if refusal and str(error).startswith(refusal):
            raise ValueError(refusal) from None
        raise
    if operator in _WRITTEN and not torch.compiler.is_compiling():
        _tell_autograd(arguments[i] for i in _WRITTEN[operator])
    return result


#: Of operators that write into arguments, the places of these.
_WRITTEN: dict[Callable[..., Any], list[int]] = {
    operator: [
        i
        for i, argument in enumerate(operator.default._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    for operator in (torch.ops.dca_ext.append_and_attend, torch.ops.dca_ext.rotate_and_append_kv)
}


def _tell_autograd(written: Iterable[object]) -> None:
    """What was saved for a backward has changed; torch finds that out by the version of a tensor."""
    for tensor in written:
        if isinstance(tensor, Tensor) and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


# --- Output shapes for tracing: fake tensors in, fake tensors out -----------------------------------------------------


def _like_queries(q: Tensor, return_lse: bool, **_: object) -> tuple[Tensor, Tensor]:
    lse_shape = (0,) if not return_lse else (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _like_keys(k: Tensor, **_: object) -> Tensor:
    return k.new_empty(k.shape)


def _nothing(**_: object) -> None:
    return None


def _like_parts(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _register_fake(name: str, results: Callable[..., Any]) -> None:
    names = [argument.name for argument in getattr(torch.ops.dca_ext, name).default._schema.arguments]

    def fake(*args: object, **kwargs: object) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        _require_one_device(arguments)
        return results(**arguments)

    torch.library.register_fake(f"dca_ext::{name}", fake)


def _require_one_device(arguments: dict[str, Any]) -> None:
    """One meta tensor among others leads torch here too, to results without values and appends that write nothing."""
    tensors = list(_tensors(arguments))
    first_name, first = tensors[0]
    for name, tensor in tensors:
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}; got {tensor.device}")


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from ((f"{name}[{i}]", tensor) for i, tensor in enumerate(value))


_register_fake("attention", _like_queries)
_register_fake("append_and_attend", _like_queries)
_register_fake("rotate_keys", _like_keys)
_register_fake("rotate_and_append_kv", _nothing)
_register_fake("merge_attention_states", _like_parts)


# --- Backward: none yet, and never silent zeros -----------------------------------------------------------------------


def _refuse_backward(name: str) -> None:
    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(f"dca_ext::{name} has no backward; run it under torch.no_grad()")

    torch.library.register_autograd(f"dca_ext::{name}", backward)


for _name in ("attention", "rotate_keys", "merge_attention_states"):
    _refuse_backward(_name)
