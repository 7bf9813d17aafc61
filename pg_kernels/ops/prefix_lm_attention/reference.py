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
    """Attention of q [B, H, Sq, D] over k, v [B, Hkv, Skv, D], all arithmetic in fp32; the four int32 [B] give the mask.

    What a query does not see reaches neither its output nor any gradient through it, NaN and infinity included.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        rows = q.unflatten(1, (k.shape[1], group)).flatten(2, 3).to(wide)  # [B, Hkv, G · Sq, D]
        scores = _Product.apply(rows, k.to(wide)).unflatten(2, (group, q.shape[2]))
        visible = visible_keys(q.shape[2], k.shape[2], prefix_lens, kv_starts, kv_lens, q_starts, causal, window)
        hidden = ~visible[:, None, None]
        if softcap is not None:
            scores = softcap * torch.tanh(scores.masked_fill(hidden, 0.0) * (scale / softcap))
        else:
            scores = scores * scale
        # A row that sees nothing is 0 and has gradient 0: the softmax of nothing but −inf is NaN.
        blind = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden, float("-inf")).masked_fill(blind, 0.0)
        weights = scores.softmax(-1).masked_fill(hidden, 0.0)
        # 0 · NaN is NaN, so values that are not finite are added where they are seen. NaN is both infinities.
        values = v.to(wide)
        out = torch.einsum("bhgqk,bhkd->bhgqd", weights, _finite(values))
        infinite = torch.stack((values == float("inf"), values == float("-inf"))) | values.isnan()
        seen = (visible[:, None].to(wide) @ infinite.to(wide) > 0)[:, :, :, None]
        up, down = torch.where(seen, float("inf"), 0.0)
        out = (out + up - down).flatten(1, 2)
    inside = (
        (kv_starts >= 0) & (kv_starts <= k.shape[2]) & (kv_lens >= 0) & (kv_lens <= k.shape[2]) & (prefix_lens >= 0)
    )
    return out.masked_fill(~inside[:, None, None, None], float("nan")).to(q.dtype)


class _Product(torch.autograd.Function):
    """q · kᵀ, whose gradients take what is not finite in q and k as 0.

    A pair that a mask hides has gradient 0, and 0 · NaN is NaN. A pair in sight brings NaN into the gradient by itself.
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
    """The same for sequences laid end to end in q [1, H, T, D]: padded, attended to, and taken apart again."""
    starts, tokens = cu_seqlens[:-1].long(), q.shape[2]
    lengths = cu_seqlens.diff().to(torch.int32)
    padded = (starts[:, None] + torch.arange(max_seqlen, device=q.device)).clamp(max=max(tokens - 1, 0))
    q_rows, k_rows, v_rows = (tensor[0][:, padded].transpose(0, 1) for tensor in (q, k, v))
    # Padding is another sequence's queries, whose gradients through these keys are 0 · NaN if they are not finite.
    q_rows = q_rows.masked_fill((torch.arange(max_seqlen, device=q.device) >= lengths[:, None])[:, None, :, None], 0.0)
    zeros = torch.zeros_like(lengths)
    # The op, not the function: torch.compile does not trace autograd functions that have forward derivatives.
    attend = torch.ops.pg_kernels.prefix_lm_attention
    out = attend(q_rows, k_rows, v_rows, zeros + prefix_lens, zeros, lengths, zeros, *scores)
    token = torch.arange(tokens, device=q.device)
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    return out[sequence, :, token - starts[sequence]].transpose(0, 1)[None]
