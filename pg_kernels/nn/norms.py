"""The norms as modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pg_kernels.ops.layer_norm import layer_norm
from pg_kernels.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """`pg_kernels.rms_norm` with a weight [dim]. By default it is Gemma's, which adds 1 to the weight."""

    def __init__(self, dim: int, eps: float = 1e-6, *, weight_offset: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - weight_offset))
        self.eps = eps
        self.weight_offset = weight_offset

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x [..., dim]. With a residual of its shape return (y, x + residual)."""
        return rms_norm(x, self.weight, self.eps, weight_offset=self.weight_offset, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, weight_offset={self.weight_offset}"


class LayerNorm(nn.Module):
    """`pg_kernels.layer_norm` with the constructor of nn.LayerNorm, over the last dimension, with weight and bias.

    Raises ValueError for a shape of several dimensions.
    """

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(shape) != 1:
            raise ValueError(f"normalized_shape: expected one size, the last dimension's, got {list(shape)}")
        self.normalized_shape = shape
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x [..., N]. With a residual of its shape return (y, x + residual)."""
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def add_and_norm(norm: RMSNorm | LayerNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (norm(x + residual), x + residual) in one pass; without a residual (norm(x), x). Shapes [..., dim]."""
    if residual is None:
        return norm(x), x
    return norm(residual, residual=x)
