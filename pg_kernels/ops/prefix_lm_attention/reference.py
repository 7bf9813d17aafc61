from __future__ import annotations

import torch
from torch import Tensor


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
    """Attention of q [B, H, Sq, D] over k, v [B, Hkv, Skv, D], all arithmetic in fp32; the four int32 [B] give the mask."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(wide)
    # Keys that are not valid may be memory that nobody has written: 0 · NaN must not reach the sums.
    key = torch.arange(k.shape[2], device=k.device)
    invalid = ((key < kv_starts[:, None]) | (key >= kv_lens[:, None]))[:, None, :, None]
    keys, values = (tensor.to(wide).masked_fill(invalid, 0.0) for tensor in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visible_keys(q.shape[2], k.shape[2], prefix_lens, kv_starts, kv_lens, q_starts, causal, window)
        visible = visible[:, None, None]
        # A finite fill, and zeros after the softmax: a row that sees nothing is 0 and has gradient 0, where −inf gives NaN.
        weights = scores.masked_fill(~visible, torch.finfo(wide).min).softmax(-1).masked_fill(~visible, 0.0)
        out = torch.einsum("bhgqk,bhkd->bhgqd", weights, values).flatten(1, 2)
    inside = (
        (kv_starts >= 0) & (kv_starts <= k.shape[2]) & (kv_lens >= 0) & (kv_lens <= k.shape[2]) & (prefix_lens >= 0)
    )
    return out.masked_fill(~inside[:, None, None, None], float("nan")).to(q.dtype)


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
    zeros = torch.zeros_like(lengths)
    out = prefix_lm_attention(q_rows, k_rows, v_rows, zeros + prefix_lens, zeros, lengths, zeros, *scores)
    token = torch.arange(tokens, device=q.device)
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    return out[sequence, :, token - starts[sequence]].transpose(0, 1)[None]


def visible_keys(
    q_len: int,
    kv_len: int,
    prefix_lens: Tensor,
    kv_starts: Tensor,
    kv_lens: Tensor,
    q_starts: Tensor,
    causal: bool,
    window: int | None,
) -> Tensor:
    """The mask contract itself: [B, Sq, Skv], true where query i (at position q_starts + i) sees key j."""
    device = prefix_lens.device
    key = torch.arange(kv_len, device=device)[None, None, :]
    position = q_starts[:, None, None] + torch.arange(q_len, device=device)[None, :, None]
    start, end, prefix = (t[:, None, None] for t in (kv_starts, kv_lens, prefix_lens))
    outside_prefix = torch.ones((), dtype=torch.bool, device=device)
    if causal:
        outside_prefix = key <= position
    if window is not None:
        outside_prefix = outside_prefix & (position - key < window)
    return (start <= key) & (key < end) & ((key - start < prefix) | outside_prefix)
