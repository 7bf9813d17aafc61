"""Prefix-LM attention in plain PyTorch: its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pg_kernels.ops.prefix_lm_attention.mask import visible_keys


def prefix_lm_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_lens: Tensor,
    kv_starts: Tensor,
    kv_lens: Tensor,
    q_starts: Tensor,
    causal: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Compute attention of q [B, H, Sq, D] over k, v [B, Hkv, Skv, D] in fp32 (fp64 for fp64); lengths are int32 [B].

    NaN and infinity in a key or value that a query does not see reach neither the query's output nor gradients through it.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        rows = q.unflatten(1, (k.shape[1], group)).flatten(2, 3).to(wide)  # [B, Hkv, group · Sq, D]
        # [B, Hkv, group, Sq, Skv]
        scores = _DotTransposed.apply(rows, k.to(wide)).unflatten(2, (group, q.shape[2]))
        visible = visible_keys(q.shape[2], k.shape[2], prefix_lens, kv_starts, kv_lens, q_starts, causal, window)
        hidden = ~visible[:, None, None]
        if softcap is not None:
            scores = softcap * torch.tanh(scores.masked_fill(hidden, 0.0) * (scale / softcap))
        else:
            scores = scores * scale
        # The softmax of a row of −inf is NaN. A row that sees nothing must be 0 with zero gradient.
        sees_nothing = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden, float("-inf")).masked_fill(sees_nothing, 0.0)
        weights = scores.softmax(-1).masked_fill(hidden, 0.0)
        # 0 · NaN is NaN: multiply finite values only, and add infinity to the rows that see one. NaN counts as +inf and −inf.
        values = v.to(wide)
        out = torch.einsum("bhgqk,bhkd->bhgqd", weights, _finite(values))
        infinite = torch.stack((values == float("inf"), values == float("-inf"))) | values.isnan()
        sees_infinite = (visible[:, None].to(wide) @ infinite.to(wide) > 0)[:, :, :, None]
        plus_inf, minus_inf = torch.where(sees_infinite, float("inf"), 0.0)
        out = (out + plus_inf - minus_inf).flatten(1, 2)
    is_valid = (
        (kv_starts >= 0) & (kv_starts <= k.shape[2]) & (kv_lens >= 0) & (kv_lens <= k.shape[2]) & (prefix_lens >= 0)
    )
    return out.masked_fill(~is_valid[:, None, None, None], float("nan")).to(q.dtype)


class _DotTransposed(torch.autograd.Function):
    """q · kᵀ, whose gradients take NaN and infinity in q and k as 0.

    A hidden pair of query and key has gradient 0, and 0 · NaN is NaN. The gradient of a visible pair with NaN is NaN itself.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        return grad @ _finite(k), grad.mT @ _finite(q)

    @staticmethod
    def jvp(ctx: Any, q_tangent: Tensor, k_tangent: Tensor) -> Tensor:
        q, k = ctx.saved_tensors
        return q_tangent @ k.mT + q @ k_tangent.mT


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(~x.isfinite(), 0.0)


def prefix_lm_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prefix_lens: Tensor | int,
    scores: tuple[bool, float, float | None, int | None],
) -> Tensor:
    """Compute attention of packed sequences q [1, H, T, D]: pad them to [B, H, max_seqlen, D], attend, and pack the results.

    `scores` are causal, scale, softcap and window.
    """
    starts, num_tokens = cu_seqlens[:-1].long(), q.shape[2]
    seqlens = cu_seqlens.diff().to(torch.int32)
    index = torch.arange(max_seqlen, device=q.device)
    padded_tokens = (starts[:, None] + index).clamp(max=max(num_tokens - 1, 0))  # [B, max_seqlen]
    q_padded, k_padded, v_padded = (tensor[0][:, padded_tokens].transpose(0, 1) for tensor in (q, k, v))
    # The padding holds queries of the next sequence. If they are not finite, their gradients through these keys are 0 · NaN.
    q_padded = q_padded.masked_fill((index >= seqlens[:, None])[:, None, :, None], 0.0)
    zeros = torch.zeros_like(seqlens)
    # Call the op, not the function above: torch.compile does not trace autograd functions that have forward derivatives.
    attend = torch.ops.pg_kernels.prefix_lm_attention
    out = attend(q_padded, k_padded, v_padded, zeros + prefix_lens, zeros, seqlens, zeros, *scores)
    token = torch.arange(num_tokens, device=q.device)
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    return out[sequence, :, token - starts[sequence]].transpose(0, 1)[None]
