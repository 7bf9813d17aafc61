"""Checks of the attention functions' arguments: each raises before a kernel runs and names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from pg_kernels.ops._common import checks

FAR = 2**30
"""Beyond every key; sums of it and a key's index still fit into int32."""


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_len: str,
    kv_len: int | str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> bool:
    """Check q [B, H, Sq, D] against k and v [B, Hkv, Skv, D] and their scales; tell whether they are int8."""
    checks.check_float(q=q)
    checks.check_tensor(k=k, v=v)
    quantised = k.dtype == torch.int8 and v.dtype == torch.int8
    if not quantised:
        checks.check_float(k=k, v=v)
    checks.check_shape("q", q, ["B", "H", q_len, "D"])
    batch, heads, _, dim = q.shape
    checks.check_shape("k", k, [batch, "Hkv", kv_len, dim], " (B and D as in q)")
    checks.check_shape("v", v, list(k.shape), " (k's)")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k: q's {heads} heads are not a multiple of {k.shape[1]} key-value heads")
    if dim == 0:
        raise ValueError("q: the head dimension is 0")
    checks.check_device(q=q, k=k, v=v)
    for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (given is not None) != quantised:
            raise TypeError(f"{name}: int8 keys and values come with both their scales, others with none")
        if given is not None:
            checks.check_shape(name, given, list(k.shape[:3]), " (k's without D)")
            checks.check_device(q=q, **{name: given})
            if given.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32, got {given.dtype}")
    if quantised and torch.is_grad_enabled() and q.requires_grad:
        raise RuntimeError("prefix_lm_attention: there are no gradients with int8 keys and values; use torch.no_grad()")
    return quantised


def checked_scores(
    q: Tensor, causal: bool, scale: float | None, softcap: float | None, window: int | None
) -> tuple[bool, float, float | None, int | None]:
    checks.check_bool(causal=causal)
    checks.check_positive(scale=scale, softcap=softcap, window=window)
    checks.check_int(window=window)
    # A longer window hides nothing: positions are below FAR.
    return causal, q.shape[3] ** -0.5 if scale is None else scale, softcap, window and min(window, 2 * FAR - 1)


def checked_longest(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> int:
    """Check the offsets, and give max_seqlen, but not more than there are tokens."""
    checks.check_int(max_seqlen=max_seqlen)
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen: expected 0 or more, got {max_seqlen}")
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens: expected at least one number, got none")
    if checks.values_are_free(cu_seqlens):
        steps = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens or bool((steps < 0).any()):
            raise ValueError(
                f"cu_seqlens: expected numbers that rise from 0 to T = {tokens}, got {cu_seqlens.tolist()}"
            )
        if len(steps) and int(steps.max()) > max_seqlen:
            raise ValueError(f"max_seqlen: got {max_seqlen}, but a sequence has {int(steps.max())} tokens")
    return min(max_seqlen, tokens)


def per_example(
    name: str, value: Tensor | int | None, default: int, q: Tensor, *, lower: int | None, upper: int | None
) -> Tensor | int:
    """Check a length: int32 [B], or one for all examples."""
    if not isinstance(value, Tensor):
        number = default if value is None else value
        if not isinstance(number, int | torch.SymInt) or isinstance(number, bool):
            raise TypeError(f"{name}: expected an int or an int32 tensor, got {type(number).__name__}")
        _check_range(name, number, number, lower, upper)
        return min(max(number, -FAR), FAR)
    checks.check_integer(**{name: value})
    checks.check_shape(name, value, [q.shape[0]], " (B)")
    checks.check_device(q=q, **{name: value})
    if checks.values_are_free(value) and value.numel():
        numbers = value.tolist()  # a fraction of what two reductions take
        _check_range(name, min(numbers), max(numbers), lower, upper)
    return value if value.dtype == torch.int32 else value.clamp(-FAR, FAR).to(torch.int32)


def _check_range(name: str, smallest: int, largest: int, lower: int | None, upper: int | None) -> None:
    if (lower is not None and smallest < lower) or (upper is not None and largest > upper):
        allowed = f"at least {lower}" if upper is None else f"between {lower} and Skv = {upper}"
        given = str(smallest) if smallest == largest else f"values from {smallest} to {largest}"
        raise ValueError(f"{name}: got {given}, expected {allowed}")
