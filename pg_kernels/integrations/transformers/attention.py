"""`prefix_lm_attention` with the signature of transformers' attention functions."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from pg_kernels import prefix_lm_attention
from pg_kernels.integrations.transformers.masks import MASKS, by_parts, dense_mask, lengths_mask
from pg_kernels.integrations.transformers.versions import find

NAME = "pg_kernels"
"""The name of this attention in transformers."""

_REFUSED = ("s_aux", "sinks", "cache", "indices", "block_indices")
"""Options that change what attention computes: sinks, paged caches, sparse keys."""

_WITHOUT_EFFECT = frozenset(
    (
        *(
            "cache_position",
            "position_ids",
            "seq_idx",
            "sliding_window",
            "token_type_ids",
            "use_cache",
        ),  # contained in the mask
        *("cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q"),
        *("deterministic", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        *("ignore_index", "labels", "num_items_in_batch", "shift_labels"),  # the loss's, which pass through the model
    )
)
"""Options without effect on attention. With any option in neither list, transformers' own attention runs."""

INTERFACE: Any = find("AttentionInterface")
sdpa_attention_forward: Any = INTERFACE and INTERFACE().get("sdpa")
eager_attention_forward: Any = find("models.gemma2.modeling_gemma2.eager_attention_forward")
"""Gemma 2's eager attention, which supports a softcap."""


def missing_reason() -> str | None:
    """Return what transformers lacks for registering an attention, or None if it lacks nothing."""
    needed = {
        "AttentionInterface": INTERFACE,
        "AttentionMaskInterface": MASKS,
        "sdpa_attention": sdpa_attention_forward,
    }
    needed |= {f"{name}_mask": MASKS and MASKS().get(name) for name in ("sdpa", "eager")}
    missing = [name for name, found in needed.items() if found is None]
    return f"transformers has no {', '.join(missing)} any more" if missing else None


def register() -> None:
    """Register `attn_implementation="pg_kernels"` with transformers, for every model that selects attention by name.

    A mask that `prefix_lm_attention` can express (a bidirectional prefix, causal text after it, padding before or after both, a
    sliding window) becomes a few lengths, in models that pass the mask on unchanged: Gemma, PaliGemma, SigLIP, Llama and similar
    ones. For other masks and models, and for dropout and other unsupported options, PyTorch's SDPA runs with the dense mask, or
    transformers' eager attention if there is a softcap. Registering again has no effect.

    Raises ImportError for a version of transformers without `AttentionInterface` and `AttentionMaskInterface`.
    """
    if reason := missing_reason():
        raise ImportError(f"register: {reason}")
    INTERFACE.register(NAME, attention)
    MASKS.register(NAME, lengths_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend with query [B, H, Sq, D] to key and value [B, Hkv, Skv, D]. Return the output [B, Sq, H, D] and None."""
    for option in _REFUSED if softcap is None else (*_REFUSED, "position_bias"):
        if options.get(option) is not None:
            raise ValueError(f"{option}: not supported by attn_implementation={NAME!r}")
    compact = attention_mask if attention_mask is not None and attention_mask.dtype == torch.int32 else None
    if compact is not None and not _is_whole(compact):
        raise ValueError(f"{type(module).__name__} has changed the mask; use another attn_implementation for it")
    # As in transformers' SDPA: without a mask, a single query sees all keys, and several queries start at the first key.
    causal = query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    unknown = any(value is not None for option, value in options.items() if option not in _WITHOUT_EFFECT)
    if dropout or unknown or key.shape != value.shape or len(query) != len(key):
        if compact is not None:
            attention_mask = dense_mask(compact, query.shape[2], key.shape[2])
    elif compact is not None or attention_mask is None:
        attend = functools.partial(prefix_lm_attention, query, key, value, scale=scaling, softcap=softcap)
        out = attend(q_starts=0, causal=causal) if compact is None else by_parts(compact, query.shape[2], attend)
        return out.transpose(1, 2).contiguous(), None
    if softcap is None:
        arguments = (module, query, key, value, attention_mask)
        return sdpa_attention_forward(*arguments, dropout=dropout, scaling=scaling, is_causal=is_causal, **options)
    if eager_attention_forward is None:
        raise ValueError(f"softcap: not supported by attn_implementation={NAME!r} under this mask, nor with dropout")
    bias: Any = _bias(attention_mask, query, key, causal)
    return eager_attention_forward(module, query, key, value, bias, dropout=dropout, scaling=scaling, softcap=softcap)


def _is_whole(mask: Tensor) -> bool:
    """Return whether an int32 mask is unchanged since `lengths_mask`: some models slice or edit a mask as if it were dense."""
    return mask.dim() == 4 and mask.shape[1] <= 2 and mask.shape[2] >= 4 and mask.shape[3] == 1


def _bias(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """Return a dense mask as the additive bias of transformers' eager attention."""
    if mask is None and causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=query.dtype, device=query.device).where(mask, torch.finfo(query.dtype).min)
