"""Loads and stores of tiles of [B, H, S, D] tensors, whose head dimension is held as one or two blocks.

A head dimension that is no power of two is split into a block of BLOCK_D0 columns and a smaller one of BLOCK_D1: 72 is 64 and 16,
because one block would take 128. BLOCK_D1 is 0 if one block suffices. The blocks are a pair (x0, x1); without a second block, x1
is x0 or a dummy of 16 columns.

Strides count STRIDE_UNITs of elements. The compiler only notices multiples of 16 in a stride. With a unit of 8 it knows that rows
of 72 elements are whole vectors, too.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_base(pointer, strides, batch, head, seq_start, STRIDE_UNIT: tl.constexpr):
    """Return the pointer to an example's first row of one head; packed sequences begin `seq_start` rows into the only example."""
    offset = tl.cast(head, tl.int64) * strides[1] + tl.cast(seq_start, tl.int64) * strides[2]
    return pointer + (tl.cast(batch, tl.int64) * strides[0] + offset) * STRIDE_UNIT


@triton.jit
def row_offsets(row, strides, HEADS_PER_KV: tl.constexpr, STRIDE_UNIT: tl.constexpr):
    """Return the offsets of rows from their KV head's first one: row r is query r // HEADS_PER_KV of head r % HEADS_PER_KV."""
    return (tl.cast(row // HEADS_PER_KV, tl.int64) * strides[2] + (row % HEADS_PER_KV) * strides[1]) * STRIDE_UNIT


@triton.jit
def key_offsets(key, strides, STRIDE_UNIT: tl.constexpr):
    """Return the offsets of keys or values from their head's first one."""
    return key.to(tl.int64) * strides[2] * STRIDE_UNIT


@triton.jit
def lse_base(pointer, strides, batch, head, seq_start, HEADS_PER_KV: tl.constexpr):
    """Return the pointer to a KV head's first row in [B, Hkv, Sq * HEADS_PER_KV]."""
    base = tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    return pointer + base + tl.cast(seq_start, tl.int64) * HEADS_PER_KV


@triton.jit
def load_rows(
    base, offsets, dims, row_mask, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load rows as a pair [rows, BLOCK_D0], [rows, BLOCK_D1]; MASKED loads 0 where `row_mask` is false."""
    if MASKED and BLOCK_D0 > HEAD_DIM:
        x0 = tl.load(
            base + offsets[:, None] + dims[0][None, :],
            mask=row_mask[:, None] & (dims[0] < HEAD_DIM)[None, :],
            other=0.0,
        )
    elif MASKED:
        x0 = tl.load(base + offsets[:, None] + dims[0][None, :], mask=row_mask[:, None], other=0.0)
    elif BLOCK_D0 > HEAD_DIM:
        x0 = tl.load(base + offsets[:, None] + dims[0][None, :], mask=(dims[0] < HEAD_DIM)[None, :], other=0.0)
    else:
        x0 = tl.load(base + offsets[:, None] + dims[0][None, :])
    x1 = x0
    if BLOCK_D1:
        if MASKED:
            x1 = tl.load(
                base + offsets[:, None] + dims[1][None, :],
                mask=row_mask[:, None] & (dims[1] < HEAD_DIM)[None, :],
                other=0.0,
            )
        elif BLOCK_D0 + BLOCK_D1 > HEAD_DIM:
            x1 = tl.load(base + offsets[:, None] + dims[1][None, :], mask=(dims[1] < HEAD_DIM)[None, :], other=0.0)
        else:
            x1 = tl.load(base + offsets[:, None] + dims[1][None, :])
    if UPCAST:
        x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
    return x0, x1


@triton.jit
def load_described(
    descriptor0, descriptor1, place, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_N rows from place (batch, head, row) on through tensor descriptors: by TMA where the GPU has it."""
    x0 = descriptor0.load([place[0], place[1], place[2], 0]).reshape([BLOCK_N, BLOCK_D0])
    x1 = x0
    if BLOCK_D1:
        x1 = descriptor1.load([place[0], place[1], place[2], BLOCK_D0]).reshape([BLOCK_N, BLOCK_D1])
    if UPCAST:
        x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
    return x0, x1


@triton.jit
def store_rows(
    base, offsets, dims, row_mask, x0, x1, HEAD_DIM: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr
):
    """Store a pair [rows, BLOCK_D0], [rows, BLOCK_D1] in the rows whose `row_mask` is true."""
    dtype = base.dtype.element_ty
    if BLOCK_D0 > HEAD_DIM:
        tl.store(
            base + offsets[:, None] + dims[0][None, :],
            x0.to(dtype),
            mask=row_mask[:, None] & (dims[0] < HEAD_DIM)[None, :],
        )
    else:
        tl.store(base + offsets[:, None] + dims[0][None, :], x0.to(dtype), mask=row_mask[:, None])
    if BLOCK_D1:
        tl.store(
            base + offsets[:, None] + dims[1][None, :],
            x1.to(dtype),
            mask=row_mask[:, None] & (dims[1] < HEAD_DIM)[None, :],
        )
