"""The mask contract of `prefix_lm_attention` as a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor


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
