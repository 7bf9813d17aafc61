"""Attention by `prefix_lm_attention`, as transformers calls it."""

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
"""Options by which some models change what attention means: sinks, paged caches, sparse keys."""

_WITHOUT_EFFECT = frozenset(
    (
        *(
            "cache_position",
            "position_ids",
            "seq_idx",
            "sliding_window",
            "token_type_ids",
            "use_cache",
        ),  # the mask has them
        *("cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q"),
        *("deterministic", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        *("ignore_index", "labels", "num_items_in_batch", "shift_labels"),  # a loss's, on their way through the model
    )
)
"""Options that change nothing here. With one that is in no list, attention is transformers' own."""

INTERFACE: Any = find("AttentionInterface")
sdpa_attention_forward: Any = INTERFACE and INTERFACE().get("sdpa")
eager_attention_forward: Any = find("models.gemma2.modeling_gemma2.eager_attention_forward")
"""Gemma 2's, which has a softcap."""


def missing_reason() -> str | None:
    """Return what transformers lacks for an attention of our own, or None if it has all."""
    needed = {
        "AttentionInterface": INTERFACE,
        "AttentionMaskInterface": MASKS,
        "sdpa_attention": sdpa_attention_forward,
    }
    needed |= {f"{name}_mask": MASKS and MASKS().get(name) for name in ("sdpa", "eager")}
    missing = [name for name, found in needed.items() if found is None]
    return f"transformers has no {', '.join(missing)} any more" if missing else None


def register() -> None:
    """Make `attn_implementation="pg_kernels"` known to transformers, for every model with attention by name; again does no harm.

    A mask that `prefix_lm_attention` can express (a bidirectional prefix, causal text after it, padding before or after both, a
    sliding window) becomes a few lengths in the models that are known to hand it on: Gemma's, PaliGemma, SigLIP, Llama and their
    like. With any other mask or model, with dropout, and with what else the op does not have, attention is PyTorch's under the
    dense mask, or transformers' eager one where there is a softcap.

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
    """Attend with query [B, H, Sq, D] and key and value [B, Hkv, Skv, D], as transformers asks for it; [B, Sq, H, D]."""
    for option in _REFUSED if softcap is None else (*_REFUSED, "position_bias"):
        if options.get(option) is not None:
            raise ValueError(f"{option}: not supported by attn_implementation={NAME!r}")
    compact = attention_mask if attention_mask is not None and attention_mask.dtype == torch.int32 else None
    if compact is not None and not _is_whole(compact):
        raise ValueError(f"{type(module).__name__} has changed the mask; use another attn_implementation for it")
    # As for transformers' SDPA: without a mask one query sees everything, and several begin at the first key.
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
    """Whether int32 is what `lengths_mask` gave: some models work on a mask as if it were dense, or slice it along the keys."""
    return mask.dim() == 4 and mask.shape[1] <= 2 and mask.shape[2] >= 4 and mask.shape[3] == 1


def _bias(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """A dense mask as transformers' eager attention wants it: added to the scores."""
    if mask is None and causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=query.dtype, device=query.device).where(mask, torch.finfo(query.dtype).min)
