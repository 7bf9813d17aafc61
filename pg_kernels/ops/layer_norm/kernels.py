"""Triton kernels of layer_norm. A row is x[..., :]; NUM_COLS is its length."""

from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import row_start


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    x_strides,
    residual_strides,
    eps,
    NUM_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Normalise BLOCK_M whole rows: store y, mean, rstd and, with a residual, total = x + residual."""
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

    mean = tl.sum(x, axis=1) / NUM_COLS  # [BLOCK_M]
    # Compute the variance from the centred row (already in registers). E[x²] − E[x]² cancels catastrophically.
    centred = tl.where(mask, x - mean[:, None], 0.0)  # [BLOCK_M, BLOCK_N]
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / NUM_COLS + tl.cast(eps, tl.float32))  # [BLOCK_M]
    weight = tl.load(weight_ptr + cols, mask=cols < NUM_COLS, other=0.0).to(tl.float32)  # [BLOCK_N]
    bias = tl.load(bias_ptr + cols, mask=cols < NUM_COLS, other=0.0).to(tl.float32)  # [BLOCK_N]
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(y_ptr + out_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def layer_norm_bwd_kernel(
    grad_y_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    y_strides,
    total_strides,
    x_strides,
    NUM_COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute grad_x of the rows p, p + num_programs, … and program p's part of the parameters' gradients, in partial[p].

    partial[p] is [2, NUM_COLS]: the weight's part and the bias's. A row fits into one block: BLOCK_N >= NUM_COLS.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = cols < NUM_COLS
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    partial_weight = tl.zeros([BLOCK_N], tl.float32)
    partial_bias = tl.zeros([BLOCK_N], tl.float32)
    for row in tl.range(program, num_rows, tl.num_programs(0)):
        grad = tl.load(grad_y_ptr + row_start(row, y_strides) + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row_start(row, x_strides) + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        if partial_ptr is not None:
            partial_weight += grad * normed
            partial_bias += grad
        grad *= weight
        grad_x = grad - tl.sum(grad, axis=0) / NUM_COLS - normed * (tl.sum(grad * normed, axis=0) / NUM_COLS)
        grad_x *= rstd  # [BLOCK_N]
        if grad_total_ptr is not None:
            grad_total = grad_total_ptr + row_start(row, total_strides) + cols
            grad_x += tl.load(grad_total, mask=mask, other=0.0).to(tl.float32)
        out = grad_x_ptr + tl.cast(row, tl.int64) * NUM_COLS + cols
        tl.store(out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        partial = partial_ptr + program.to(tl.int64) * (2 * NUM_COLS) + cols
        tl.store(partial, partial_weight, mask=mask)
        tl.store(partial + NUM_COLS, partial_bias, mask=mask)
