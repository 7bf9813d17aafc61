"""Pointers, loads and stores of the kernels.

Tensors are [B, H, S, D] with adjacent elements along D. Their strides count multiples of STRIDE_UNIT elements: of a stride itself
the compiler only sees whether 16 divides it, and so would not know that a row of 72 is whole vectors of 8.
Packed sequences are one example whose tokens begin at `token_offset`.

A head dimension that is no power of two is split into two powers of two, BLOCK_D and BLOCK_D_TAIL (0 for none): 72 is 64 and 16
rather than 128. Every tile is a pair, [rows, BLOCK_D] and [rows, BLOCK_D_TAIL]; without a tail the second one is not used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_ptr(ptr, strides, batch, head, token_offset, STRIDE_UNIT: tl.constexpr):
    """Return the pointer to an example's first row of one head."""
    offset = tl.cast(head, tl.int64) * strides[1] + tl.cast(token_offset, tl.int64) * strides[2]
    return ptr + (tl.cast(batch, tl.int64) * strides[0] + offset) * STRIDE_UNIT


@triton.jit
def row_offsets(row, strides, HEADS_PER_KV: tl.constexpr, STRIDE_UNIT: tl.constexpr):
    """Return the offsets of query rows from the first row of a KV head's first query head."""
    return (tl.cast(row // HEADS_PER_KV, tl.int64) * strides[2] + (row % HEADS_PER_KV) * strides[1]) * STRIDE_UNIT


@triton.jit
def key_offsets(key, strides, STRIDE_UNIT: tl.constexpr):
    """Return the offsets of keys from the head's first one."""
    return key.to(tl.int64) * strides[2] * STRIDE_UNIT


@triton.jit
def row_values_ptr(ptr, strides, batch, kv_head, token_offset, HEADS_PER_KV: tl.constexpr):
    """Return the pointer to one KV head's values of [B, Hkv, Sq · HEADS_PER_KV], a number for each query row."""
    base = tl.cast(batch, tl.int64) * strides[0] + tl.cast(kv_head, tl.int64) * strides[1]
    return ptr + base + tl.cast(token_offset, tl.int64) * HEADS_PER_KV


@triton.jit
def load_tile(
    ptr,
    offsets,
    mask,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_TAIL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Load rows at `offsets`. MASKED reads 0 where `mask` is false; otherwise `mask` is ignored."""
    col, tail_col = _columns(BLOCK_D, BLOCK_D_TAIL)
    if MASKED and BLOCK_D > HEAD_DIM:
        x = tl.load(ptr + offsets[:, None] + col[None, :], mask=mask[:, None] & (col < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(ptr + offsets[:, None] + col[None, :], mask=mask[:, None], other=0.0)
    elif BLOCK_D > HEAD_DIM:
        x = tl.load(ptr + offsets[:, None] + col[None, :], mask=(col < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(ptr + offsets[:, None] + col[None, :])
    x_tail = x
    if BLOCK_D_TAIL:
        tail_ptrs = ptr + offsets[:, None] + tail_col[None, :]
        if MASKED:
            x_tail = tl.load(tail_ptrs, mask=mask[:, None] & (tail_col < HEAD_DIM)[None, :], other=0.0)
        elif BLOCK_D + BLOCK_D_TAIL > HEAD_DIM:
            x_tail = tl.load(tail_ptrs, mask=(tail_col < HEAD_DIM)[None, :], other=0.0)
        else:
            x_tail = tl.load(tail_ptrs)
    if UPCAST:
        x, x_tail = x.to(tl.float32), x_tail.to(tl.float32)
    return x, x_tail


@triton.jit
def load_tile_tma(
    descriptor,
    tail_descriptor,
    batch,
    head,
    row,
    BLOCK_D: tl.constexpr,
    BLOCK_D_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Load BLOCK_N rows from `row` on by tensor descriptors of [B, H, S, D]: by TMA on GPUs that have it."""
    x = descriptor.load([batch, head, row, 0]).reshape([BLOCK_N, BLOCK_D])
    x_tail = x
    if BLOCK_D_TAIL:
        x_tail = tail_descriptor.load([batch, head, row, BLOCK_D]).reshape([BLOCK_N, BLOCK_D_TAIL])
    if UPCAST:
        x, x_tail = x.to(tl.float32), x_tail.to(tl.float32)
    return x, x_tail


@triton.jit
def store_tile(
    ptr,
    offsets,
    mask,
    x,
    x_tail,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_TAIL: tl.constexpr,
):
    """Store rows at `offsets` where `mask` is true, in the pointer's dtype."""
    col, tail_col = _columns(BLOCK_D, BLOCK_D_TAIL)
    dtype = ptr.dtype.element_ty
    ptrs = ptr + offsets[:, None] + col[None, :]
    if BLOCK_D > HEAD_DIM:
        tl.store(ptrs, x.to(dtype), mask=mask[:, None] & (col < HEAD_DIM)[None, :])
    else:
        tl.store(ptrs, x.to(dtype), mask=mask[:, None])
    if BLOCK_D_TAIL:
        tail_ptrs = ptr + offsets[:, None] + tail_col[None, :]
        tl.store(tail_ptrs, x_tail.to(dtype), mask=mask[:, None] & (tail_col < HEAD_DIM)[None, :])


@triton.jit
def _columns(BLOCK_D: tl.constexpr, BLOCK_D_TAIL: tl.constexpr):
    return tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, BLOCK_D_TAIL if BLOCK_D_TAIL else 16)
