"""torch's own operators on the memory of a simulated GPU, which is the host's: the CPU computes them where they lie.

A CUDA build of torch runs on the simulator as far as memory, streams and copies go. Its kernels do not: they come as
machine code. `install` puts the CPU's in their place, so that what is left of a program on CUDA tensors - this
project's operators - runs as it would on a GPU.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: What needs no kernel: memory, and what says nothing about values.
NATIVE = {
    "empty",
    "empty_strided",
    "set_",
    "resize_",
    "record_stream",
    "is_pinned",
    "_pin_memory",
    "_fused_sdp_choice",
    "is_set_to",
}

#: What waits for the device, besides copies between it and the host.
WAITING = {"_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select"}

_libraries: list[torch.library.Library] = []  # registrations last as long as these


def on_host(x: Any) -> Any:
    """A CUDA tensor as a CPU tensor of the same memory, the device as the CPU; anything else as it is."""
    if isinstance(x, torch.device):
        return torch.device("cpu") if x.type == "cuda" else x
    if not isinstance(x, Tensor) or x.device.type != "cuda":
        return x
    storage = x.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(raw, x.storage_offset(), x.size(), x.stride())


def on_device(x: Any) -> Any:
    """A copy of a CPU tensor on the device; anything else as it is."""
    if not isinstance(x, Tensor) or x.device.type != "cpu":
        return x
    copy = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")
    on_host(copy).copy_(x)
    return copy


def _crosses(tensors: list[Any]) -> bool:
    return len({x.device.type for x in tensors if isinstance(x, Tensor)}) > 1


def implementation(op: Any) -> Callable[..., Any]:
    """The operator for CUDA tensors, by its kernel for the CPU."""
    schema = op._schema
    name = schema.name.removeprefix("aten::")

    def written(returned: Any, result: Any, given: dict[str, Any]) -> Any:
        """The argument that the result was written into."""
        argument = next(
            a for a in schema.arguments if a.alias_info and a.alias_info.before_set == returned.alias_info.before_set
        )
        target = given[argument.name]
        if isinstance(target, Tensor) and target.shape != result.shape:
            target.resize_(result.shape)
            on_host(target).copy_(result)
        return target

    def run(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
        waits = name in WAITING or (name == "copy_" and _crosses([given["self"], given["src"]]))
        if waits and torch.cuda.get_sync_debug_mode() == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation: {name}")
        host_args, host_kwargs = pytree.tree_map(on_host, (args, kwargs))
        # Numbers arrive where the schema has tensors.
        host_args = [
            torch.tensor(x) if str(argument.type) == "Tensor" and isinstance(x, int | float) else x
            for argument, x in zip(schema.arguments, host_args, strict=False)
        ]
        result = op(*host_args, **host_kwargs)
        results = result if len(schema.returns) > 1 else (result,)
        out = [
            written(returned, x, given) if returned.alias_info else pytree.tree_map(on_device, x)
            for returned, x in zip(schema.returns, results, strict=False)
        ]
        return tuple(out) if len(out) > 1 else out[0] if out else None

    return run


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> list[Tensor]:
    """Out and LSE, as torch's attention on the CPU computes them."""
    q, k, v, bias = (on_host(x) for x in (q, k, v, bias))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return [on_device(x) for x in attend(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)]


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cuda")


def flash_attention(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """aten::_scaled_dot_product_flash_attention, without dropout."""
    out, lse = _attend(q, k, v, None, is_causal, scale)
    return out, lse, _nothing(), _nothing(), q.shape[2], k.shape[2], _nothing(), _nothing(), _nothing()


def efficient_attention(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    """aten::_scaled_dot_product_efficient_attention, without dropout."""
    return (*_attend(q, k, v, attn_bias, is_causal, scale), _nothing(), _nothing())


def cudnn_attention(
    q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    """aten::_scaled_dot_product_cudnn_attention, without dropout."""
    return flash_attention(q, k, v, dropout_p, is_causal, return_debug_mask, scale=scale)


ATTENTION = {"flash": flash_attention, "efficient": efficient_attention, "cudnn": cudnn_attention}


def _operators() -> dict[str, Callable[..., Any]]:
    """Name and overload -> what computes it, of all that torch has a CUDA kernel for."""
    found: dict[str, Callable[..., Any]] = {}
    registered = [*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), "aten::copy_"]
    for full in registered:
        namespace, _, qualified = full.partition("::")
        name, _, overload = qualified.partition(".")
        if namespace != "aten" or name in NATIVE or not hasattr(torch.ops.aten, name):
            continue
        op = getattr(getattr(torch.ops.aten, name), overload or "default")
        if any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns):
            continue  # a view
        found[qualified] = implementation(op)
    return found | {f"_scaled_dot_product_{name}_attention": attend for name, attend in ATTENTION.items()}


def install() -> None:
    """For this process; torch.compile compiles without Triton, which would make machine code."""
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kernels are overridden, which is what is asked for
        for name, function in _operators().items():
            library.impl(name, function, "CUDA", allow_override=True)
    torch.cuda._sleep = lambda cycles: None  # nothing is ever late

    compile_by = torch.compile

    def compile_without_triton(model: Any = None, **kwargs: Any) -> Any:
        options = {name: value for name, value in kwargs.items() if name not in ("mode", "options", "backend")}
        return compile_by(model, backend="aot_eager", **options)

    torch.compile = compile_without_triton
