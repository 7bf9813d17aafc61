"""Backend "native" on CPUs: calls of pg_kernels._C, with int8 weights in the layout of csrc/cpu/int8_linear.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pg_kernels.ops._common import extension
from pg_kernels.ops._common.extension import _C, FLOAT_CODES

_STEP = 4
"""Columns of a weight that lie together."""


def packed_sizes(rows: int, columns: int, group_size: int) -> tuple[int, int]:
    """Bytes and scales that `pack` gives."""
    padded = -(-rows // 16) * 16
    return padded * _steps(columns, group_size) * _STEP, padded * -(-columns // group_size)


def _steps(k: int, group_size: int) -> int:
    """Every group of columns begins at a step."""
    whole = -(-k // group_size) - 1
    return whole * -(-group_size // _STEP) + -(-(k - whole * group_size) // _STEP)


def unsupported_reason(x: Tensor, group_size: int, columns: int) -> str | None:
    """Why the kernels cannot multiply x, or None when they can."""
    return extension.unsupported_reason(x)


def groups_fit(columns: int, group_size: int) -> bool:
    """Whether the kernels take a weight in groups of so many columns."""
    return True


def pack(qweight: Tensor, scale: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and scales [N, groups] as the kernels read them: uint8 and fp32, both flat."""
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
    """The inverse: int8 [N, K] and scales [N, groups]."""
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


def rows_of(data: Tensor, packed_scale: Tensor, indices: Tensor, n: int, k: int, group_size: int) -> Tensor:
    """Rows by int64 indices [R], dequantised: fp32 [R, K]. The indices are in [0, N)."""
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


def multiply(
    x: Tensor,
    data: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int],
    group_size: int,
    int8_activations: bool,
    out_dtype: torch.dtype,
    geglu: bool = False,
) -> list[Tensor]:
    """x [M, K] times each of some packed weights, `sizes` their rows; `geglu` makes one of two."""
    x = x.to(out_dtype).contiguous()
    biases = [None if bias is None else bias.float().contiguous() for bias in biases]
    outputs = [x.new_empty(x.shape[0], n) for n in (sizes[:1] if geglu else sizes)]
    given = zip(sizes, data, scales, biases, outputs * 2 if geglu else outputs, strict=True)
    weights = [
        (n, weight.data_ptr(), scale.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr())
        for n, weight, scale, bias, y in given
    ]
    _call(x, weights, group_size, int8_activations, geglu=geglu)
    return outputs


def topk(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    n: int,
    group_size: int,
    int8_activations: bool,
    k: int,
    softcap: float | None,
    log_probs: bool,
) -> tuple[Tensor, Tensor]:
    """The k largest products of each row of x, fp32 [M, k], and their places; of equal ones the first."""
    x = x.contiguous()
    values = x.new_empty(len(x), k, dtype=torch.float32)
    indices = x.new_empty(len(x), k, dtype=torch.int64)
    log_sums = values.new_empty(len(x) if log_probs else 0)
    top = (k, softcap or 0.0, values.data_ptr(), indices.data_ptr(), log_sums.data_ptr() if log_probs else 0)
    _call(x, [(n, weight.data_ptr(), scale.data_ptr(), 0, 0)], group_size, int8_activations, top=top)
    return values - log_sums[:, None] if log_probs else values, indices


def _call(
    x: Tensor,
    weights: list[tuple[int, int, int, int, int]],
    group_size: int,
    int8_activations: bool,
    *,
    geglu: bool = False,
    top: tuple[int, float, int, int, int] | None = None,
) -> None:
    _C.int8_linear(
        x=x.data_ptr(),
        m=x.shape[0],
        k=x.shape[1],
        group=group_size,
        type=FLOAT_CODES[x.dtype],
        weights=weights,
        int8_activations=int8_activations,
        geglu=geglu,
        top=top,
    )
