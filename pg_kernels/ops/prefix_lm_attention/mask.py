"""The mask contract in plain PyTorch, for the reference, for the CPU and for tests of whole masks."""

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
    """Return the mask [B, Sq, Skv] of bool: true where query i, at position q_starts + i, sees key j. Lengths are [B]."""
    device = prefix_lens.device
    key = torch.arange(kv_len, device=device)[None, None, :]
    position = q_starts[:, None, None] + torch.arange(q_len, device=device)[None, :, None]
    start, end, prefix_len = (t[:, None, None] for t in (kv_starts, kv_lens, prefix_lens))
    visible_by_position = torch.ones((), dtype=torch.bool, device=device)
    if causal:
        visible_by_position = key <= position
    if window is not None:
        visible_by_position = visible_by_position & (position - key < window)
    return (start <= key) & (key < end) & ((key - start < prefix_len) | visible_by_position)
