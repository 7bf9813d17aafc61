"""Triton kernels of geglu. One program takes one block of one row."""

from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import gelu, gelu_and_slope, row_start


@triton.jit
def geglu_fwd_kernel(gate_ptr, up_ptr, y_ptr, num_cols, num_blocks, gate_strides, up_strides, BLOCK_N: tl.constexpr):
    """Compute gelu(gate) · up of one of a row's `num_blocks` blocks."""
    row, cols, mask = _locate(num_cols, num_blocks, BLOCK_N)
    gate = tl.load(gate_ptr + row_start(row, gate_strides) + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N]
    up = tl.load(up_ptr + row_start(row, up_strides) + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N]
    tl.store(y_ptr + row.to(tl.int64) * num_cols + cols, (gelu(gate) * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def geglu_bwd_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    y_ptr,
    num_cols,
    num_blocks,
    grad_strides,
    gate_strides,
    up_strides,
    BLOCK_N: tl.constexpr,
):
    """Compute both gradients of one of a row's `num_blocks` blocks, and with y_ptr the forward's result again."""
    row, cols, mask = _locate(num_cols, num_blocks, BLOCK_N)
    grad = tl.load(grad_ptr + row_start(row, grad_strides) + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N]
    gate = tl.load(gate_ptr + row_start(row, gate_strides) + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N]
    up = tl.load(up_ptr + row_start(row, up_strides) + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N]
    activated, slope = gelu_and_slope(gate)
    out_offsets = row.to(tl.int64) * num_cols + cols
    tl.store(grad_gate_ptr + out_offsets, (grad * up * slope).to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + out_offsets, (grad * activated).to(grad_up_ptr.dtype.element_ty), mask=mask)
    if y_ptr is not None:
        tl.store(y_ptr + out_offsets, (activated * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _locate(num_cols, num_blocks, BLOCK_N: tl.constexpr):
    """Return this program's row, its columns [BLOCK_N], and a mask of the columns that exist."""
    program = tl.program_id(0)
    cols = (program % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    return program // num_blocks, cols, cols < num_cols
