from __future__ import annotations

from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices, extension
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.extension import _C, FLOAT_CODES
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops._common.rows import rows_of
from pg_kernels.ops.rms_norm import reference, tiles


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    from pg_kernels.ops.rms_norm import kernels

    rows, other = rows_of(x), rows_of(x if residual is None else residual)
    y, total, rstd = _fake_forward(x, residual)
    if x.numel():
        chosen = tiles.forward(x.shape[-1], x.element_size(), devices.device_of(x))
        with devices.on_device_of(x):
            kernels.forward[(-(-rows.count // chosen.rows),)](
                x_ptr=rows.tensor,
                residual_ptr=None if residual is None else other.tensor,
                weight_ptr=weight.contiguous(),
                y_ptr=y,
                total_ptr=None if residual is None else total,
                rstd_ptr=rstd,
                rows=rows.count,
                x_strides=rows.strides,
                residual_strides=other.strides,
                eps=eps,
                weight_offset=weight_offset,
                COLUMNS=x.shape[-1],
                BLOCK=chosen.block,
                ROWS=chosen.rows,
                num_warps=chosen.warps,
                enable_fp_fusion=True,
            )
    return y, total, rstd


def _native_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    # It takes addresses: the sizes must fit, whoever calls.
    extension.check(x=x, residual=x if residual is None else residual, weight=weight)
    checks.check_row("x", x)
    checks.check_shape("weight", weight, [x.shape[-1]], " (x's last dimension)")
    if residual is not None:
        checks.check_same(x=x, residual=residual)
        checks.check_shape("residual", residual, x.shape, " (x's)")
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    y, total, rstd = _fake_forward(x, residual)
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


def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    return y, total, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    from pg_kernels.ops.rms_norm import kernels

    columns = x.shape[-1]
    grad_x, grad_weight = _fake_backward(grad_y, grad_total, x, weight, rstd, weight_offset, needs_weight)
    if not x.numel():
        return grad_x, grad_weight.zero_()
    y_rows, x_rows = rows_of(grad_y), rows_of(x)
    total_rows = y_rows if grad_total is None else rows_of(grad_total)
    device = devices.device_of(x)
    chosen, programs = tiles.backward(columns, x.element_size(), device), tiles.programs(x_rows.count, device)
    kernel = kernels.backward if chosen.block >= columns else kernels.backward_wide
    partial = x.new_zeros(programs, columns, dtype=torch.float32) if needs_weight else None
    with devices.on_device_of(x):
        kernel[(programs,)](
            grad_y_ptr=y_rows.tensor,
            grad_total_ptr=None if grad_total is None else total_rows.tensor,
            x_ptr=x_rows.tensor,
            weight_ptr=weight.contiguous(),
            rstd_ptr=rstd,
            grad_x_ptr=grad_x,
            partial_ptr=partial,
            rows=x_rows.count,
            y_strides=y_rows.strides,
            total_strides=total_rows.strides,
            x_strides=x_rows.strides,
            weight_offset=weight_offset,
            COLUMNS=columns,
            BLOCK=chosen.block,
            num_warps=chosen.warps,
            enable_fp_fusion=True,
        )
    return grad_x, grad_weight if partial is None else partial.sum(0).to(weight.dtype)


def _native_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    normed, grad = x.float() * rstd[..., None], grad_y.float()
    grad_normed = grad * (weight_offset + weight.float())
    grad_x = (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True)) * rstd[..., None]
    if grad_total is not None:
        grad_x += grad_total
    _, grad_weight = _fake_backward(grad_y, grad_total, x, weight, rstd, weight_offset, needs_weight)
    if needs_weight:
        grad_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return grad_x.to(x.dtype), grad_weight


def _fake_backward(
    grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if rest[-1] else 0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            y, total, rstd = getattr(torch.ops.pg_kernels, name)(x, residual, weight, eps, weight_offset)
        ctx.name = name
        ctx.save_for_backward(x if residual is None else total, weight, rstd)
        ctx.weight_offset = weight_offset
        ctx.mark_non_differentiable(*((total, rstd) if residual is None else (rstd,)))
        ctx.set_materialize_grads(False)
        return y, total, rstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("rms_norm")
        needs_x, needs_residual, needs_weight = ctx.needs_input_grad[1:4]
        if grad_y is None:  # only the sum was used
            return None, grad_total, grad_total if needs_residual else None, None, None, None
        grad_x, grad_weight = getattr(torch.ops.pg_kernels, f"{ctx.name}_backward")(
            grad_y, grad_total, *ctx.saved_tensors, ctx.weight_offset, needs_weight
        )
        return (
            None,
            grad_x if needs_x else None,
            grad_x if needs_residual else None,
            grad_weight if needs_weight else None,
            None,
            None,
        )


register_backend("rms_norm", "triton", devices.unavailable_reason)
register_backend("rms_norm", "native", extension.unavailable_reason)
define_composite("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor", reference.rms_norm)
define_composite(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset) -> (Tensor, Tensor)",
    reference.add_rms_norm,
)
for _name, _implementations in {
    "rms_norm_triton": (_forward, _backward),
    "rms_norm_native": (_native_forward, _native_backward),
}.items():
    define_opaque(
        f"{_name}(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_offset) -> (Tensor, Tensor, Tensor)",
        _implementations[0],
        _fake_forward,
        partial(_RMSNorm.apply, _name),
    )
    define_opaque(
        f"{_name}_backward(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor weight, Tensor rstd, float weight_offset, "
        "bool needs_weight) -> (Tensor, Tensor)",
        _implementations[1],
        _fake_backward,
    )


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = ..., *, weight_offset: float = ..., residual: None = None
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = ..., *, weight_offset: float = ..., residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_offset: float = 1.0, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation of each row, Gemma's by default: x / sqrt(mean(x²) + eps) · (weight_offset + weight).

    Args:
        x: [..., N], fp32, fp16 or bf16.
        weight: [N], any of these dtypes.
        eps: added to the mean square.
        weight_offset: 1 for Gemma, whose checkpoints store the weight minus one; 0 for Llama.
        residual: [..., N], added to x first; the sum has the wider of the two dtypes, as under autocast.

    Returns:
        y [..., N] in x's dtype; with `residual` the pair (y, x + residual), both in the sum's dtype.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, eps not positive.

    Source: Zhang and Sennrich, https://arxiv.org/abs/1910.07467; 1 + weight and fp32 as in Gemma's original code.
    """
    checks.check_float(x=x, weight=weight, residual=residual)
    checks.check_row("x", x)
    checks.check_shape("weight", weight, [x.shape[-1]], " (x's last dimension)")
    checks.check_device(x=x, weight=weight, residual=residual)
    checks.check_positive(eps=eps)
    checks.check_number(weight_offset=weight_offset)
    if residual is not None:
        checks.check_shape("residual", residual, list(x.shape), " (x's)")
    unsupported = devices.unsupported_reason(x, weight, residual)
    if x.shape[-1] > tiles.MAX_COLUMNS:
        unsupported = f"rows of {x.shape[-1]} are longer than {tiles.MAX_COLUMNS}"
    backend = select(
        "rms_norm", x.device.type, {"triton": unsupported, "native": extension.unsupported_reason(x, weight, residual)}
    )
    if backend != "reference":
        fused = getattr(torch.ops.pg_kernels, f"rms_norm_{backend}")
        if residual is None:
            return fused(x, None, weight, eps, weight_offset)[0]
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return fused(x.to(dtype), residual.to(dtype), weight, eps, weight_offset)[:2]
    if residual is None:
        return torch.ops.pg_kernels.rms_norm(x, weight, eps, weight_offset)
    return torch.ops.pg_kernels.add_rms_norm(x, residual, weight, eps, weight_offset)
