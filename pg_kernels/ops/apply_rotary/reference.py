"""apply_rotary and apply_rotary_to_cache in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (i, i + D/2) of every head by position · theta^(−2i/D), with angles and products in fp32.

    q [B, H, S, D], k [B, Hkv, S, D], positions [B or 1, S].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    exponents = torch.arange(0, q.shape[-1], 2, device=q.device, dtype=wide) / q.shape[-1]
    angles = positions[:, None, :, None].to(wide) * (1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def apply_rotary_to_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    theta: float,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_positions: Tensor,
) -> Tensor:
    """Rotate q and k; store k and v [B, Hkv, S, D] at cache_positions [B or 1, S] of the caches [B, Hkv, capacity, D]."""
    q, k = apply_rotary(q, k, positions, theta)
    batch = torch.arange(k.shape[0], device=k.device)[:, None]
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache[batch, :, cache_positions.long()] = new.transpose(1, 2).to(cache.dtype)
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
