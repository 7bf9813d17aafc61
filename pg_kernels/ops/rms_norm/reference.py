"""rms_norm in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """Normalise rows [..., N] in fp32, `weight_offset + weight` included, with one downcast at the end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight_offset + weight.to(wide.dtype))).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """Normalise the rounded sum x + residual, and return it too; the result equals two separate ops."""
    total = x + residual
    return rms_norm(total, weight, eps, weight_offset), total
