"""`int8_projections`: one input times several int8 weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pg_kernels.ops._common import checks
from pg_kernels.ops._common.autograd import needs_autograd
from pg_kernels.ops._common.registration import define_opaque
from pg_kernels.ops.int8_linear.dispatch import multiply, prepare
from pg_kernels.ops.int8_linear.op import int8_linear
from pg_kernels.ops.int8_linear.packed import PackedInt8Weight
from pg_kernels.ops.int8_linear.product import Int8Product


def int8_projections(
    x: Tensor,
    weights: Sequence[PackedInt8Weight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activations: str = "keep",
) -> tuple[Tensor, ...]:
    """Multiply one input by several weights, each as `int8_linear` does. Without gradients it is one call.

    Args:
        x: [..., K], fp32, fp16 or bf16. Under autocast x is cast.
        weights: packed, with the same number of columns K.
        biases: one for each weight, [N] or None; default: none.
        activations: as for `int8_linear`.

    Returns:
        [..., N] for each weight, in x's dtype.

    Raises:
        TypeError, ValueError: as `int8_linear`; ValueError for no weights or another number of biases.
    """
    for name, given in (("weights", weights), ("biases", biases)):
        if not isinstance(given, list | tuple) and (given is not None or name == "weights"):
            raise TypeError(f"{name}: expected a list or a tuple, got {type(given).__name__}")
    biases = [None] * len(weights) if biases is None else biases
    if not weights or len(biases) != len(weights):
        raise ValueError(f"weights: expected one or more, and as many biases; got {len(weights)} and {len(biases)}")
    x, backend = prepare(x, weights, biases, activations)
    group_sizes = {weight.group_size for weight in weights}
    native = backend == "native" and all(weight._is_native for weight in weights)
    if not native or len(group_sizes) > 1 or needs_autograd(x, *biases):
        return tuple(int8_linear(x, w, bias=b, activations=activations) for w, b in zip(weights, biases, strict=True))
    outputs = torch.ops.pg_kernels.int8_projections(
        x.reshape(-1, x.shape[-1]),
        [weight._data for weight in weights],
        [weight._scale for weight in weights],
        list(biases),
        [weight.shape[0] for weight in weights],
        group_sizes.pop(),
        activations == "int8",
    )
    return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in outputs)


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int],
    group_size: int,
    int8_activations: bool,
) -> list[Tensor]:
    checks.check_tensor(x=x)
    return multiply(
        x, Int8Product(weights, scales, biases, sizes, group_size, int8_activations, x.dtype), backend="native"
    )


def _fake(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Any, sizes: Sequence[int], *rest: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], n) for n in sizes]


# Without gradients. The weights are in the extension's layout.
define_opaque(
    "int8_projections(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] biases, SymInt[] sizes, SymInt group_size, "
    "bool int8_activations) -> Tensor[]",
    _forward,
    _fake,
)
