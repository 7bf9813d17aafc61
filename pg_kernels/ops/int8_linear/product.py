"""The description of a product with int8 weights, which every backend's `multiply` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int8Product:
    """What multiplies x [M, K]: x · (weight · scale)ᵀ + bias for each of some int8 weights [N, K]."""

    weights: Sequence[Tensor]
    """Each in the backend's layout: int8 [N, K], or the extension's, uint8 and flat."""
    scales: Sequence[Tensor]
    """Of each weight, fp32: [N, groups], or flat beside the extension's layout."""
    biases: Sequence[Tensor | None]
    """Of each weight: [N] or None."""
    sizes: Sequence[int]
    """N of each weight."""
    group_size: int
    """Columns that share a scale, in every weight."""
    int8_activations: bool
    """Quantise each row of x to int8 first (W8A8)."""
    out_dtype: torch.dtype
    geglu: bool = False
    """Of two weights: return the one output gelu_tanh(x · weights[0]ᵀ) · (x · weights[1]ᵀ)."""

    def empty_outputs(self, x: Tensor) -> list[Tensor]:
        """Allocate the outputs for x [M, K]: [M, N] for each weight, only the first with `geglu`."""
        sizes = self.sizes[:1] if self.geglu else self.sizes
        return [x.new_empty(len(x), n, dtype=self.out_dtype) for n in sizes]

    def of_weights(self, part: slice) -> Int8Product:
        """Return the product with some of the weights only."""
        return replace(
            self,
            weights=self.weights[part],
            scales=self.scales[part],
            biases=self.biases[part],
            sizes=self.sizes[part],
        )
