"""Tensors as rows that kernels can address."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A tensor [..., N] as `count` rows. Row r starts at element (r // inner) · outer_stride + (r % inner) · inner_stride."""

    tensor: Tensor
    count: int
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def strides(self) -> tuple[int, int, int]:
        """The strides that `jit_functions.row_start` takes."""
        return self.inner, self.outer_stride, self.inner_stride


def rows_of(x: Tensor) -> Rows:
    """View x as rows of adjacent elements. Copy it only if its layout needs more than two strides."""
    count = math.prod(x.shape[:-1])
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        dims = _merge([(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1])
        if len(dims) <= 2:
            (_, outer_stride), (inner, inner_stride) = dims + [(1, 0)] * (2 - len(dims))
            return Rows(x, count, inner, outer_stride, inner_stride)
    return Rows(x.contiguous(), count, 1, x.shape[-1], 0)


def _merge(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join neighbouring dimensions (size, stride) that one stride describes."""
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged
