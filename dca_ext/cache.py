"""Where the tokens of a forward pass lie: slots of a transformers Cache, and the padding in front of each sequence.

A cache has slots; a sequence of the batch begins behind its left padding. DCA needs two numbers from all that
transformers passes around: how many slots are in use before the call, and how many of them are left padding
(`cache_leftpad` of the operators). The logical position of a token is its slot minus the padding.

Values in device tensors are not read, since that would wait for the device. What can only be seen by reading is
checked on the CPU, on a device if DCA_CHECK=1, and never in fake tensors or while torch.compile traces.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

if Version(transformers.__version__) < Version("5.4"):
    # Before, a static cache wrote to where an argument of update said that later versions have no more.
    raise ImportError(f"dca_ext needs transformers >= 5.4 for its modules; this is {transformers.__version__}")

#: The ``attn_implementation`` under which transformers builds no (seqlen x seqlen) mask for DCA layers.
ATTN_IMPLEMENTATION = "dca"

#: An additive mask may hold zeros and, where nothing is to be seen, values at or below this.
_MASKED_AT_MOST = -1e4

#: 4-D masks that were found causal, and with what: all layers of a pass get the same one.
_FOUND_CAUSAL = WeakTensorKeyDictionary()


def slots_in_use(past_key_values: Any, layer_idx: int) -> int | Tensor:
    """Slots of this layer's cache in use before the call, left padding included: an int, or, for a static cache on a
    device, a 0-d tensor there. 0 without a cache."""
    if past_key_values is None:
        return 0
    before = past_key_values.get_seq_length(layer_idx)
    return int(before) if isinstance(before, Tensor) and _may_read(before) else before


def per_sequence(slots: int | Tensor, batch: int) -> int | Tensor:
    """A slot count as the operators take it: an int, torch.export's symbol for one, or an int32 tensor (batch,)."""
    return slots.to(torch.int32).expand(batch).contiguous() if isinstance(slots, Tensor) else slots


def left_padding(
    attention_mask: Any, position_ids: Tensor | None, before: int | Tensor, batch: int, seqlen: int
) -> Tensor | None:
    """Slots of left padding in front of each sequence.

    Args:
        attention_mask: as transformers' decoder layers receive it. 2-D (batch, slots), nonzero at tokens: leading
            zeros are padding. 4-D (batch, heads, seqlen, slots), bool or additive: the same from its last query row;
            the others must be causal, except those of padding. 1-D (batch,): the padding itself, from `leftpad_mask`.
            None: the padding follows from ``position_ids``, the last of which belongs to the last slot.
        position_ids: int64 (batch or 1, seqlen), or None. A single row on a device is taken for transformers' own
            count of the slots, without padding.
        before: slots in use before the call.
        batch, seqlen: shape of the call's tokens.

    Returns:
        int32 (batch,), or None if there is no padding, or none can be seen without reading a device tensor.

    Raises:
        ValueError: for a mask or position_ids of another shape, a mask with holes, a 4-D mask that is not causal, an
            additive mask that is a bias, and for position_ids that restart or that end beyond the last slot; without a
            mask, for position_ids that do not count up by one to their last.
    """
    if position_ids is not None:
        _check_shape("position_ids", position_ids, (2,), batch)
        if position_ids.shape[1] != seqlen:
            raise ValueError(
                f"position_ids must have a column for each of the {seqlen} new tokens; got {position_ids.shape[1]}"
            )
    if attention_mask is None:
        leftpad = None if position_ids is None else _padding_from_positions(position_ids, before, seqlen)
    else:
        leftpad = _padding_from_mask(attention_mask, before, batch, seqlen)
    if position_ids is not None and _may_read(position_ids):
        _require_one_sequence_per_row(position_ids, leftpad, before, masked=attention_mask is not None)
    if leftpad is not None and attention_mask is not None and attention_mask.dim() == 4:
        _require_causal(attention_mask, leftpad, before, seqlen)
    if leftpad is None or (_may_read(leftpad) and not leftpad.any()):
        return None
    return leftpad.expand(batch).contiguous()


def sequence_lengths(attention_mask: Tensor | None, before: int | Tensor, batch: int, seqlen: int) -> Tensor | None:
    """Tokens of each sequence up to the end of the call, without the padding behind it, in a mask that `left_padding`
    has taken: int64 (batch,), or None if the mask does not show it."""
    if attention_mask is None or attention_mask.dim() == 1:
        return None
    return _visible_slots(attention_mask, before, seqlen).sum(dim=1).expand(batch)


