"""Checks of the public functions' arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from pg_kernels.ops._common import checks

POSITION_LIMIT = 2**30
"""Beyond every key. Its sum with an index of a key still fits into int32."""

MaskAndScores = tuple[bool, float, float | None, int | None]
"""causal, scale, softcap, window."""


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_len: str,
    kv_len: int | str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> bool:
    """Validate q [B, H, Sq, D], k and v [B, Hkv, Skv, D] and their scales. Return True if k and v are int8."""
    checks.check_float(q=q)
    checks.check_tensor(k=k, v=v)
    is_int8 = k.dtype == torch.int8 and v.dtype == torch.int8
    if not is_int8:
        checks.check_float(k=k, v=v)
    checks.check_shape("q", q, ["B", "H", q_len, "D"])
    batch, heads, _, head_dim = q.shape
    checks.check_shape("k", k, [batch, "Hkv", kv_len, head_dim], " (B and D as in q)")
    checks.check_shape("v", v, list(k.shape), " (k's)")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k: q's {heads} heads are not a multiple of {k.shape[1]} key-value heads")
    if head_dim == 0:
        raise ValueError("q: the head dimension is 0")
    checks.check_device(q=q, k=k, v=v)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != is_int8:
            raise TypeError(f"{name}: int8 keys and values come with both their scales, others with none")
        if scale is not None:
            checks.check_shape(name, scale, list(k.shape[:3]), " (k's without D)")
            checks.check_device(q=q, **{name: scale})
            if scale.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32, got {scale.dtype}")
    if is_int8 and torch.is_grad_enabled() and q.requires_grad:
        raise RuntimeError("prefix_lm_attention: there are no gradients with int8 keys and values; use torch.no_grad()")
    return is_int8


def checked_scores(
    q: Tensor, causal: bool, scale: float | None, softcap: float | None, window: int | None
) -> MaskAndScores:
    """Validate the options of mask and scores. Return them with the default scale."""
    checks.check_bool(causal=causal)
    checks.check_positive(scale=scale, softcap=softcap, window=window)
    checks.check_int(window=window)
    # Positions are below POSITION_LIMIT: a longer window hides nothing.
    window = window and min(window, 2 * POSITION_LIMIT - 1)
    return causal, q.shape[3] ** -0.5 if scale is None else scale, softcap, window


def checked_max_seqlen(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> int:
    """Validate the offsets of packed sequences. Return max_seqlen, but at most the number of tokens."""
    checks.check_int(max_seqlen=max_seqlen)
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen: expected 0 or more, got {max_seqlen}")
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens: expected at least one number, got none")
    if checks.values_are_free(cu_seqlens):
        seqlens = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or bool((seqlens < 0).any()):
            raise ValueError(
                f"cu_seqlens: expected numbers that rise from 0 to T = {num_tokens}, got {cu_seqlens.tolist()}"
            )
        if len(seqlens) and int(seqlens.max()) > max_seqlen:
            raise ValueError(f"max_seqlen: got {max_seqlen}, but a sequence has {int(seqlens.max())} tokens")
    return min(max_seqlen, num_tokens)


def checked_length(
    name: str, value: Tensor | int | None, default: int, q: Tensor, *, lower: int | None, upper: int | None
) -> Tensor | int:
    """Validate a length: int32 or int64 [B], or one int for all B = len(q) examples. Return an int or int32 [B]."""
    if not isinstance(value, Tensor):
        length = default if value is None else value
        if not isinstance(length, int | torch.SymInt) or isinstance(length, bool):
            raise TypeError(f"{name}: expected an int or an int32 tensor, got {type(length).__name__}")
        _check_range(name, length, length, lower, upper)
        return min(max(length, -POSITION_LIMIT), POSITION_LIMIT)
    checks.check_integer(**{name: value})
    checks.check_shape(name, value, [q.shape[0]], " (B)")
    checks.check_device(q=q, **{name: value})
    if checks.values_are_free(value) and value.numel():
        lengths = value.tolist()  # a fraction of the time of two reductions
        _check_range(name, min(lengths), max(lengths), lower, upper)
    return value if value.dtype == torch.int32 else value.clamp(-POSITION_LIMIT, POSITION_LIMIT).to(torch.int32)


def _check_range(name: str, smallest: int, largest: int, lower: int | None, upper: int | None) -> None:
    if (lower is not None and smallest < lower) or (upper is not None and largest > upper):
        allowed = f"at least {lower}" if upper is None else f"between {lower} and Skv = {upper}"
        given = str(smallest) if smallest == largest else f"values from {smallest} to {largest}"
        raise ValueError(f"{name}: got {given}, expected {allowed}")
