from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import row_start


@triton.jit
def forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    rows,
    x_strides,
    residual_strides,
    eps,
    weight_offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y, x + residual (without a residual neither is touched) and 1 / rms of ROWS rows."""
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

    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / COLUMNS + tl.cast(eps, tl.float32))
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32) + tl.cast(
        weight_offset, tl.float32
    )
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def backward(
    grad_y_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    y_strides,
    total_strides,
    x_strides,
    weight_offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of whole rows: program p takes rows p, p + programs, … and leaves its part of the weight's in partial[p]."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + tl.cast(weight_offset, tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0)):
        grad = tl.load(grad_y_ptr + row_start(row, y_strides) + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.load(x_ptr + row_start(row, x_strides) + column, mask=inside, other=0.0).to(tl.float32) * rstd
        if partial_ptr is not None:
            grad_weight += grad * normed
        grad *= weight
        grad_x = (grad - normed * (tl.sum(grad * normed, axis=0) / COLUMNS)) * rstd
        if grad_total_ptr is not None:
            total = grad_total_ptr + row_start(row, total_strides) + column
            grad_x += tl.load(total, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            grad_x_ptr + tl.cast(row, tl.int64) * COLUMNS + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside
        )
    if partial_ptr is not None:
        tl.store(partial_ptr + program.to(tl.int64) * COLUMNS + column, grad_weight, mask=inside)


@triton.jit
def backward_wide(
    grad_y_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    y_strides,
    total_strides,
    x_strides,
    weight_offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for rows that registers cannot hold: each is read twice in blocks; partial[p], at first 0, is summed in place."""
    program = tl.program_id(0)
    for row in tl.range(program, rows, tl.num_programs(0)):
        grad_row = grad_y_ptr + row_start(row, y_strides)
        x_row = x_ptr + row_start(row, x_strides)
        rstd = tl.load(rstd_ptr + row)
        products = tl.zeros([BLOCK], tl.float32)
        for first in range(0, COLUMNS, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < COLUMNS
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_row + column, mask=inside, other=0.0).to(tl.float32)
            grad *= weight + tl.cast(weight_offset, tl.float32)
            products += grad * tl.load(x_row + column, mask=inside, other=0.0).to(tl.float32) * rstd
        mean = tl.sum(products, axis=0) / COLUMNS
        for first in range(0, COLUMNS, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < COLUMNS
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_row + column, mask=inside, other=0.0).to(tl.float32)
            normed = tl.load(x_row + column, mask=inside, other=0.0).to(tl.float32) * rstd
            if partial_ptr is not None:
                partial = partial_ptr + program.to(tl.int64) * COLUMNS + column
                # The same thread wrote these elements for the row before.
                tl.store(partial, tl.load(partial, mask=inside, other=0.0) + grad * normed, mask=inside)
            grad_x = (grad * (weight + tl.cast(weight_offset, tl.float32)) - normed * mean) * rstd
            if grad_total_ptr is not None:
                total = grad_total_ptr + row_start(row, total_strides) + column
                grad_x += tl.load(total, mask=inside, other=0.0).to(tl.float32)
            tl.store(
                grad_x_ptr + tl.cast(row, tl.int64) * COLUMNS + column,
                grad_x.to(grad_x_ptr.dtype.element_ty),
                mask=inside,
            )
