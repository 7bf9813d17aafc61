"""The public function geglu_mlp, and registration with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices, extension
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops.geglu_mlp import cpu, launch, reference


def geglu_mlp(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """Compute Gemma's MLP: (gelu_tanh(x · gateᵀ) · (x · upᵀ)) · downᵀ.

    Args:
        x: [..., K], fp32, fp16 or bf16. Under autocast all four arguments are cast.
        gate_weight, up_weight: [F, K] in x's dtype.
        down_weight: [N, F] in x's dtype.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: a dtype is not floating-point, or the dtypes differ.
        ValueError: shapes or devices do not match.

    Source: Shazeer, https://arxiv.org/abs/2002.05202.
    """
    checks.check_float(x=x, gate_weight=gate_weight, up_weight=up_weight, down_weight=down_weight)
    checks.check_row("x", x)
    checks.check_shape("gate_weight", gate_weight, ["F", x.shape[-1]], " (K is x's last dimension)")
    checks.check_shape("up_weight", up_weight, list(gate_weight.shape), " (gate_weight's)")
    checks.check_shape("down_weight", down_weight, ["N", gate_weight.shape[0]], " (F is gate_weight's first dimension)")
    x, gate_weight, up_weight, down_weight = checks.autocast(x, gate_weight, up_weight, down_weight)
    checks.check_same(x=x, gate_weight=gate_weight, up_weight=up_weight, down_weight=down_weight)
    unsupported = {"triton": devices.unsupported_reason(x), "native": extension.unsupported_reason(x)}
    backend = select("geglu_mlp", x.device.type, unsupported)
    if backend == "reference":
        return torch.ops.pg_kernels.geglu_mlp(x, gate_weight, up_weight, down_weight)
    if backend == "native":
        return torch.ops.pg_kernels.geglu_mlp_native(x, gate_weight, up_weight, down_weight)
    tensors = (x.reshape(-1, x.shape[-1]), gate_weight, up_weight, down_weight)
    keep_projections = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    y, _, _ = torch.ops.pg_kernels.geglu_mlp_triton(*tensors, keep_projections)
    return y.reshape(*x.shape[:-1], down_weight.shape[0])


def _fake_forward(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, keep_projections: bool
) -> tuple[Tensor, Tensor, Tensor]:
    projection = (x.shape[0], gate_weight.shape[0]) if keep_projections else 0
    return x.new_empty(x.shape[0], down_weight.shape[0]), x.new_empty(projection), x.new_empty(projection)


class _GeGLUMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, keep_projections: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, gate, up = torch.ops.pg_kernels.geglu_mlp_triton(
                x, gate_weight, up_weight, down_weight, keep_projections
            )
        ctx.keep_projections = keep_projections
        ctx.save_for_backward(x, gate_weight, up_weight, down_weight, gate, up)
        ctx.mark_non_differentiable(gate, up)
        return y, gate, up

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("geglu_mlp")
        if not ctx.keep_projections:
            raise RuntimeError("geglu_mlp_triton: a gradient needs keep_projections=True")
        x, gate_weight, up_weight, down_weight, gate, up = ctx.saved_tensors
        needs_x, needs_gate, needs_up, needs_down, _ = ctx.needs_input_grad
        if not (needs_x or needs_gate or needs_up):
            return None, None, None, grad.T @ torch.ops.pg_kernels.geglu_triton(gate, up), None
        grad_gate, grad_up, product = torch.ops.pg_kernels.geglu_triton_backward(
            grad @ down_weight, gate, up, needs_down
        )
        return (
            torch.addmm(grad_gate @ gate_weight, grad_up, up_weight) if needs_x else None,
            grad_gate.T @ x if needs_gate else None,
            grad_up.T @ x if needs_up else None,
            grad.T @ product if needs_down else None,
            None,
        )


register_backend("geglu_mlp", "triton", devices.unavailable_reason)
register_backend("geglu_mlp", "native", extension.unavailable_reason)
define_composite(
    "geglu_mlp(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight) -> Tensor", reference.geglu_mlp
)
define_composite(
    "geglu_mlp_native(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight) -> Tensor", cpu.forward
)
define_opaque(
    "geglu_mlp_triton(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight, bool keep_projections) "
    "-> (Tensor, Tensor, Tensor)",
    launch.forward,
    _fake_forward,
    _GeGLUMLP.apply,
)
