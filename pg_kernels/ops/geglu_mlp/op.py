from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices, extension
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops.geglu_mlp import reference, tiles


def _forward(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and with `keep` both projections for the backward pass: they cost a matrix product to compute again.

    The third intermediate, their product, costs one pass over memory, which the backward pass makes anyway.
    """
    chosen = tiles.choose(*_sizes(x, gate_weight), x.dtype, devices.device_of(x))
    if chosen is not None and not keep:
        y = F.linear(_fused(x, gate_weight, up_weight, chosen), down_weight)
        return y, x.new_empty(0), x.new_empty(0)
    gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
    y = F.linear(torch.ops.pg_kernels.geglu_triton(gate, up), down_weight)
    return (y, gate, up) if keep else (y, x.new_empty(0), x.new_empty(0))


def _fused(x: Tensor, gate_weight: Tensor, up_weight: Tensor, chosen: tiles.Tiles) -> Tensor:
    """gelu(x · gateᵀ) · (x · upᵀ) for x [M, K] in one kernel: [M, F]."""
    from pg_kernels.ops.geglu_mlp import kernels

    x, gate_weight, up_weight = (
        tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (x, gate_weight, up_weight)
    )
    rows, inner, features = _sizes(x, gate_weight)
    y = x.new_empty(rows, features)
    if y.numel():
        with devices.on_device_of(x):
            kernels.gate_up[(-(-rows // chosen.rows) * -(-features // chosen.features),)](
                x_ptr=x,
                gate_ptr=gate_weight,
                up_ptr=up_weight,
                y_ptr=y,
                rows=rows,
                features=features,
                inner=inner,
                x_stride=x.stride(0),
                gate_stride=gate_weight.stride(0),
                up_stride=up_weight.stride(0),
                ROWS=chosen.rows,
                FEATURES=chosen.features,
                BLOCK=chosen.inner,
                GROUP=chosen.group,
                EVEN=inner % chosen.inner == 0,
                WIDEN=devices.upcasts_dot_operands(x),
                num_warps=chosen.warps,
                num_stages=chosen.stages,
                enable_fp_fusion=True,
            )
    return y


def _sizes(x: Tensor, gate_weight: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], gate_weight.shape[0]


def _fake_forward(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = (x.shape[0], gate_weight.shape[0]) if keep else 0
    return x.new_empty(x.shape[0], down_weight.shape[0]), x.new_empty(kept), x.new_empty(kept)


def _native(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """PyTorch's matrix products, the extension's kernel between them; both have gradients of their own."""
    product = torch.ops.pg_kernels.geglu_native(F.linear(x, gate_weight), F.linear(x, up_weight))
    return F.linear(product, down_weight)


class _GeGLUMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, gate, up = torch.ops.pg_kernels.geglu_mlp_triton(x, gate_weight, up_weight, down_weight, keep)
        ctx.keep = keep
        ctx.save_for_backward(x, gate_weight, up_weight, down_weight, gate, up)
        ctx.mark_non_differentiable(gate, up)
        return y, gate, up

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("geglu_mlp")
        if not ctx.keep:
            raise RuntimeError("geglu_mlp_triton: a gradient needs what keep=True keeps")
        x, gate_weight, up_weight, down_weight, gate, up = ctx.saved_tensors
        needs_x, needs_gate, needs_up, needs_down = ctx.needs_input_grad[:4]
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
    "geglu_mlp_native(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight) -> Tensor", _native
)
define_opaque(
    "geglu_mlp_triton(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _GeGLUMLP.apply,
)


def geglu_mlp(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """Gemma's whole MLP: (gelu_tanh(x · gateᵀ) · (x · upᵀ)) · downᵀ.

    Args:
        x: [..., K], fp32, fp16 or bf16. Under autocast all four arguments are cast.
        gate_weight, up_weight: [F, K] in x's dtype.
        down_weight: [N, F] in x's dtype.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: a dtype that is not floating-point, or several dtypes.
        ValueError: shapes or devices that do not fit.

    Source: Shazeer, https://arxiv.org/abs/2002.05202.
    """
    checks.check_float(x=x, gate_weight=gate_weight, up_weight=up_weight, down_weight=down_weight)
    checks.check_row("x", x)
    checks.check_shape("gate_weight", gate_weight, ["F", x.shape[-1]], " (K is x's last dimension)")
    checks.check_shape("up_weight", up_weight, list(gate_weight.shape), " (gate_weight's)")
    checks.check_shape("down_weight", down_weight, ["N", gate_weight.shape[0]], " (F is gate_weight's first dimension)")
    x, gate_weight, up_weight, down_weight = checks.autocast(x, gate_weight, up_weight, down_weight)
    checks.check_same(x=x, gate_weight=gate_weight, up_weight=up_weight, down_weight=down_weight)
    backend = select(
        "geglu_mlp", x.device.type, {"triton": devices.unsupported_reason(x), "native": extension.unsupported_reason(x)}
    )
    if backend == "triton":
        tensors = (x.reshape(-1, x.shape[-1]), gate_weight, up_weight, down_weight)
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        y = torch.ops.pg_kernels.geglu_mlp_triton(*tensors, keep)[0]
        return y.reshape(*x.shape[:-1], down_weight.shape[0])
    if backend == "native":
        return torch.ops.pg_kernels.geglu_mlp_native(x, gate_weight, up_weight, down_weight)
    return torch.ops.pg_kernels.geglu_mlp(x, gate_weight, up_weight, down_weight)
