"""Backend "native" on CPUs: calls of pg_kernels._C, with int8 weights in the layout of csrc/cpu/int8_linear.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pg_kernels.ops._common import extension
from pg_kernels.ops._common.extension import _C, FLOAT_CODES
from pg_kernels.ops.int8_linear.product import Int8Product

_STEP = 4
"""Columns of a row that lie together in the layout."""
_PADDED_ROWS = 16
"""The layout pads N to a multiple of it."""


def packed_sizes(n: int, k: int, group_size: int) -> tuple[int, int]:
    """Return the lengths of what `pack` returns: bytes of the weight, and scales."""
    padded_n = -(-n // _PADDED_ROWS) * _PADDED_ROWS
    return padded_n * _steps(k, group_size) * _STEP, padded_n * -(-k // group_size)


def _steps(k: int, group_size: int) -> int:
    """Count the steps of a row. Every group of columns begins at a step."""
    whole_groups = -(-k // group_size) - 1
    return whole_groups * -(-group_size // _STEP) + -(-(k - whole_groups * group_size) // _STEP)


def unsupported_reason(x: Tensor, group_size: int, k: int) -> str | None:
    """Return why the kernels cannot multiply x, or None if they can."""
    return extension.unsupported_reason(x)


def supports_groups(k: int, group_size: int) -> bool:
    """Return whether the kernels take a weight [N, k] in groups of this size: all do here."""
    return True


def pack(qweight: Tensor, scale: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Lay out int8 [N, K] and scales [N, groups] for the kernels: uint8 and fp32, both flat."""
    qweight, scale = qweight.contiguous(), scale.contiguous()
    n, k = qweight.shape
    sizes = packed_sizes(n, k, group_size)
    data, packed_scale = qweight.new_empty(sizes[0], dtype=torch.uint8), scale.new_empty(sizes[1])
    _C.pack_int8(
        n=n,
        k=k,
        group=group_size,
        q=qweight.data_ptr(),
        scale=scale.data_ptr(),
        packed=data.data_ptr(),
        packed_scale=packed_scale.data_ptr(),
    )
    return data, packed_scale


def unpack(data: Tensor, packed_scale: Tensor, n: int, k: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Undo `pack`: return int8 [n, k] and scales [n, groups]."""
    qweight = data.new_empty(n, k, dtype=torch.int8)
    scale = packed_scale.new_empty(n, -(-k // group_size))
    _C.unpack_int8(
        n=n,
        k=k,
        group=group_size,
        packed=data.data_ptr(),
        packed_scale=packed_scale.data_ptr(),
        q=qweight.data_ptr(),
        scale=scale.data_ptr(),
    )
    return qweight, scale


def dequantize_rows(data: Tensor, packed_scale: Tensor, indices: Tensor, n: int, k: int, group_size: int) -> Tensor:
    """Return the rows at int64 indices [R], which must lie in [0, n): fp32 [R, k]."""
    indices = indices.contiguous()
    rows = packed_scale.new_empty(len(indices), k)
    _C.dequantize_rows(
        n=n,
        k=k,
        group=group_size,
        packed=data.data_ptr(),
        packed_scale=packed_scale.data_ptr(),
        indices=indices.data_ptr(),
        count=len(indices),
        out=rows.data_ptr(),
    )
    return rows


def multiply(x: Tensor, product: Int8Product) -> list[Tensor]:
    """Multiply x [M, K] by the product's packed weights: [M, N] for each of them, or one output with `geglu`."""
    x = x.to(product.out_dtype).contiguous()
    biases = [None if bias is None else bias.float().contiguous() for bias in product.biases]
    outputs = product.empty_outputs(x)
    # With geglu both weights name the one output.
    each = zip(
        product.sizes,
        product.weights,
        product.scales,
        biases,
        outputs * 2 if product.geglu else outputs,
        strict=True,
    )
    weights = [
        (n, weight.data_ptr(), scale.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr())
        for n, weight, scale, bias, y in each
    ]
    _call(x, weights, product)
    return outputs


def topk(x: Tensor, product: Int8Product, k: int, softcap: float | None, log_probs: bool) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row of x [M, K] times the product's only weight, and their indices in [0, N).

    Both are [M, k], fp32 and int64; of equal values the lower index comes first. `softcap` and `log_probs` as for `int8_topk`.
    """
    x = x.contiguous()
    values = x.new_empty(len(x), k, dtype=torch.float32)
    indices = x.new_empty(len(x), k, dtype=torch.int64)
    log_sums = values.new_empty(len(x) if log_probs else 0)
    top = (k, softcap or 0.0, values.data_ptr(), indices.data_ptr(), log_sums.data_ptr() if log_probs else 0)
    (n,), (weight,), (scale,) = product.sizes, product.weights, product.scales
    _call(x, [(n, weight.data_ptr(), scale.data_ptr(), 0, 0)], product, top)
    return values - log_sums[:, None] if log_probs else values, indices


def _call(
    x: Tensor,
    weights: list[tuple[int, int, int, int, int]],
    product: Int8Product,
    top: tuple[int, float, int, int, int] | None = None,
) -> None:
    _C.int8_linear(
        x=x.data_ptr(),
        m=x.shape[0],
        k=x.shape[1],
        group=product.group_size,
        type=FLOAT_CODES[x.dtype],
        weights=weights,
        int8_activations=product.int8_activations,
        geglu=product.geglu,
        top=top,
    )
