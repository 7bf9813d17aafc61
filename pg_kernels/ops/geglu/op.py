from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import offer, select
from pg_kernels.ops import checks, launch
from pg_kernels.ops.geglu import reference, tiles
from pg_kernels.ops.library import define_composite, define_opaque, refuse_second_derivative


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    from pg_kernels.ops.geglu import kernels

    y = gate.new_empty(gate.shape)
    if y.numel():
        columns, (gate_rows, up_rows) = _rows(gate, up)
        chosen = tiles.choose(columns, launch.device_of(gate))
        blocks = -(-columns // chosen.block)
        with launch.on_device_of(gate):
            kernels.forward[(gate_rows.count * blocks,)](
                gate_ptr=gate_rows.tensor,
                up_ptr=up_rows.tensor,
                y_ptr=y,
                columns=columns,
                blocks=blocks,
                gate_strides=gate_rows.strides,
                up_strides=up_rows.strides,
                BLOCK=chosen.block,
                num_warps=chosen.warps,
                enable_fp_fusion=True,
            )
    return y


def _backward(grad: Tensor, gate: Tensor, up: Tensor, with_product: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and the product itself (empty unless asked for), in one pass over memory."""
    from pg_kernels.ops.geglu import kernels

    grad_gate, grad_up, y = _fake_backward(grad, gate, up, with_product)
    if grad.numel():
        columns, (grad_rows, gate_rows, up_rows) = _rows(grad, gate, up)
        chosen = tiles.choose(columns, launch.device_of(gate))
        blocks = -(-columns // chosen.block)
        with launch.on_device_of(gate):
            kernels.backward[(gate_rows.count * blocks,)](
                grad_ptr=grad_rows.tensor,
                gate_ptr=gate_rows.tensor,
                up_ptr=up_rows.tensor,
                grad_gate_ptr=grad_gate,
                grad_up_ptr=grad_up,
                y_ptr=y if with_product else None,
                columns=columns,
                blocks=blocks,
                grad_strides=grad_rows.strides,
                gate_strides=gate_rows.strides,
                up_strides=up_rows.strides,
                BLOCK=chosen.block,
                num_warps=chosen.warps,
                enable_fp_fusion=True,
            )
    return grad_gate, grad_up, y


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor, with_product: bool) -> tuple[Tensor, Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape), gate.new_empty(gate.shape if with_product else 0)


def _rows(*tensors: Tensor) -> tuple[int, list[launch.Rows]]:
    """The length of a row, and the tensors as rows: one long one where all lie in one piece."""
    if all(tensor.is_contiguous() for tensor in tensors) or tensors[0].dim() == 0:
        tensors = tuple(tensor.reshape(-1) for tensor in tensors)
    return tensors[0].shape[-1], [launch.rows_of(tensor) for tensor in tensors]


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.pg_kernels.geglu_triton(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("geglu")
        grads = torch.ops.pg_kernels.geglu_triton_backward(grad, *ctx.saved_tensors, False)[:2]
        return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True))


offer("geglu", "triton", launch.obstacle)
define_composite("geglu(Tensor gate, Tensor up) -> Tensor", reference.geglu)
define_opaque(
    "geglu_triton(Tensor gate, Tensor up) -> Tensor",
    _forward,
    lambda gate, up: gate.new_empty(gate.shape),
    _GeGLU.apply,
)
define_opaque(
    "geglu_triton_backward(Tensor grad, Tensor gate, Tensor up, bool with_product) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gated linear unit with the tanh form of GELU: gelu(gate) · up, elementwise.

    Args:
        gate, up: of one shape [...] and dtype: fp32, fp16 or bf16.

    Returns:
        A new tensor of that shape and dtype.

    Raises:
        TypeError: a dtype that is not floating-point, or two dtypes.
        ValueError: shapes or devices that differ.

    Source: Shazeer, https://arxiv.org/abs/2002.05202.
    """
    checks.check_tensor(gate=gate)
    checks.check_float(gate=gate, up=up)
    checks.check_shape("up", up, list(gate.shape), " (gate's)")
    checks.check_same(gate=gate, up=up)
    if select("geglu", gate.device.type, {"triton": launch.unfit(gate)}) == "triton":
        return torch.ops.pg_kernels.geglu_triton(gate, up)
    return torch.ops.pg_kernels.geglu(gate, up)
