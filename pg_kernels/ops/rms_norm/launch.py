"""Launches of rms_norm's Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pg_kernels.ops._common import devices
from pg_kernels.ops._common.rows import rows_of
from pg_kernels.ops.rms_norm import tiles


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [..., N], x + residual [..., N] (empty without a residual) and the rows' fp32 rstd [...]."""
    from pg_kernels.ops.rms_norm import kernels

    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if not x.numel():
        return y, total, rstd
    x_rows = rows_of(x)
    residual_rows = x_rows if residual is None else rows_of(residual)
    chosen = tiles.choose_forward(x.shape[-1], x.element_size(), devices.device_of(x))
    with devices.on_device_of(x):
        kernels.rms_norm_fwd_kernel[(-(-x_rows.count // chosen.block_m),)](
            x_ptr=x_rows.tensor,
            residual_ptr=None if residual is None else residual_rows.tensor,
            weight_ptr=weight.contiguous(),
            y_ptr=y,
            total_ptr=None if residual is None else total,
            rstd_ptr=rstd,
            num_rows=x_rows.count,
            x_strides=x_rows.strides,
            residual_strides=residual_rows.strides,
            eps=eps,
            weight_offset=weight_offset,
            NUM_COLS=x.shape[-1],
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            num_warps=chosen.num_warps,
            enable_fp_fusion=True,
        )
    return y, total, rstd


def backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [..., N] and of the weight [N] (empty unless `needs_weight`)."""
    from pg_kernels.ops.rms_norm import kernels

    num_cols = x.shape[-1]
    grad_x = x.new_empty(x.shape)
    if not x.numel():
        return grad_x, weight.new_zeros(weight.shape if needs_weight else 0)
    y_rows, x_rows = rows_of(grad_y), rows_of(x)
    total_rows = y_rows if grad_total is None else rows_of(grad_total)
    device = devices.device_of(x)
    chosen = tiles.choose_backward(num_cols, x.element_size(), device)
    num_programs = tiles.num_programs(x_rows.count, device)
    fits = chosen.block_n >= num_cols
    kernel = kernels.rms_norm_bwd_kernel if fits else kernels.rms_norm_bwd_wide_kernel
    partial = x.new_zeros(num_programs, num_cols, dtype=torch.float32) if needs_weight else None
    with devices.on_device_of(x):
        kernel[(num_programs,)](
            grad_y_ptr=y_rows.tensor,
            grad_total_ptr=None if grad_total is None else total_rows.tensor,
            x_ptr=x_rows.tensor,
            weight_ptr=weight.contiguous(),
            rstd_ptr=rstd,
            grad_x_ptr=grad_x,
            partial_ptr=partial,
            num_rows=x_rows.count,
            y_strides=y_rows.strides,
            total_strides=total_rows.strides,
            x_strides=x_rows.strides,
            weight_offset=weight_offset,
            NUM_COLS=num_cols,
            BLOCK_N=chosen.block_n,
            num_warps=chosen.num_warps,
            enable_fp_fusion=True,
        )
    return grad_x, weight.new_empty(0) if partial is None else partial.sum(0).to(weight.dtype)