def leftpad_mask(*, mask_function: Any = causal_mask_function, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface for ``attn_implementation="dca"``: left padding, int32 (batch,), for a causal mask.

    For several tokens, behind which there may be padding as well, the 2-D mask itself, bool (batch, slots).
    None if there is nothing to mask but the future. This is all that DCA layers need, where "sdpa" and "eager" would
    build (batch, 1, seqlen_q, slots): 256 MiB and 1 GiB at 16k. Masks other than causal ones (sliding windows,
    packing) are built as for "sdpa".

    Raises:
        ValueError: for one token's mask with holes; other masks are looked through by the layers.
    """
    if mask_function is not causal_mask_function:
        return sdpa_mask(mask_function=mask_function, **kwargs)
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return mask
    mask = _slots_of_call(mask.bool(), kwargs.get("q_offset", 0), kwargs.get("q_length", 0))
    if _may_read(mask) and mask.all():
        return None
    # Zeros as well: with None, padding would be looked for in position_ids, which are arbitrary in trailing padding.
    return _leading_false(mask) if kwargs.get("q_length") == 1 else mask


def attend_left_alone(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """transformers' attention interface for ``attn_implementation="dca"``: layers that are no DCA layers run "sdpa".

    Raises:
        ValueError: for a padded batch, whose mask such a layer cannot read.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() != 4:
        raise ValueError(
            f"attn_implementation={ATTN_IMPLEMENTATION!r} is for DCA layers; call dca_ext.replace_attention(model), or "
            f"model.set_attn_implementation('sdpa') for the {type(module).__name__} of this model"
        )
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


AttentionMaskInterface.register(ATTN_IMPLEMENTATION, leftpad_mask)
AttentionInterface.register(ATTN_IMPLEMENTATION, attend_left_alone)


# --- Reading masks and positions -------------------------------------------------------------------------------------


def _may_read(tensor: Tensor) -> bool:
    """Whether values may decide the control flow: they are on the host, or the user asked for checks."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        return False
    return tensor.device.type == "cpu" or os.environ.get("DCA_CHECK", "0") == "1"


def _check_shape(name: str, tensor: Tensor, dims: tuple[int, ...], batch: int) -> None:
    if tensor.dim() not in dims or tensor.shape[0] not in (1, batch):
        allowed = " or ".join(f"{d}-D" for d in dims if d != 1)
        raise ValueError(f"{name} must be {allowed} with {batch} rows, or one; got shape {tuple(tensor.shape)}")


def _padding_from_mask(attention_mask: Any, before: int | Tensor, batch: int, seqlen: int) -> Tensor:
    """Left padding that a mask shows: int32 (batch or 1,)."""
    if not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"attention_mask must be None or a 2-D or 4-D tensor; got {type(attention_mask).__name__}: "
            "flex_attention is not supported, use attn_implementation='sdpa' or 'dca'"
        )
    _check_shape("attention_mask", attention_mask, (1, 2, 4), batch)
    if attention_mask.dim() == 1:
        return attention_mask.to(torch.int32)
    if attention_mask.dim() == 4 and attention_mask.shape[2] != seqlen:
        raise ValueError(
            f"a 4-D attention_mask must have a row for each of the {seqlen} new tokens; got {attention_mask.shape[2]}"
        )
    leftpad = _leading_false(_visible_slots(attention_mask, before, seqlen))
    if isinstance(before, Tensor):
        # A static cache's mask has a column for every slot; where no token came yet, none of them is set.
        leftpad = leftpad.clamp(max=before + seqlen).to(torch.int32)
    return leftpad


def _visible_slots(mask: Tensor, before: int | Tensor, seqlen: int) -> Tensor:
    """The slots of the tokens that a 2-D or 4-D mask shows: bool (batch or 1, slots)."""
    return _slots_of_call(mask.bool() if mask.dim() == 2 else _visible_in_last_row(mask), before, seqlen)


def _visible_in_last_row(mask: Tensor) -> Tensor:
    """The slots that the last query of a 4-D mask sees: bool (batch or 1, slots). One head speaks for all."""
    row = mask[:, 0, -1]
    if row.dtype == torch.bool:
        return row
    if not row.is_floating_point():
        raise ValueError(f"a 4-D attention_mask must be bool or floating point; got {row.dtype}")
    if _may_read(row) and ((row != 0) & (row > _MASKED_AT_MOST)).any():
        raise ValueError(
            f"attention_mask must hold 0 or values of at most {_MASKED_AT_MOST:g}; additive biases do not go with DCA"
        )
    return row == 0


def _slots_of_call(visible: Tensor, before: int | Tensor, seqlen: int) -> Tensor:
    """The columns of ``visible`` (rows, slots) up to the last token of the call, where that is known."""
    if isinstance(before, Tensor):
        return visible
    if visible.shape[1] < before + seqlen:
        raise ValueError(
            f"attention_mask must cover the {before} cached tokens and the {seqlen} new ones; "
            f"got {visible.shape[1]} columns"
        )
    return visible[:, : before + seqlen]


def _leading_false(visible: Tensor) -> Tensor:
    """False entries in front of the first True of each row of ``visible`` (rows, slots): int32 (rows,)."""
    if _may_read(visible):
        stretches = visible[:, :1].sum(dim=1) + (visible[:, 1:] & ~visible[:, :-1]).sum(dim=1)
        if (stretches > 1).any():
            raise ValueError(
                "attention_mask must be zero only before the first and after the last token of a sequence; "
                f"row {int(stretches.argmax())} has a hole"
            )
    return (visible.cumsum(dim=1) == 0).sum(dim=1, dtype=torch.int32)


def _padding_from_positions(position_ids: Tensor, before: int | Tensor, seqlen: int) -> Tensor | None:
    """The padding that puts the last position of each row into the last slot: int32 (batch or 1,), or None."""
    readable = _may_read(position_ids)
    if position_ids.shape[1] == 0 or (not readable and position_ids.shape[0] == 1):
        return None
    # A row that counts up to less than 0 is padding all through.
    leftpad = (before + seqlen - 1 - position_ids[:, -1]).clamp(max=before + seqlen).to(torch.int32)
    if readable and (leftpad < 0).any():
        raise ValueError(
            f"position_ids must end at or below the last slot, {int(before) + seqlen - 1}; "
            f"got {int(position_ids[:, -1].max())}"
        )
    return leftpad


def _require_causal(mask: Tensor, leftpad: Tensor, before: int | Tensor, seqlen: int) -> None:
    """Refuses a 4-D mask that is not the causal one of the sequences that its last row shows."""
    if isinstance(before, Tensor) or mask.numel() == 0 or not _may_read(mask):
        return
    # Tensors of inference mode do not tell whether they were written to since.
    found = None if mask.is_inference() else (mask._version, before)
    if found is not None and _FOUND_CAUSAL.get(mask) == found:
        return
    # An expanded dimension of heads holds one mask many times.
    seen = (mask if mask.stride(1) else mask[:, :1])[..., : before + seqlen]
    rows = _rows_not_causal(seen if seen.dtype == torch.bool else seen == 0, leftpad.long()[:, None, None], before)
    if rows.any():
        b, row = rows.nonzero()[0].tolist()
        raise ValueError(
            "a 4-D attention_mask must be causal from the first token of a sequence to its last; "
            f"got another row {row} for sequence {b}: Dual Chunk Attention has no sliding windows and no bidirectional "
            "prefixes, and takes packed sequences by cu_seq_lens_q"
        )
    if found is not None:
        _FOUND_CAUSAL[mask] = found


def _rows_not_causal(seen: Tensor, leftpad: Tensor, before: int) -> Tensor:
    """Which rows of ``seen`` (batch, heads, seqlen, slots) are wrong: bool (batch, seqlen). Those of tokens must see
    the sequence up to themselves. Those in front, leftpad (batch, 1, 1), may see anything but a sequence of their own:
    two slots or more and nothing behind themselves."""
    slots = torch.arange(seen.shape[-1], device=seen.device)
    own = slots[before:]
    end = (seen[:, 0, -1:] * (slots + 1)).amax(dim=-1)
    of_token = (own >= leftpad[:, 0]) & (own < end)
    causal = (slots >= leftpad) & (slots <= own[:, None])
    wrong = of_token & (seen != causal[:, None]).any(dim=-1).any(dim=1)
    front = seen[:, :, : max(int(leftpad.max()) - before, 0)]
    own = own[: front.shape[2]]
    other = (front.sum(dim=-1) > 1) & ~(front & (slots > own[:, None])).any(dim=-1) & (own < leftpad)
    wrong[:, : front.shape[2]] |= other.any(dim=1)
    return wrong


def _require_one_sequence_per_row(
    position_ids: Tensor, leftpad: Tensor | None, before: int | Tensor, *, masked: bool
) -> None:
    """Refuses rows that hold more than one sequence: a second stretch of positions that counts up, or a first one
    within what would be left padding. Padding has a constant position, or goes on counting to the first token.
    Without a mask there is no padding behind the last token either, so that all tokens count up."""
    steps = position_ids.diff(dim=1)
    counts_up = steps == 1
    stretches = counts_up[:, :1].sum(dim=1) + (counts_up[:, 1:] & ~counts_up[:, :-1]).sum(dim=1)
    restarts = stretches > 1
    if leftpad is not None:
        first_token = (leftpad - before)[:, None]
        behind = torch.arange(1, position_ids.shape[1], device=position_ids.device)
        counts_in_padding = (counts_up & (behind < first_token)).any(dim=1)
        leads_to_token = (counts_up & (behind == first_token)).any(dim=1)
        has_token = first_token[:, 0] < position_ids.shape[1]
        restarts = restarts | (counts_in_padding & ~leads_to_token & has_token)
        if not masked:
            # A constant row is a part of the padding.
            stops = (~counts_up & (behind > first_token)).any(dim=1) & (steps != 0).any(dim=1)
            restarts = restarts | stops
    if restarts.any():
        raise ValueError(
            f"position_ids must count up by one; those of row {int(restarts.int().argmax())} do not: "
            "for padding behind a sequence pass attention_mask, "
            "for packed sequences, whose positions restart, pass cu_seq_lens_q"
        )
