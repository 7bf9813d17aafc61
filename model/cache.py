"""The static key-value cache, and the lengths that say which of its keys are valid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TextConfig


@dataclass(frozen=True)
class AttentionLengths:
    """The lengths of `prefix_lm_attention`'s mask contract, int32 [B] each."""

    prefix_lens: Tensor
    kv_starts: Tensor
    kv_lens: Tensor
    q_starts: Tensor


class KVCache:
    """Keys and values of every layer in buffers of fixed capacity, [layers, B, Hkv, capacity, D] each."""

    def __init__(
        self, config: TextConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch with its rows `rows` (int64 [B']), which may repeat."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)
