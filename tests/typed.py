"""Calls whose result types a type checker must know. mypy reads this file; nothing runs it."""

from __future__ import annotations

from torch import Tensor

from pg_kernels import layer_norm, rms_norm


def norms(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """rms_norm returns a tensor, and with a residual a pair."""
    return [rms_norm(x, weight, 1e-5), layer_norm(x, weight, bias), rms_norm(x, weight, residual=None)]


def norms_of_sums(x: Tensor, weight: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [rms_norm(x, weight, residual=x), layer_norm(x, weight, bias, 1e-5, residual=x)]


def either(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    return rms_norm(x, weight, weight_offset=0.0, residual=residual)
