"""apply_rotary_to_cache in the C++ extension."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pg_kernels.ops._common import checks, extension
from pg_kernels.ops._common.extension import _C, FLOAT_CODES
from pg_kernels.ops.apply_rotary import arguments

MAX_TOKENS = 64
"""With more tokens PyTorch's functions are faster: they use threads, and vector instructions for sines."""


def rotate_to_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    theta: float,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_positions: Tensor,
) -> Tensor:
    """Return the rotated q [B, H, S, D]; write the rotated k and v into the caches."""
    # The extension takes addresses: check sizes even if the registered op is called directly. A compiled graph calls it with
    # cache positions that nobody has checked.
    extension.check(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    checks.check_integer(positions=positions, cache_positions=cache_positions)
    positions, cache_positions = (t[0] if t.dim() == 2 and len(t) == 1 else t for t in (positions, cache_positions))
    positions = arguments.check_rotary(q, k, positions, theta)
    cache_positions = arguments.check_cache(q, k, v, k_cache, v_cache, cache_positions)
    if q.shape[3] > extension.LONGEST_HEAD:
        raise ValueError(f"q: expected heads of at most {extension.LONGEST_HEAD}, got {q.shape[3]}")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("k_cache: expected caches whose rows are contiguous")
    arguments.check_cache_positions(cache_positions, k_cache)
    q_out = q.new_empty(q.shape)
    batch, _, length, dim = q.shape
    # Name all copies: they must live until the call returns.
    positions, cache_positions = (
        t.expand(batch, length).to(torch.int64).contiguous() for t in (positions, cache_positions)
    )
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    frequencies = _frequencies(dim, theta)
    _C.rotary(
        q=extension.heads(q),
        k=extension.heads(k),
        v=extension.heads(v),
        q_out=extension.heads(q_out),
        k_cache=extension.heads(k_cache),
        v_cache=extension.heads(v_cache),
        positions=positions.data_ptr(),
        cache_positions=cache_positions.data_ptr(),
        frequencies=frequencies.data_ptr(),
        batch=batch,
        length=length,
        dim=dim,
        type=FLOAT_CODES[q.dtype],
        cache_type=FLOAT_CODES[k_cache.dtype],
    )
    return q_out


@cache
def _frequencies(dim: int, theta: float) -> Tensor:
    """Return the frequencies of a head's pairs, fp32 [D / 2]."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
