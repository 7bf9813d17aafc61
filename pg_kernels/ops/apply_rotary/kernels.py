from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import sincos


@triton.jit
def rotate(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cache_positions_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    tokens,
    length,
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
    step,
    step_rest,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotate some heads of q and k at TOKENS positions. With v and cache_positions, store k and v there, else at their tokens."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    batch, token = (n // length).to(tl.int64), (n % length).to(tl.int64)
    here = n < tokens
    pair = tl.arange(0, HALF)
    inside = here[:, None] & (pair < DIM // 2)[None, :]

    position = tl.load(positions_ptr + batch * positions_strides[0] + token * positions_strides[1], mask=here, other=0)
    frequency = _power_of_two(pair.to(tl.float32), tl.cast(step, tl.float32), tl.cast(step_rest, tl.float32))
    sin, cos = sincos(position.to(tl.float32)[:, None] * frequency[None, :])
    if INVERSE:
        sin = -sin

    slot, stored = token, inside
    if cache_positions_ptr is not None:
        slot = tl.load(
            cache_positions_ptr + batch * cache_positions_strides[0] + token * cache_positions_strides[1],
            mask=here,
            other=0,
        ).to(tl.int64)
        fits = (slot >= 0) & (slot < capacity)
        stored = inside & fits[:, None]
        # A slot outside the cache is not written, and what attends from there must not look right.
        cos = tl.where(fits[:, None], cos, float("nan"))

    first = tl.program_id(1) * heads_per_program
    last = first + heads_per_program
    for head in tl.range(first, tl.minimum(last, Q_HEADS)):
        x = _at(q_ptr, q_strides, batch, head, token)
        y = _at(q_out_ptr, q_out_strides, batch, head, token)
        _turn(x, y, q_strides[3], q_out_strides[3], pair, sin, cos, inside, inside, DIM)
    for head in tl.range(tl.maximum(first, Q_HEADS) - Q_HEADS, tl.minimum(last, Q_HEADS + K_HEADS) - Q_HEADS):
        x = _at(k_ptr, k_strides, batch, head, token)
        y = _at(k_out_ptr, k_out_strides, batch, head, slot)
        _turn(x, y, k_strides[3], k_out_strides[3], pair, sin, cos, inside, stored, DIM)
        if v_ptr is not None:
            x = _at(v_ptr, v_strides, batch, head, token)
            y = _at(v_out_ptr, v_out_strides, batch, head, slot)
            _copy(x, y, v_strides[3], v_out_strides[3], pair, inside, stored)
            x += DIM // 2 * v_strides[3]
            y += DIM // 2 * v_out_strides[3]
            _copy(x, y, v_strides[3], v_out_strides[3], pair, inside, stored)


@triton.jit
def _power_of_two(i, step, step_rest):
    """2^(i · (step + step_rest)) to one rounding, where i · step is exact.

    Positions multiply an error here: the GPU's own exp2 of a rounded exponent would more than double that of the angles.
    """
    exponent = i * step
    whole = tl.floor(exponent + 0.5)
    x = (exponent - whole) + i * step_rest
    power = 1.5403530393381608e-4 + x * 1.525273380405984e-5
    power = 9.618129107628477e-3 + x * (1.3333558146428443e-3 + x * power)
    power = 1.0 + x * (0.6931471805599453 + x * (0.2402265069591007 + x * (0.05550410866482158 + x * power)))
    return power * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _at(pointer, strides, batch, head, token):
    """Where the rows of one head begin in [B, H, S, D]."""
    return pointer + batch * strides[0] + tl.cast(head, tl.int64) * strides[1] + token * strides[2]


@triton.jit
def _turn(x, y, x_dim, y_dim, pair, sin, cos, inside, stored, DIM: tl.constexpr):
    """Turn the pairs (i, i + DIM / 2) of rows at x into rows at y."""
    first = tl.load(x[:, None] + (pair * x_dim)[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x[:, None] + ((pair + DIM // 2) * x_dim)[None, :], mask=inside, other=0.0).to(tl.float32)
    type = y.dtype.element_ty
    tl.store(y[:, None] + (pair * y_dim)[None, :], (first * cos - second * sin).to(type), mask=stored)
    tl.store(y[:, None] + ((pair + DIM // 2) * y_dim)[None, :], (second * cos + first * sin).to(type), mask=stored)


@triton.jit
def _copy(x, y, x_dim, y_dim, pair, inside, stored):
    half = tl.load(x[:, None] + (pair * x_dim)[None, :], mask=inside, other=0.0)
    tl.store(y[:, None] + (pair * y_dim)[None, :], half.to(y.dtype.element_ty), mask=stored)
