"""The public function rms_norm, and registration with PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices, extension
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops.rms_norm import cpu, launch, reference, tiles


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
    """Normalise each row by its root mean square: x / sqrt(mean(x²) + eps) · (weight_offset + weight).

    Args:
        x: [..., N], fp32, fp16 or bf16.
        weight: [N], any of these dtypes.
        eps: added to the mean square.
        weight_offset: 1 for Gemma, whose checkpoints store the weight minus one; 0 for Llama.
        residual: [..., N], added to x before the norm. If the dtypes differ, as under autocast, the sum has the wider one.

    Returns:
        y [..., N] in x's dtype. With `residual` the pair (y, x + residual), both in the sum's dtype.

    Raises:
        TypeError: a dtype is not floating-point.
        ValueError: shapes or devices do not match, or eps is not positive.

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
    unsupported = {
        "triton": devices.unsupported_reason(x, weight, residual),
        "native": extension.unsupported_reason(x, weight, residual),
    }
    if x.shape[-1] > tiles.MAX_COLS:
        unsupported["triton"] = f"rows of {x.shape[-1]} are longer than {tiles.MAX_COLS}"
    backend = select("rms_norm", x.device.type, unsupported)
    if backend == "reference":
        if residual is None:
            return torch.ops.pg_kernels.rms_norm(x, weight, eps, weight_offset)
        return torch.ops.pg_kernels.add_rms_norm(x, residual, weight, eps, weight_offset)
    op = getattr(torch.ops.pg_kernels, f"rms_norm_{backend}")
    if residual is None:
        return op(x, None, weight, eps, weight_offset)[0]
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return op(x.to(dtype), residual.to(dtype), weight, eps, weight_offset)[:2]


def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_backward(
    grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    needs_weight = rest[-1]
    return x.new_empty(x.shape), weight.new_empty(weight.shape if needs_weight else 0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            op = getattr(torch.ops.pg_kernels, f"rms_norm_{backend}")
            y, total, rstd = op(x, residual, weight, eps, weight_offset)
        ctx.backend, ctx.weight_offset = backend, weight_offset
        ctx.save_for_backward(x if residual is None else total, weight, rstd)
        ctx.mark_non_differentiable(*((total, rstd) if residual is None else (rstd,)))
        ctx.set_materialize_grads(False)
        return y, total, rstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("rms_norm")
        _, needs_x, needs_residual, needs_weight, *_ = ctx.needs_input_grad
        if grad_y is None:  # only x + residual was used
            return None, grad_total, grad_total if needs_residual else None, None, None, None
        op = getattr(torch.ops.pg_kernels, f"rms_norm_{ctx.backend}_backward")
        grad_x, grad_weight = op(grad_y, grad_total, *ctx.saved_tensors, ctx.weight_offset, needs_weight)
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
for _backend, _implementation in {"triton": launch, "native": cpu}.items():
    define_opaque(
        f"rms_norm_{_backend}(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_offset) "
        "-> (Tensor, Tensor, Tensor)",
        _implementation.forward,
        _fake_forward,
        partial(_RMSNorm.apply, _backend),
    )
    define_opaque(
        f"rms_norm_{_backend}_backward(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor weight, Tensor rstd, "
        "float weight_offset, bool needs_weight) -> (Tensor, Tensor)",
        _implementation.backward,
        _fake_backward,
    )
