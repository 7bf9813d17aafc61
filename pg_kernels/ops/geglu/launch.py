"""Launches of geglu's Triton kernels."""

from __future__ import annotations

from torch import Tensor

from pg_kernels.ops._common import devices
from pg_kernels.ops._common.rows import Rows, rows_of
from pg_kernels.ops.geglu import tiles


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) · up, a new contiguous tensor."""
    from pg_kernels.ops.geglu import kernels

    y = gate.new_empty(gate.shape)
    if not y.numel():
        return y
    num_cols, (gate_rows, up_rows) = _as_rows(gate, up)
    chosen = tiles.choose(num_cols, devices.device_of(gate))
    num_blocks = -(-num_cols // chosen.block_n)
    with devices.on_device_of(gate):
        kernels.geglu_fwd_kernel[(gate_rows.count * num_blocks,)](
            gate_ptr=gate_rows.tensor,
            up_ptr=up_rows.tensor,
            y_ptr=y,
            num_cols=num_cols,
            num_blocks=num_blocks,
            gate_strides=gate_rows.strides,
            up_strides=up_rows.strides,
            BLOCK_N=chosen.block_n,
            num_warps=chosen.num_warps,
            enable_fp_fusion=True,
        )
    return y


def backward(grad: Tensor, gate: Tensor, up: Tensor, with_product: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, and gelu(gate) · up (empty unless `with_product`), in one pass over memory."""
    from pg_kernels.ops.geglu import kernels

    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    y = gate.new_empty(gate.shape if with_product else 0)
    if not grad.numel():
        return grad_gate, grad_up, y
    num_cols, (grad_rows, gate_rows, up_rows) = _as_rows(grad, gate, up)
    chosen = tiles.choose(num_cols, devices.device_of(gate))
    num_blocks = -(-num_cols // chosen.block_n)
    with devices.on_device_of(gate):
        kernels.geglu_bwd_kernel[(gate_rows.count * num_blocks,)](
            grad_ptr=grad_rows.tensor,
            gate_ptr=gate_rows.tensor,
            up_ptr=up_rows.tensor,
            grad_gate_ptr=grad_gate,
            grad_up_ptr=grad_up,
            y_ptr=y if with_product else None,
            num_cols=num_cols,
            num_blocks=num_blocks,
            grad_strides=grad_rows.strides,
            gate_strides=gate_rows.strides,
            up_strides=up_rows.strides,
            BLOCK_N=chosen.block_n,
            num_warps=chosen.num_warps,
            enable_fp_fusion=True,
        )
    return grad_gate, grad_up, y


def _as_rows(*tensors: Tensor) -> tuple[int, list[Rows]]:
    """Return the length of a row and the tensors as rows: a single row if all tensors are contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors) or tensors[0].dim() == 0:
        tensors = tuple(tensor.reshape(-1) for tensor in tensors)
    return tensors[0].shape[-1], [rows_of(tensor) for tensor in tensors]
