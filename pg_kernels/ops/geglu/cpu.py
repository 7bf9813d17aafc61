"""geglu in the C++ extension."""

from __future__ import annotations

from torch import Tensor

from pg_kernels.ops._common import checks, extension
from pg_kernels.ops._common.extension import _C, FLOAT_CODES


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) · up, a new contiguous tensor."""
    _check(gate, up=up)
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


def backward(grad: Tensor, gate: Tensor, up: Tensor, with_product: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, and gelu(gate) · up (empty unless `with_product`), in one pass over memory."""
    _check(gate, grad=grad, up=up)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    y = gate.new_empty(gate.shape if with_product else 0)
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


def _check(gate: Tensor, **others: Tensor) -> None:
    # The extension takes addresses: check sizes even if the registered op is called directly.
    extension.check(gate=gate, **others)
    checks.check_same(gate=gate, **others)
    for name, tensor in others.items():
        checks.check_shape(name, tensor, gate.shape, " (gate's)")
