"""Translate transformers' masks to the lengths of `prefix_lm_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pg_kernels.integrations.transformers.versions import find
from pg_kernels.ops.prefix_lm_attention.mask import visible_keys

_HANDS_ON = frozenset(
    (
        *("gemma", "gemma2", "gemma3", "gemma3_text", "gemma4_text", "paligemma", "vaultgemma"),
        *("siglip", "siglip_text_model", "siglip_vision_model"),
        *("cohere2", "exaone4", "gpt2", "gpt_neox", "granite", "llama", "minimax", "mistral", "olmo2", "opt"),
        *("persimmon", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
    )
)
"""Model types that pass the mask to attention unchanged. Other models add to it, slice it, or read it."""
MASKS: Any = find("AttentionMaskInterface")
"""transformers' mask functions, by the name of the attention that uses them."""

_ARGUMENTS = frozenset(("attention_mask", "kv_offset", "q_offset"))


# Recognising the mask copies to the host once in a forward pass, which breaks a compiled graph.
@torch.compiler.disable
def lengths_mask(**options: Any) -> Tensor | None:
    """Return the mask for `attention`: lengths, int32 [B, parts, 4 + window, 1], or the dense mask if lengths cannot express it.

    The dense mask, bool [B, 1, Sq, Skv], is transformers' own for the same arguments. Lengths are derived from it, and used only
    if they describe exactly that mask. This takes a few bytes for each pair of query and key for a moment, once for all layers.
    Rows of padding tokens may differ: their outputs are undefined. Models outside _HANDS_ON get the additive float mask.

    Args:
        options: the arguments of a mask function of transformers' `AttentionMaskInterface`.
    """
    # transformers may return None instead of a mask, which would not tell which mask was meant.
    arguments = options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    if getattr(options.get("config"), "model_type", None) not in _HANDS_ON:
        return MASKS()["eager"](**arguments)
    dense: Any = MASKS()["sdpa"](**arguments)
    if not (options.keys() >= _ARGUMENTS and _is_dense(dense)):
        return dense
    attention_mask, q_offset, kv_offset = options["attention_mask"], options["q_offset"], options["kv_offset"]
    q_length, kv_length = dense.shape[2:]
    visible = dense[:, 0]
    if q_length == 1:  # decoding: any run of visible keys can be expressed as a prefix
        start, end = _span(visible[:, 0])
        run = torch.stack((end - start, start, end, torch.zeros_like(start)), 1).int()[:, None, :, None]
        return _adjacent(run) if bool((visible.sum(2)[:, 0] == end - start).all()) else dense
    queries = torch.arange(q_length, device=visible.device) + q_offset
    alike = (visible == visible[:, :1]).flatten(1).all(1)[:, None]
    rows = alike.expand(-1, q_length)
    if attention_mask is None:
        rows = torch.ones_like(rows)
    else:  # the mask may describe other tokens than the queries, such as an encoder's; its rows are then all alike
        about_them = queries[-1] + 1 == attention_mask.shape[1]
        rows = rows | ~about_them | attention_mask.bool()[:, queries.clamp(max=attention_mask.shape[1] - 1)]
    lengths = _lengths(visible & rows[..., None], rows, queries[0] - kv_offset, alike[:, 0])
    choices = [lengths[:, None, :, None]]
    if (window := options.get("local_size")) is not None:
        # The kernel's window never hides the prefix. transformers' window hides it from later tokens: this takes two parts.
        causal = lengths * lengths.new_tensor([0, 1, 1, 1])
        parts = torch.stack((lengths, causal), 1)[..., None]
        choices += [nn.functional.pad(part, (0, 0, 0, window)) for part in (parts[:, 1:], parts)]
    same = [(dense_mask(choice, q_length, kv_length) == dense) | ~rows[:, None, :, None] for choice in choices]
    fits = torch.stack([cells.all() for cells in same]).tolist()
    return _adjacent(choices[fits.index(True)]) if any(fits) else dense


def _is_dense(mask: Any) -> bool:
    """Return whether a mask is a non-empty bool [B, 1, Sq, Skv], the only kind that lengths can express."""
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.dim() == 4
        and mask.shape[1] == 1
        and mask.numel() > 0
    )


def _adjacent(mask: Tensor) -> Tensor:
    """Make each length contiguous over the examples, so that kernels need no copy."""
    return mask.movedim(0, -1).contiguous().movedim(-1, 0)


def _lengths(visible: Tensor, rows: Tensor, q_start: Tensor, alike: Tensor) -> Tensor:
    """Return the four `_LENGTHS`, int32 [B, 4], that may describe a mask, bool [B, Sq, Skv].

    `rows`, bool [B, Sq], are the rows that are not padding. `alike`, bool [B], says whether an example's rows are all the same.
    """
    start, end = _span(visible.any(1))
    first = rows.int().argmax(1)  # the first query that is not padding; the future keys that it sees are the prefix
    _, horizon = _span(visible[torch.arange(len(first), device=first.device), first])
    prefix = (horizon - start).where((horizon > q_start + first + 1) | alike, 0)
    return torch.stack((prefix, start, end, q_start.expand_as(start)), 1).int()


def _span(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the first true key of bool [B, Skv] and the index after the last one; 0 and 0 if there is none."""
    return seen.int().argmax(1), (seen * torch.arange(1, seen.shape[1] + 1, device=seen.device)).amax(1)


def dense_mask(mask: Tensor, q_len: int, kv_len: int) -> Tensor:
    """Return the dense mask, bool [B, 1, Sq, Skv], that the lengths of `lengths_mask` describe."""
    return by_parts(mask, q_len, lambda **part: visible_keys(q_len, kv_len, causal=True, **part)[:, None])


def by_parts(mask: Tensor, q_len: int, result: Callable[..., Tensor]) -> Tensor:
    """Compute `result` [B, H, Sq, N] for lengths of `lengths_mask`. The first of two parts is for queries in the prefix.

    The window is the tensor's size: the kernel needs an int, and reading one from a tensor would synchronise in each layer.
    """
    parts = [dict(zip(_LENGTHS, part[:, :4, 0].unbind(1), strict=True)) for part in mask.unbind(1)]
    results = [result(**part, window=mask.shape[2] - 4 or None) for part in parts]
    if len(parts) == 1:
        return results[0]
    positions = parts[0]["q_starts"][:, None] + torch.arange(q_len, device=mask.device)
    inside = positions < (parts[0]["kv_starts"] + parts[0]["prefix_lens"])[:, None]
    return torch.where(inside[:, None, :, None], results[0], results[1])


_LENGTHS = ("prefix_lens", "kv_starts", "kv_lens", "q_starts")
