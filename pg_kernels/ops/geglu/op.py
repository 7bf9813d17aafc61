from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices, extension
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.extension import _C, FLOAT_CODES
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops._common.rows import Rows, rows_of
from pg_kernels.ops.geglu import reference, tiles


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    from pg_kernels.ops.geglu import kernels

    y = gate.new_empty(gate.shape)
    if y.numel():
        columns, (gate_rows, up_rows) = _rows(gate, up)
        chosen = tiles.choose(columns, devices.device_of(gate))
        blocks = -(-columns // chosen.block)
        with devices.on_device_of(gate):
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
        chosen = tiles.choose(columns, devices.device_of(gate))
        blocks = -(-columns // chosen.block)
        with devices.on_device_of(gate):
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


def _native_forward(gate: Tensor, up: Tensor) -> Tensor:
    _check_native(gate, up=up)
    gate, up = gate.contiguous(), up.contiguous()
    y = gate.new_empty(gate.shape)
    _C.geglu(
        gate=gate.data_ptr(),
        up=up.data_ptr(),
        y=y.data_ptr(),
        count=y.numel(),
        type=FLOAT_CODES[gate.dtype],
    )
    return y


def _native_backward(grad: Tensor, gate: Tensor, up: Tensor, with_product: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_native(gate, grad=grad, up=up)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up, y = _fake_backward(grad, gate, up, with_product)
    _C.geglu(
        grad=grad.data_ptr(),
        gate=gate.data_ptr(),
        up=up.data_ptr(),
        y=y.data_ptr() if with_product else 0,
        grad_gate=grad_gate.data_ptr(),
        grad_up=grad_up.data_ptr(),
        count=grad.numel(),
        type=FLOAT_CODES[gate.dtype],
    )
    return grad_gate, grad_up, y


def _check_native(gate: Tensor, **others: Tensor) -> None:
    """The extension takes addresses: everything must be as many numbers of one kind, whoever calls."""
    extension.check(gate=gate, **others)
    checks.check_same(gate=gate, **others)
    for name, tensor in others.items():
        checks.check_shape(name, tensor, gate.shape, " (gate's)")


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor, with_product: bool) -> tuple[Tensor, Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape), gate.new_empty(gate.shape if with_product else 0)


def _rows(*tensors: Tensor) -> tuple[int, list[Rows]]:
    """The length of a row, and the tensors as rows: one long one where all lie in one piece."""
    if all(tensor.is_contiguous() for tensor in tensors) or tensors[0].dim() == 0:
        tensors = tuple(tensor.reshape(-1) for tensor in tensors)
    return tensors[0].shape[-1], [rows_of(tensor) for tensor in tensors]


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, gate: Tensor, up: Tensor) -> Tensor:
        ctx.name = name
        ctx.save_for_backward(gate, up)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.pg_kernels, name)(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("geglu")
        grads = getattr(torch.ops.pg_kernels, f"{ctx.name}_backward")(grad, *ctx.saved_tensors, False)[:2]
        return None, *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[1:], strict=True))


register_backend("geglu", "triton", devices.unavailable_reason)
register_backend("geglu", "native", extension.unavailable_reason)
define_composite("geglu(Tensor gate, Tensor up) -> Tensor", reference.geglu)
for _name, _implementations in {
    "geglu_triton": (_forward, _backward),
    "geglu_native": (_native_forward, _native_backward),
}.items():
    define_opaque(
        f"{_name}(Tensor gate, Tensor up) -> Tensor",
        _implementations[0],
        lambda gate, up: gate.new_empty(gate.shape),
        partial(_GeGLU.apply, _name),
    )
    define_opaque(
        f"{_name}_backward(Tensor grad, Tensor gate, Tensor up, bool with_product) -> (Tensor, Tensor, Tensor)",
        _implementations[1],
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
    unsupported = {"triton": devices.unsupported_reason(gate), "native": extension.unsupported_reason(gate)}
    backend = select("geglu", gate.device.type, unsupported)
    if backend == "reference":
        return torch.ops.pg_kernels.geglu(gate, up)
    return getattr(torch.ops.pg_kernels, f"geglu_{backend}")(gate, up)
