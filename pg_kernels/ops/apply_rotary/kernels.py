"""Triton kernel of apply_rotary and apply_rotary_to_cache.

A head's elements i and i + HEAD_DIM / 2 are a pair that is rotated by one angle. Tiles are [BLOCK_M tokens, BLOCK_D pairs].
"""

from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import sincos


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cache_positions_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    num_tokens,
    seq_len,
    capacity,
    heads_per_program,
    q_strides,
    k_strides,
    v_strides,
    positions_strides,
    cache_positions_strides,
    q_out_strides,
    k_out_strides,
    v_out_strides,
    exponent_step,
    exponent_step_rest,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotate `heads_per_program` heads of q and k, counted together, for BLOCK_M tokens.

    With cache_positions, store k and v at these positions of a KV cache. Without, store k at its own token.
    Frequency i is 2^(i · (exponent_step + exponent_step_rest)).
    """
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    batch, token = (index // seq_len).to(tl.int64), (index % seq_len).to(tl.int64)
    token_mask = index < num_tokens
    pair = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask = token_mask[:, None] & (pair < HEAD_DIM // 2)[None, :]  # [BLOCK_M, BLOCK_D]

    position = tl.load(
        positions_ptr + batch * positions_strides[0] + token * positions_strides[1], mask=token_mask, other=0
    )  # [BLOCK_M]
    frequency = _exp2_of_multiple(
        pair.to(tl.float32), tl.cast(exponent_step, tl.float32), tl.cast(exponent_step_rest, tl.float32)
    )  # [BLOCK_D]
    sin, cos = sincos(position.to(tl.float32)[:, None] * frequency[None, :])  # [BLOCK_M, BLOCK_D]
    if INVERSE:
        sin = -sin

    out_token, store_mask = token, mask
    if cache_positions_ptr is not None:
        out_token = tl.load(
            cache_positions_ptr + batch * cache_positions_strides[0] + token * cache_positions_strides[1],
            mask=token_mask,
            other=0,
        ).to(tl.int64)
        is_in_cache = (out_token >= 0) & (out_token < capacity)
        store_mask = mask & is_in_cache[:, None]
        # Positions outside the cache are not written, and the token's q becomes NaN so that the error is visible.
        cos = tl.where(is_in_cache[:, None], cos, float("nan"))

    first = tl.program_id(1) * heads_per_program
    last = first + heads_per_program
    for head in tl.range(first, tl.minimum(last, Q_HEADS)):
        x = _head_rows(q_ptr, q_strides, batch, head, token)
        y = _head_rows(q_out_ptr, q_out_strides, batch, head, token)
        _rotate(x, y, q_strides[3], q_out_strides[3], pair, sin, cos, mask, mask, HEAD_DIM)
    for head in tl.range(tl.maximum(first, Q_HEADS) - Q_HEADS, tl.minimum(last, Q_HEADS + K_HEADS) - Q_HEADS):
        x = _head_rows(k_ptr, k_strides, batch, head, token)
        y = _head_rows(k_out_ptr, k_out_strides, batch, head, out_token)
        _rotate(x, y, k_strides[3], k_out_strides[3], pair, sin, cos, mask, store_mask, HEAD_DIM)
        if v_ptr is not None:
            x = _head_rows(v_ptr, v_strides, batch, head, token)
            y = _head_rows(v_out_ptr, v_out_strides, batch, head, out_token)
            _copy_half(x, y, v_strides[3], v_out_strides[3], pair, mask, store_mask)
            x += HEAD_DIM // 2 * v_strides[3]
            y += HEAD_DIM // 2 * v_out_strides[3]
            _copy_half(x, y, v_strides[3], v_out_strides[3], pair, mask, store_mask)


@triton.jit
def _exp2_of_multiple(i, step, step_rest):
    """Return 2^(i · (step + step_rest)) with one rounding error. i · step must be exact in fp32.

    Positions multiply the error of a frequency: the GPU's exp2 of a rounded exponent would more than double the angles' error.
    """
    exponent = i * step
    whole = tl.floor(exponent + 0.5)
    x = (exponent - whole) + i * step_rest
    power = 1.5403530393381608e-4 + x * 1.525273380405984e-5
    power = 9.618129107628477e-3 + x * (1.3333558146428443e-3 + x * power)
    power = 1.0 + x * (0.6931471805599453 + x * (0.2402265069591007 + x * (0.05550410866482158 + x * power)))
    return power * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _head_rows(pointer, strides, batch, head, token):
    """Return pointers [BLOCK_M] to a head's rows in a tensor [B, H, S, D]."""
    return pointer + batch * strides[0] + tl.cast(head, tl.int64) * strides[1] + token * strides[2]


@triton.jit
def _rotate(x, y, x_stride, y_stride, pair, sin, cos, mask, store_mask, HEAD_DIM: tl.constexpr):
    """Rotate the pairs of the rows at x [BLOCK_M] and store them at y [BLOCK_M]."""
    first = tl.load(x[:, None] + (pair * x_stride)[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x[:, None] + ((pair + HEAD_DIM // 2) * x_stride)[None, :], mask=mask, other=0.0).to(tl.float32)
    dtype = y.dtype.element_ty
    tl.store(y[:, None] + (pair * y_stride)[None, :], (first * cos - second * sin).to(dtype), mask=store_mask)
    tl.store(
        y[:, None] + ((pair + HEAD_DIM // 2) * y_stride)[None, :],
        (second * cos + first * sin).to(dtype),
        mask=store_mask,
    )


@triton.jit
def _copy_half(x, y, x_stride, y_stride, pair, mask, store_mask):
    """Copy HEAD_DIM / 2 elements of the rows at x [BLOCK_M] to the rows at y [BLOCK_M]."""
    half = tl.load(x[:, None] + (pair * x_stride)[None, :], mask=mask, other=0.0)
    tl.store(y[:, None] + (pair * y_stride)[None, :], half.to(y.dtype.element_ty), mask=store_mask)
