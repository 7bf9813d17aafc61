from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import row_start


@triton.jit
def forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    x_strides,
    residual_strides,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y, x + residual (without a residual neither is touched), mean and 1 / standard deviation of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (column < COLUMNS)[None, :]
    if ROWS > 1:
        inside &= (row < rows)[:, None]
    out = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]

    x = tl.load(x_ptr + row_start(row, x_strides)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = residual_ptr + row_start(row, residual_strides)[:, None] + column[None, :]
        x += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
        # What is normalised is the sum as it is stored.
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out, total, mask=inside)
        x = total.to(tl.float32)

    mean = tl.sum(x, axis=1) / COLUMNS
    # From the centred row, which registers hold: the difference of two large means would lose what is left of it.
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / COLUMNS + tl.cast(eps, tl.float32))
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def backward(
    grad_y_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    y_strides,
    total_strides,
    x_strides,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of whole rows: program p takes rows p, p + programs, …; partial[p] is its part of the weight's and the bias's."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    grad_bias = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0)):
        grad = tl.load(grad_y_ptr + row_start(row, y_strides) + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row_start(row, x_strides) + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        if partial_ptr is not None:
            grad_weight += grad * normed
            grad_bias += grad
        grad *= weight
        grad_x = grad - tl.sum(grad, axis=0) / COLUMNS - normed * (tl.sum(grad * normed, axis=0) / COLUMNS)
        grad_x *= rstd
        if grad_total_ptr is not None:
            total = grad_total_ptr + row_start(row, total_strides) + column
            grad_x += tl.load(total, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            grad_x_ptr + tl.cast(row, tl.int64) * COLUMNS + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside
        )
    if partial_ptr is not None:
        partial = partial_ptr + program.to(tl.int64) * (2 * COLUMNS) + column
        tl.store(partial, grad_weight, mask=inside)
        tl.store(partial + COLUMNS, grad_bias, mask=inside)
