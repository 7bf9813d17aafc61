"""Triton kernels of rms_norm. A row is x[..., :]; NUM_COLS is its length."""

from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import row_start


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    num_rows,
    x_strides,
    residual_strides,
    eps,
    weight_offset,
    NUM_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Normalise BLOCK_M whole rows: store y, rstd and, with a residual, total = x + residual."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    cols = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (cols < NUM_COLS)[None, :]
    if BLOCK_M > 1:
        mask &= (rows < num_rows)[:, None]  # [BLOCK_M, BLOCK_N]
    out_offsets = rows.to(tl.int64)[:, None] * NUM_COLS + cols[None, :]  # [BLOCK_M, BLOCK_N]

    x = tl.load(x_ptr + row_start(rows, x_strides)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = residual_ptr + row_start(rows, residual_strides)[:, None] + cols[None, :]
        x += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
        # Normalise the rounded sum, so that the result equals two separate ops.
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out_offsets, total, mask=mask)
        x = total.to(tl.float32)

    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / NUM_COLS + tl.cast(eps, tl.float32))  # [BLOCK_M]
    weight = tl.load(weight_ptr + cols, mask=cols < NUM_COLS, other=0.0).to(tl.float32) + tl.cast(
        weight_offset, tl.float32
    )  # [BLOCK_N]
    y = x * rstd[:, None] * weight[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(y_ptr + out_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def rms_norm_bwd_kernel(
    grad_y_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    y_strides,
    total_strides,
    x_strides,
    weight_offset,
    NUM_COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute grad_x of the rows p, p + num_programs, … and program p's part of the weight's gradient, in partial[p].

    A row fits into one block: BLOCK_N >= NUM_COLS.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = cols < NUM_COLS
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + tl.cast(weight_offset, tl.float32)
    partial = tl.zeros([BLOCK_N], tl.float32)
    for row in tl.range(program, num_rows, tl.num_programs(0)):
        grad = tl.load(grad_y_ptr + row_start(row, y_strides) + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.load(x_ptr + row_start(row, x_strides) + cols, mask=mask, other=0.0).to(tl.float32) * rstd
        if partial_ptr is not None:
            partial += grad * normed
        grad *= weight
        grad_x = (grad - normed * (tl.sum(grad * normed, axis=0) / NUM_COLS)) * rstd  # [BLOCK_N]
        if grad_total_ptr is not None:
            grad_total = grad_total_ptr + row_start(row, total_strides) + cols
            grad_x += tl.load(grad_total, mask=mask, other=0.0).to(tl.float32)
        out = grad_x_ptr + tl.cast(row, tl.int64) * NUM_COLS + cols
        tl.store(out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + program.to(tl.int64) * NUM_COLS + cols, partial, mask=mask)


@triton.jit
def rms_norm_bwd_wide_kernel(
    grad_y_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    y_strides,
    total_strides,
    x_strides,
    weight_offset,
    NUM_COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the results of `rms_norm_bwd_kernel` for rows that registers cannot hold.

    Each row is read twice in blocks of BLOCK_N columns. The caller fills partial with zeros; program p adds to partial[p].
    """
    program = tl.program_id(0)
    for row in tl.range(program, num_rows, tl.num_programs(0)):
        grad_row = grad_y_ptr + row_start(row, y_strides)
        x_row = x_ptr + row_start(row, x_strides)
        rstd = tl.load(rstd_ptr + row)
        acc = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, NUM_COLS, BLOCK_N):  # the mean of grad · weight · normed
            cols = start + tl.arange(0, BLOCK_N)
            mask = cols < NUM_COLS
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_row + cols, mask=mask, other=0.0).to(tl.float32)
            grad *= weight + tl.cast(weight_offset, tl.float32)
            acc += grad * tl.load(x_row + cols, mask=mask, other=0.0).to(tl.float32) * rstd
        mean = tl.sum(acc, axis=0) / NUM_COLS
        for start in range(0, NUM_COLS, BLOCK_N):  # the gradients
            cols = start + tl.arange(0, BLOCK_N)
            mask = cols < NUM_COLS
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_row + cols, mask=mask, other=0.0).to(tl.float32)
            normed = tl.load(x_row + cols, mask=mask, other=0.0).to(tl.float32) * rstd
            if partial_ptr is not None:
                partial = partial_ptr + program.to(tl.int64) * NUM_COLS + cols
                # No barrier is needed: the same thread wrote these elements in the row before.
                tl.store(partial, tl.load(partial, mask=mask, other=0.0) + grad * normed, mask=mask)
            grad_x = (grad * (weight + tl.cast(weight_offset, tl.float32)) - normed * mean) * rstd
            if grad_total_ptr is not None:
                grad_total = grad_total_ptr + row_start(row, total_strides) + cols
                grad_x += tl.load(grad_total, mask=mask, other=0.0).to(tl.float32)
            out = grad_x_ptr + tl.cast(row, tl.int64) * NUM_COLS + cols
            tl.store(out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
