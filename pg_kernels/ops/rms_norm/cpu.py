"""rms_norm in the C++ extension. Its backward pass is PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

from pg_kernels.ops._common import checks, extension
from pg_kernels.ops._common.extension import _C, FLOAT_CODES


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [..., N], x + residual [..., N] (empty without a residual) and the rows' fp32 rstd [...]."""
    # The extension takes addresses: check sizes even if the registered op is called directly.
    extension.check(x=x, residual=x if residual is None else residual, weight=weight)
    checks.check_row("x", x)
    checks.check_shape("weight", weight, [x.shape[-1]], " (x's last dimension)")
    if residual is not None:
        checks.check_same(x=x, residual=residual)
        checks.check_shape("residual", residual, x.shape, " (x's)")
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    _C.rms_norm(
        x=x.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        weight=weight.data_ptr(),
        y=y.data_ptr(),
        total=total.data_ptr(),
        rstd=rstd.data_ptr(),
        rows=rstd.numel(),
        columns=x.shape[-1],
        type=FLOAT_CODES[x.dtype],
        weight_type=FLOAT_CODES[weight.dtype],
        eps=eps,
        offset=weight_offset,
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
    normed, grad = x.float() * rstd[..., None], grad_y.float()
    grad_normed = grad * (weight_offset + weight.float())
    grad_x = (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True)) * rstd[..., None]
    if grad_total is not None:
        grad_x += grad_total
    if not needs_weight:
        return grad_x.to(x.dtype), weight.new_empty(0)
    return grad_x.to(x.dtype), (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
