"""Rotary embeddings as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pg_kernels.nn.configurations import is_gemma2
from pg_kernels.ops.apply_rotary import apply_rotary


class RotaryEmbedding(nn.Module):
    """`pg_kernels.apply_rotary` with its theta. It rotates queries and keys itself; no cosines and sines are passed around."""

    def __init__(self, theta: float = 10_000.0) -> None:
        super().__init__()
        self.theta = theta

    @classmethod
    def from_config(cls, config: Any) -> RotaryEmbedding:
        """Build it as transformers builds GemmaRotaryEmbedding. Raises ValueError for other models and scaled frequencies."""
        is_gemma2(config)
        parameters = config.rope_parameters
        if parameters["rope_type"] != "default":
            raise ValueError(f"config: rope_type is {parameters['rope_type']!r}, supported is 'default'")
        return cls(parameters["rope_theta"])

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q [B, H, S, D] and k [B, Hkv, S, D] by positions [S] or [B, S]."""
        return apply_rotary(q, k, positions, theta=self.theta)

    def extra_repr(self) -> str:
        return f"theta={self.theta}"
