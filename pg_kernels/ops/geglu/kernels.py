from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import gelu, gelu_and_slope, row_start


@triton.jit
def forward(gate_ptr, up_ptr, y_ptr, columns, blocks, gate_strides, up_strides, BLOCK: tl.constexpr):
    """One of the `blocks` blocks of one row."""
    row, column, inside = _place(columns, blocks, BLOCK)
    gate = tl.load(gate_ptr + row_start(row, gate_strides) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row_start(row, up_strides) + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * columns + column, (gelu(gate) * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    y_ptr,
    columns,
    blocks,
    grad_strides,
    gate_strides,
    up_strides,
    BLOCK: tl.constexpr,
):
    """Both gradients, and with y_ptr the forward's result once more, from the inputs alone."""
    row, column, inside = _place(columns, blocks, BLOCK)
    grad = tl.load(grad_ptr + row_start(row, grad_strides) + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row_start(row, gate_strides) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row_start(row, up_strides) + column, mask=inside, other=0.0).to(tl.float32)
    activated, slope = gelu_and_slope(gate)
    out = row.to(tl.int64) * columns + column
    tl.store(grad_gate_ptr + out, (grad * up * slope).to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + out, (grad * activated).to(grad_up_ptr.dtype.element_ty), mask=inside)
    if y_ptr is not None:
        tl.store(y_ptr + out, (activated * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _place(columns, blocks, BLOCK: tl.constexpr):
    """This program's row, its columns, and which of those there are."""
    program = tl.program_id(0)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return program // blocks, column, column < columns
