"""The public function layer_norm, and registration with PyTorch."""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops.layer_norm import launch, reference, tiles


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, residual: None = None) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each row by its mean and variance: (x − mean) / sqrt(variance + eps) · weight + bias.

    Args:
        x: [..., N], fp32, fp16 or bf16.
        weight, bias: [N], any of these dtypes.
        eps: added to the variance.
        residual: [..., N], added to x before the norm. If the dtypes differ, as under autocast, the sum has the wider one.

    Returns:
        y [..., N] in x's dtype. With `residual` the pair (y, x + residual), both in the sum's dtype.

    Raises:
        TypeError: a dtype is not floating-point.
        ValueError: shapes or devices do not match, or eps is not positive.

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
    unsupported = {"triton": devices.unsupported_reason(x, weight, bias, residual)}
    if x.shape[-1] > tiles.MAX_COLS:
        unsupported["triton"] = f"rows of {x.shape[-1]} are longer than {tiles.MAX_COLS}"
    mixed_dtypes = any(tensor is not None and tensor.dtype != x.dtype for tensor in (weight, bias, residual))
    # PyTorch's kernel alone is hard to beat. The Triton kernel saves a pass over memory if there is an addition or a cast.
    avoid = ("triton",) if residual is None and not mixed_dtypes else ()
    backend = select("layer_norm", x.device.type, unsupported, avoid)
    if backend == "triton":
        if residual is None:
            return torch.ops.pg_kernels.layer_norm_triton(x, None, weight, bias, eps)[0]
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return torch.ops.pg_kernels.layer_norm_triton(x.to(dtype), residual.to(dtype), weight, bias, eps)[:2]
    if (
        backend == "native" and not mixed_dtypes
    ):  # with mixed dtypes the reference calls PyTorch's kernel on fp32 copies
        total = x if residual is None else x + residual
        with torch.autocast(x.device.type, enabled=False):
            y = F.layer_norm(total, weight.shape, weight, bias, eps)
        return y if residual is None else (y, total)
    if residual is None:
        return torch.ops.pg_kernels.layer_norm(x, weight, bias, eps)
    return torch.ops.pg_kernels.add_layer_norm(x, residual, weight, bias, eps)


def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, torch.empty_like(mean)


def _fake_backward(grad_y: Tensor, grad_total: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    needs_parameters = rest[-1]
    return x.new_empty(x.shape), x.new_empty((2, x.shape[-1]) if needs_parameters else 0, dtype=torch.float32)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            y, total, mean, rstd = torch.ops.pg_kernels.layer_norm_triton(x, residual, weight, bias, eps)
        ctx.bias_dtype = bias.dtype
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        ctx.mark_non_differentiable(*((total, mean, rstd) if residual is None else (mean, rstd)))
        ctx.set_materialize_grads(False)
        return y, total, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("layer_norm")
        needs_x, needs_residual, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if grad_y is None:  # only x + residual was used
            return grad_total, grad_total if needs_residual else None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        grad_x, grad_parameters = torch.ops.pg_kernels.layer_norm_triton_backward(
            grad_y, grad_total, x, weight, mean, rstd, needs_weight or needs_bias
        )
        return (
            grad_x if needs_x else None,
            grad_x if needs_residual else None,
            grad_parameters[0].to(weight.dtype) if needs_weight else None,
            grad_parameters[1].to(ctx.bias_dtype) if needs_bias else None,
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
    launch.forward,
    _fake_forward,
    _LayerNorm.apply,
)
define_opaque(
    "layer_norm_triton_backward(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
    "bool needs_parameters) -> (Tensor, Tensor)",
    launch.backward,
    _fake_backward,
)
