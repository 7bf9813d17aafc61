"""Launches of layer_norm's Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pg_kernels.ops._common import devices
from pg_kernels.ops._common.rows import rows_of
from pg_kernels.ops.layer_norm import tiles


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [..., N], x + residual [..., N] (empty without a residual) and the rows' fp32 mean and rstd [...]."""
    from pg_kernels.ops.layer_norm import kernels

    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if not x.numel():
        return y, total, mean, rstd
    x_rows = rows_of(x)
    residual_rows = x_rows if residual is None else rows_of(residual)
    chosen = tiles.choose_forward(x.shape[-1], x.element_size(), devices.device_of(x))
    with devices.on_device_of(x):
        kernels.layer_norm_fwd_kernel[(-(-x_rows.count // chosen.block_m),)](
            x_ptr=x_rows.tensor,
            residual_ptr=None if residual is None else residual_rows.tensor,
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            y_ptr=y,
            total_ptr=None if residual is None else total,
            mean_ptr=mean,
            rstd_ptr=rstd,
            num_rows=x_rows.count,
            x_strides=x_rows.strides,
            residual_strides=residual_rows.strides,
            eps=eps,
            NUM_COLS=x.shape[-1],
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            num_warps=chosen.num_warps,
            enable_fp_fusion=True,
        )
    return y, total, mean, rstd


def backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_parameters: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x [..., N], and fp32 [2, N] of weight and bias (empty unless `needs_parameters`)."""
    from pg_kernels.ops.layer_norm import kernels

    num_cols = x.shape[-1]
    grad_x = x.new_empty(x.shape)
    if not x.numel():
        return grad_x, x.new_zeros((2, num_cols) if needs_parameters else 0, dtype=torch.float32)
    y_rows, x_rows = rows_of(grad_y), rows_of(x)
    total_rows = y_rows if grad_total is None else rows_of(grad_total)
    device = devices.device_of(x)
    chosen = tiles.choose_backward(num_cols, x.element_size(), device)
    num_programs = tiles.num_programs(x_rows.count, device)
    partial = x.new_empty(num_programs, 2, num_cols, dtype=torch.float32) if needs_parameters else None
    with devices.on_device_of(x):
        kernels.layer_norm_bwd_kernel[(num_programs,)](
            grad_y_ptr=y_rows.tensor,
            grad_total_ptr=None if grad_total is None else total_rows.tensor,
            x_ptr=x_rows.tensor,
            weight_ptr=weight.contiguous(),
            mean_ptr=mean,
            rstd_ptr=rstd,
            grad_x_ptr=grad_x,
            partial_ptr=partial,
            num_rows=x_rows.count,
            y_strides=y_rows.strides,
            total_strides=total_rows.strides,
            x_strides=x_rows.strides,
            NUM_COLS=num_cols,
            BLOCK_N=chosen.block_n,
            num_warps=chosen.num_warps,
            enable_fp_fusion=True,
        )
    return grad_x, x.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(0)
