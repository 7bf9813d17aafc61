"""Argument checks of apply_rotary and apply_rotary_to_cache, which the C++ backend repeats."""

from __future__ import annotations

from torch import Tensor

from pg_kernels.ops._common import checks


def check_rotary(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Check the arguments of both functions. Return the positions as [B or 1, S]."""
    checks.check_float(q=q, k=k)
    checks.check_integer(positions=positions)
    checks.check_shape("q", q, ["B", "H", "S", "D"])
    batch, _, length, dim = q.shape
    if dim % 2 or dim == 0:
        raise ValueError(f"q: the head dimension must be even, got {dim}")
    checks.check_shape("k", k, [batch, "Hkv", length, dim], " (q's but for the heads)")
    checks.check_same(q=q, k=k)
    checks.check_device(q=q, k=k, positions=positions)
    checks.check_positive(theta=theta)
    return _check_per_token("positions", positions, q)


def check_cache(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_positions: Tensor) -> Tensor:
    """Check v and the cache. Return cache_positions as [B or 1, S]."""
    checks.check_shape("v", v, list(k.shape), " (k's)")
    checks.check_same(q=q, v=v)
    checks.check_float(k_cache=k_cache, v_cache=v_cache)
    checks.check_shape("k_cache", k_cache, [*k.shape[:2], "capacity", k.shape[3]], " (k's but for the capacity)")
    checks.check_shape("v_cache", v_cache, list(k_cache.shape), " (k_cache's)")
    checks.check_same(k_cache=k_cache, v_cache=v_cache)
    checks.check_integer(cache_positions=cache_positions)
    checks.check_device(q=q, k_cache=k_cache, cache_positions=cache_positions)
    return _check_per_token("cache_positions", cache_positions, q)


def check_cache_positions(cache_positions: Tensor, cache: Tensor) -> None:
    """Raise ValueError for a cache position outside the cache. Reads the values, so the tensor should be on the CPU."""
    wrong = [position for position in cache_positions.flatten().tolist() if not 0 <= position < cache.shape[2]]
    if wrong:
        raise ValueError(f"cache_positions: {wrong[0]} is outside the cache's [0, {cache.shape[2]})")


def _check_per_token(name: str, numbers: Tensor, q: Tensor) -> Tensor:
    """Check that there is one number for each token, [S] or [B, S]. Return [1, S] or [B, S]."""
    batch, _, length, _ = q.shape
    if numbers.dim() == 1:
        checks.check_shape(name, numbers, [length], " (q's S) or [B, S]")
        return numbers[None]
    checks.check_shape(name, numbers, [batch, length], " (q's B and S) or [S]")
    return numbers
