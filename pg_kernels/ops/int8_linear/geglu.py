"""`int8_geglu`: the first half of a GeGLU MLP with int8 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pg_kernels.ops._common import checks
from pg_kernels.ops._common.autograd import needs_autograd
from pg_kernels.ops._common.registration import define_opaque
from pg_kernels.ops.geglu import geglu
from pg_kernels.ops.int8_linear.dispatch import check_packed, multiply, prepare
from pg_kernels.ops.int8_linear.packed import PackedInt8Weight
from pg_kernels.ops.int8_linear.product import Int8Product
from pg_kernels.ops.int8_linear.projections import int8_projections


def int8_geglu(x: Tensor, gate: PackedInt8Weight, up: PackedInt8Weight, *, activations: str = "keep") -> Tensor:
    """Compute gelu_tanh(x · gateᵀ) · (x · upᵀ). Without gradients it is one call that rounds to x's dtype only at its end.

    Args:
        x: [..., K], fp32, fp16 or bf16. Under autocast x is cast.
        gate, up: packed, both [N, K].
        activations: as for `int8_linear`.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: as `int8_linear`; ValueError for weights of different shapes.
    """
    check_packed(gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"up: expected shape {list(gate.shape)} (gate's), got {list(up.shape)}")
    x, backend = prepare(x, [gate, up], [None, None], activations)
    fused = backend == "triton" or (backend == "native" and gate._is_native and up._is_native)
    if not fused or gate.group_size != up.group_size or needs_autograd(x):
        return geglu(*int8_projections(x, [gate, up], activations=activations))
    y = torch.ops.pg_kernels.int8_geglu(
        x.reshape(-1, x.shape[-1]),
        *gate._operands(backend),
        *up._operands(backend),
        gate.shape[0],
        gate.group_size,
        activations == "int8",
        backend,
    )
    return y.reshape(*x.shape[:-1], gate.shape[0])


def _forward(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    n: int,
    group_size: int,
    int8_activations: bool,
    backend: str,
) -> Tensor:
    checks.check_tensor(x=x)
    product = Int8Product(
        [gate, up], [gate_scale, up_scale], [None, None], [n, n], group_size, int8_activations, x.dtype, geglu=True
    )
    return multiply(x, product, backend)[0]


def _fake(x: Tensor, gate: Tensor, gate_scale: Tensor, up: Tensor, up_scale: Tensor, n: int, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], n)


# Without gradients. The weights are in the extension's layout with backend "native", else int8 [N, K].
define_opaque(
    "int8_geglu(Tensor x, Tensor gate, Tensor gate_scale, Tensor up, Tensor up_scale, SymInt n, SymInt group_size, "
    "bool int8_activations, str backend) -> Tensor",
    _forward,
    _fake,
)
