"""Backend "native" on CUDA: int8 weights in the order of the tensor cores' registers, and calls of pg_kernels._cuda."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_kernels.ops._common import devices, extension
from pg_kernels.ops._common.extension import FLOAT_CODES
from pg_kernels.ops.int8_linear import tiles

_TILE, _CHUNK = 16, 32
"""Rows and columns that lie together: kTileRows and kChunk of csrc/cuda/int8_linear.h."""
_MOST_WEIGHTS = 4
EMULATED = 80
"""The number of the device that the tests' emulator is."""


def unsupported_reason(x: Tensor, group_size: int, columns: int) -> str | None:
    """Why the kernels cannot multiply x [M, K] by a weight in groups of this many columns, or None when they can."""
    if not groups_fit(columns, group_size):
        return f"groups of {group_size} columns are not a multiple of {_CHUNK}"
    return extension.unsupported_reason(x)


def groups_fit(columns: int, group_size: int) -> bool:
    """Whether the kernels take a weight in groups of so many columns."""
    return group_size >= columns or group_size % _CHUNK == 0


def pack(qweight: Tensor, scale: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and scales [N, groups] as the kernels read them: uint8, and the scales in their order, both flat."""
    rows, columns = qweight.shape
    padded = F.pad(qweight, (0, -columns % _CHUNK, 0, -rows % _TILE))
    # Row: tile, half of the tile, lane / 4. Column: chunk, half of the chunk, eight of it, lane % 4, one of two.
    parts = padded.view(padded.shape[0] // _TILE, 2, 8, padded.shape[1] // _CHUNK, 2, 2, 4, 2)
    data = parts.permute(0, 3, 2, 6, 1, 4, 7, 5).contiguous().view(torch.uint8)
    return data.flatten(), scale.contiguous().flatten()


def unpack(data: Tensor, packed_scale: Tensor, rows: int, columns: int, group_size: int) -> tuple[Tensor, Tensor]:
    """The inverse: int8 [N, K] and scales [N, groups]."""
    tiles, chunks = -(-rows // _TILE), -(-columns // _CHUNK)
    parts = data.view(torch.int8).view(tiles, chunks, 8, 4, 2, 2, 2, 2).permute(0, 4, 2, 1, 5, 7, 3, 6)
    qweight = parts.reshape(tiles * _TILE, chunks * _CHUNK)[:rows, :columns].contiguous()
    return qweight, packed_scale.clone().view(rows, -(-columns // group_size))


def packed_sizes(rows: int, columns: int, group_size: int) -> tuple[int, int]:
    """Bytes and scales that `pack` gives."""
    data = -(-rows // _TILE) * _TILE * -(-columns // _CHUNK) * _CHUNK
    return data, rows * -(-columns // group_size)


def dequantize(
    data: Tensor, packed_scale: Tensor, rows: int, columns: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The whole weight, [N, K] in `dtype`, rounded once from fp32."""
    out = data.new_empty(rows, columns, dtype=dtype)
    if out.numel():
        extension._cuda.dequantize(
            data=data.data_ptr(),
            scale=packed_scale.data_ptr(),
            n=rows,
            k=columns,
            group=group_size,
            out=out.data_ptr(),
            type=FLOAT_CODES[dtype],
            **_place(data),
        )
    return out


def rows_of(data: Tensor, packed_scale: Tensor, indices: Tensor, rows: int, columns: int, group_size: int) -> Tensor:
    """Rows by int64 indices [R], dequantised: fp32 [R, K]; NaN for a row that is not there."""
    indices = indices.contiguous()
    out = packed_scale.new_empty(len(indices), columns)
    if out.numel():
        extension._cuda.dequantize_rows(
            data=data.data_ptr(),
            scale=packed_scale.data_ptr(),
            indices=indices.data_ptr(),
            count=len(indices),
            n=rows,
            k=columns,
            group=group_size,
            out=out.data_ptr(),
            type=FLOAT_CODES[out.dtype],
            **_place(data),
        )
    return out


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
    if x.dtype == torch.float32 and not int8_activations:
        return _multiply_limbs(x, data, scales, biases, sizes, group_size, geglu)
    rows, columns = x.shape
    if len(sizes) > _MOST_WEIGHTS:
        halves = (slice(_MOST_WEIGHTS), slice(_MOST_WEIGHTS, None))
        options = (group_size, int8_activations, out_dtype)
        return [y for p in halves for y in multiply(x, data[p], scales[p], biases[p], sizes[p], *options)]
    plain = x.dtype == out_dtype == torch.bfloat16 and not int8_activations and not geglu
    if plain and tiles.dequantizes(rows, devices.device_of(x)):
        copies = (
            dequantize(d, s, n, columns, group_size, x.dtype) for d, s, n in zip(data, scales, sizes, strict=True)
        )
        biases = [None if bias is None else bias.to(x.dtype) for bias in biases]
        return [F.linear(x, copy, bias) for copy, bias in zip(copies, biases, strict=True)]
    outputs = [x.new_empty(rows, n, dtype=out_dtype) for n in (sizes[:1] if geglu else sizes)]
    if not rows or not any(sizes):
        return outputs
    x, row_scale = _quantize(x) if int8_activations else (_aligned(x), None)
    bias_dtypes = {bias.dtype for bias in biases if bias is not None}
    # One type for all; they rarely differ.
    bias_dtype = bias_dtypes.pop() if len(bias_dtypes) == 1 else torch.float32
    biases = [None if bias is None else bias.to(bias_dtype).contiguous() for bias in biases]
    place = _place(x)
    splits = extension._cuda.splits_for(
        m=rows,
        k=x.shape[1],
        group=_group(group_size, columns, x),
        int8_activations=int8_activations,
        geglu=geglu,
        sizes=list(sizes),
        device=place["device"],
    )
    parts = x.new_empty(splits * rows * sum(sizes) if splits > 1 else 0, dtype=torch.float32)
    given = zip(sizes, data, scales, biases, outputs * 2 if geglu else outputs, strict=True)
    extension._cuda.int8_linear(
        x=x.data_ptr(),
        row_scale=0 if row_scale is None else row_scale.data_ptr(),
        m=rows,
        k=x.shape[1],
        group=_group(group_size, columns, x),
        x_type=FLOAT_CODES.get(x.dtype, 0),
        bias_type=FLOAT_CODES[bias_dtype],
        y_type=FLOAT_CODES[out_dtype],
        weights=[
            (n, weight.data_ptr(), scale.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr())
            for n, weight, scale, bias, y in given
            if n
        ],
        int8_activations=int8_activations,
        geglu=geglu,
        splits=splits,
        parts=parts.data_ptr(),
        **place,
    )
    return outputs


def _multiply_limbs(
    x: Tensor,
    data: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int],
    group_size: int,
    geglu: bool,
) -> list[Tensor]:
    """The same of fp32, which is exactly the sum of three bfloat16: three products, whose sums are fp32."""
    limbs, rest = [], x
    for _ in range(3):
        high = (rest.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
        limbs.append(high.to(torch.bfloat16))
        rest = torch.where(high.isfinite(), rest - high, 0.0)
    products = multiply(torch.cat(limbs), data, scales, [None] * len(sizes), sizes, group_size, False, torch.float32)
    # The smallest first.
    outputs = [y.view(3, *x.shape[:1], y.shape[1]).flip(0).sum(0) for y in products]
    outputs = [y if bias is None else y + bias.float() for y, bias in zip(outputs, biases, strict=True)]
    return [F.gelu(outputs[0], approximate="tanh") * outputs[1]] if geglu else outputs


def _group(group_size: int, columns: int, x: Tensor) -> int:
    """Columns of a group, when x has become longer by zeros: they make no other group, as those are multiples of a chunk."""
    return x.shape[1] if group_size >= columns else group_size


def _aligned(x: Tensor) -> Tensor:
    """x [M, K] so that every row begins at a multiple of 16 bytes, with columns of zeros where it must."""
    if x.shape[1] % 8:
        return F.pad(x, (0, -x.shape[1] % 8))
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K up to a multiple of 32], in the weights' order of columns, and the rows' scales."""
    x = x.contiguous()
    q = x.new_empty(x.shape[0], -(-x.shape[1] // _CHUNK) * _CHUNK, dtype=torch.int8)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    extension._cuda.quantize_rows(
        x=x.data_ptr(),
        type=FLOAT_CODES[x.dtype],
        m=x.shape[0],
        k=x.shape[1],
        q=q.data_ptr(),
        scale=scale.data_ptr(),
        **_place(x),
    )
    return q, scale


def _place(tensor: Tensor) -> dict[str, int]:
    """Where to launch."""
    if tensor.device.type == "cpu":  # the tests' emulator
        return {"device": EMULATED, "stream": 0}
    return {"device": tensor.device.index, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}
