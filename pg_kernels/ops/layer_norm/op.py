from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops._common.rows import rows_of
from pg_kernels.ops.layer_norm import reference, tiles


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from pg_kernels.ops.layer_norm import kernels

    rows, other = rows_of(x), rows_of(x if residual is None else residual)
    y, total, mean, rstd = _fake_forward(x, residual)
    if x.numel():
        chosen = tiles.forward(x.shape[-1], x.element_size(), devices.device_of(x))
        with devices.on_device_of(x):
            kernels.forward[(-(-rows.count // chosen.rows),)](
                x_ptr=rows.tensor,
                residual_ptr=None if residual is None else other.tensor,
                weight_ptr=weight.contiguous(),
                bias_ptr=bias.contiguous(),
                y_ptr=y,
                total_ptr=None if residual is None else total,
                mean_ptr=mean,
                rstd_ptr=rstd,
                rows=rows.count,
                x_strides=rows.strides,
                residual_strides=other.strides,
                eps=eps,
                COLUMNS=x.shape[-1],
                BLOCK=chosen.block,
                ROWS=chosen.rows,
                num_warps=chosen.warps,
                enable_fp_fusion=True,
            )
    return y, total, mean, rstd


def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, torch.empty_like(mean)


def _backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_parameters: bool,
) -> tuple[Tensor, Tensor]:
    from pg_kernels.ops.layer_norm import kernels

    columns = x.shape[-1]
    grad_x, grad_parameters = _fake_backward(grad_y, grad_total, x, weight, mean, rstd, needs_parameters)
    if not x.numel():
        return grad_x, grad_parameters.zero_()
    y_rows, x_rows = rows_of(grad_y), rows_of(x)
    total_rows = y_rows if grad_total is None else rows_of(grad_total)
    device = devices.device_of(x)
    chosen, programs = tiles.backward(columns, x.element_size(), device), tiles.programs(x_rows.count, device)
    partial = x.new_empty(programs, 2, columns, dtype=torch.float32) if needs_parameters else None
    with devices.on_device_of(x):
        kernels.backward[(programs,)](
            grad_y_ptr=y_rows.tensor,
            grad_total_ptr=None if grad_total is None else total_rows.tensor,
            x_ptr=x_rows.tensor,
            weight_ptr=weight.contiguous(),
            mean_ptr=mean,
            rstd_ptr=rstd,
            grad_x_ptr=grad_x,
            partial_ptr=partial,
            rows=x_rows.count,
            y_strides=y_rows.strides,
            total_strides=total_rows.strides,
            x_strides=x_rows.strides,
            COLUMNS=columns,
            BLOCK=chosen.block,
            num_warps=chosen.warps,
            enable_fp_fusion=True,
        )
    return grad_x, grad_parameters if partial is None else partial.sum(0)


def _fake_backward(grad_y: Tensor, grad_total: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, x.shape[-1]) if rest[-1] else 0, dtype=torch.float32)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            y, total, mean, rstd = torch.ops.pg_kernels.layer_norm_triton(x, residual, weight, bias, eps)
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        ctx.bias_dtype = bias.dtype
        ctx.mark_non_differentiable(*((total, mean, rstd) if residual is None else (mean, rstd)))
        ctx.set_materialize_grads(False)
        return y, total, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("layer_norm")
        needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        if grad_y is None:  # only the sum was used
            return grad_total, grad_total if needs_residual else None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        grad_x, parameters = torch.ops.pg_kernels.layer_norm_triton_backward(
            grad_y, grad_total, x, weight, mean, rstd, needs_weight or needs_bias
        )
        return (
            grad_x if needs_x else None,
            grad_x if needs_residual else None,
            parameters[0].to(weight.dtype) if needs_weight else None,
            parameters[1].to(ctx.bias_dtype) if needs_bias else None,
            None,
        )


register_backend("layer_norm", "triton", devices.unavailable_reason)
register_backend("layer_norm", "native", lambda device_type: None)  # PyTorch's own kernel
define_composite("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", reference.layer_norm)
define_composite(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    reference.add_layer_norm,
)
define_opaque(
    "layer_norm_triton(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _LayerNorm.apply,
)
define_opaque(
    "layer_norm_triton_backward(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
    "bool needs_parameters) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, residual: None = None) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation of each row: (x − mean) / sqrt(variance + eps) · weight + bias.

    Args:
        x: [..., N], fp32, fp16 or bf16.
        weight, bias: [N], any of these dtypes.
        eps: added to the variance.
        residual: [..., N], added to x first; the sum has the wider of the two dtypes, as under autocast.

    Returns:
        y [..., N] in x's dtype; with `residual` the pair (y, x + residual), both in the sum's dtype.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, eps not positive.

    Source: Ba, Kiros and Hinton, https://arxiv.org/abs/1607.06450.
    """
    checks.check_float(x=x, weight=weight, bias=bias, residual=residual)
    checks.check_row("x", x)
    checks.check_shape("weight", weight, [x.shape[-1]], " (x's last dimension)")
    checks.check_shape("bias", bias, [x.shape[-1]], " (x's last dimension)")
    checks.check_device(x=x, weight=weight, bias=bias, residual=residual)
    checks.check_positive(eps=eps)
    if residual is not None:
        checks.check_shape("residual", residual, list(x.shape), " (x's)")
    mixed = any(tensor is not None and tensor.dtype != x.dtype for tensor in (weight, bias, residual))
    unsupported = devices.unsupported_reason(x, weight, bias, residual)
    if x.shape[-1] > tiles.MAX_COLUMNS:
        unsupported = f"rows of {x.shape[-1]} are longer than {tiles.MAX_COLUMNS}"
    # PyTorch's kernel is hard to beat alone; ours saves a pass over memory where there is an addition or a cast beside it.
    avoid = ("triton",) if residual is None and not mixed else ()
    chosen = select("layer_norm", x.device.type, {"triton": unsupported}, avoid)
    if chosen == "triton":
        if residual is None:
            return torch.ops.pg_kernels.layer_norm_triton(x, None, weight, bias, eps)[0]
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return torch.ops.pg_kernels.layer_norm_triton(x.to(dtype), residual.to(dtype), weight, bias, eps)[:2]
    if chosen == "native" and not mixed:  # the definition calls it too, on fp32 copies
        total = x if residual is None else x + residual
        with torch.autocast(x.device.type, enabled=False):
            y = F.layer_norm(total, weight.shape, weight, bias, eps)
        return y if residual is None else (y, total)
    if residual is None:
        return torch.ops.pg_kernels.layer_norm(x, weight, bias, eps)
    return torch.ops.pg_kernels.add_layer_norm(x, residual, weight, bias, eps)
