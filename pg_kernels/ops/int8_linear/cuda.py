"""Backend "native" on CUDA: calls of pg_kernels._cuda, with int8 weights in the layout of csrc/cuda/int8_linear.h.

The layout is the order in which the tensor cores' registers hold a weight.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_kernels.ops._common import devices, extension
from pg_kernels.ops._common.extension import FLOAT_CODES
from pg_kernels.ops.int8_linear import tiles
from pg_kernels.ops.int8_linear.product import Int8Product

_TILE_ROWS, _CHUNK = 16, 32
"""Rows and columns that lie together: kTileRows and kChunk of csrc/cuda/int8_linear.h."""
_MAX_WEIGHTS = 4
"""Weights of one launch: kMaxWeights of csrc/cuda/int8_linear.h."""


def unsupported_reason(x: Tensor, group_size: int, k: int) -> str | None:
    """Return why the kernels cannot multiply x [M, k] by a weight in groups of this size, or None if they can."""
    if not supports_groups(k, group_size):
        return f"groups of {group_size} columns are not a multiple of {_CHUNK}"
    return extension.unsupported_reason(x)


def supports_groups(k: int, group_size: int) -> bool:
    """Return whether the kernels take a weight [N, k] in groups of this size."""
    return group_size >= k or group_size % _CHUNK == 0


def pack(qweight: Tensor, scale: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Lay out int8 [N, K] and scales [N, groups] for the kernels: uint8, and the scales in their order, both flat."""
    n, k = qweight.shape
    padded = F.pad(qweight, (0, -k % _CHUNK, 0, -n % _TILE_ROWS))
    # A row's index: tile, half of the tile, lane / 4. A column's: chunk, half of the chunk, half of that, lane % 4, one of two.
    split = padded.view(padded.shape[0] // _TILE_ROWS, 2, 8, padded.shape[1] // _CHUNK, 2, 2, 4, 2)
    data = split.permute(0, 3, 2, 6, 1, 4, 7, 5).contiguous().view(torch.uint8)
    return data.flatten(), scale.contiguous().flatten()


def unpack(data: Tensor, packed_scale: Tensor, n: int, k: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Undo `pack`: return int8 [n, k] and scales [n, groups]."""
    num_tiles, num_chunks = -(-n // _TILE_ROWS), -(-k // _CHUNK)
    split = data.view(torch.int8).view(num_tiles, num_chunks, 8, 4, 2, 2, 2, 2).permute(0, 4, 2, 1, 5, 7, 3, 6)
    qweight = split.reshape(num_tiles * _TILE_ROWS, num_chunks * _CHUNK)[:n, :k].contiguous()
    return qweight, packed_scale.clone().view(n, -(-k // group_size))


def packed_sizes(n: int, k: int, group_size: int) -> tuple[int, int]:
    """Return the lengths of what `pack` returns: bytes of the weight, and scales."""
    size = -(-n // _TILE_ROWS) * _TILE_ROWS * -(-k // _CHUNK) * _CHUNK
    return size, n * -(-k // group_size)


def dequantize(data: Tensor, packed_scale: Tensor, n: int, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Return the whole weight, [n, k] in `dtype`, rounded once from fp32."""
    out = data.new_empty(n, k, dtype=dtype)
    if out.numel():
        extension._cuda.dequantize(
            data=data.data_ptr(),
            scale=packed_scale.data_ptr(),
            n=n,
            k=k,
            group=group_size,
            out=out.data_ptr(),
            type=FLOAT_CODES[dtype],
            **_device_and_stream(data),
        )
    return out


def dequantize_rows(data: Tensor, packed_scale: Tensor, indices: Tensor, n: int, k: int, group_size: int) -> Tensor:
    """Return the rows at int64 indices [R]: fp32 [R, k], NaN for an index outside [0, n)."""
    indices = indices.contiguous()
    out = packed_scale.new_empty(len(indices), k)
    if out.numel():
        extension._cuda.dequantize_rows(
            data=data.data_ptr(),
            scale=packed_scale.data_ptr(),
            indices=indices.data_ptr(),
            count=len(indices),
            n=n,
            k=k,
            group=group_size,
            out=out.data_ptr(),
            type=FLOAT_CODES[out.dtype],
            **_device_and_stream(data),
        )
    return out


def multiply(x: Tensor, product: Int8Product) -> list[Tensor]:
    """Multiply x [M, K] by the product's packed weights: [M, N] for each of them, or one output with `geglu`."""
    if x.dtype == torch.float32 and not product.int8_activations:
        return _multiply_fp32(x, product)
    m, k = x.shape
    if len(product.sizes) > _MAX_WEIGHTS:
        parts = (slice(_MAX_WEIGHTS), slice(_MAX_WEIGHTS, None))
        return [y for part in parts for y in multiply(x, product.of_weights(part))]
    if _is_plain_bf16(x, product) and tiles.prefers_cublas(m, devices.device_of(x)):
        return _multiply_with_cublas(x, product)
    outputs = product.empty_outputs(x)
    if not m or not any(product.sizes):
        return outputs
    x, row_scale = _quantize_rows(x) if product.int8_activations else (_aligned(x), None)
    # x was padded with zeros, which add no group: with several groups their size is a multiple of a chunk.
    padded_k = x.shape[1]
    group_size = padded_k if product.group_size >= k else product.group_size
    bias_dtypes = {bias.dtype for bias in product.biases if bias is not None}
    # The kernel takes one dtype for all biases. They rarely differ.
    bias_dtype = bias_dtypes.pop() if len(bias_dtypes) == 1 else torch.float32
    biases = [None if bias is None else bias.to(bias_dtype).contiguous() for bias in product.biases]
    launch = _device_and_stream(x)
    num_splits = extension._cuda.num_splits(
        m=m,
        k=padded_k,
        group=group_size,
        int8_activations=product.int8_activations,
        geglu=product.geglu,
        sizes=list(product.sizes),
        device=launch["device"],
    )
    partial = x.new_empty(num_splits * m * sum(product.sizes) if num_splits > 1 else 0, dtype=torch.float32)
    # With geglu both weights name the one output.
    each = zip(
        product.sizes,
        product.weights,
        product.scales,
        biases,
        outputs * 2 if product.geglu else outputs,
        strict=True,
    )
    extension._cuda.int8_linear(
        x=x.data_ptr(),
        row_scale=0 if row_scale is None else row_scale.data_ptr(),
        m=m,
        k=padded_k,
        group=group_size,
        x_type=FLOAT_CODES.get(x.dtype, 0),
        bias_type=FLOAT_CODES[bias_dtype],
        y_type=FLOAT_CODES[product.out_dtype],
        weights=[
            (n, weight.data_ptr(), scale.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr())
            for n, weight, scale, bias, y in each
            if n
        ],
        int8_activations=product.int8_activations,
        geglu=product.geglu,
        num_splits=num_splits,
        partial=partial.data_ptr(),
        **launch,
    )
    return outputs


def _is_plain_bf16(x: Tensor, product: Int8Product) -> bool:
    """Return whether F.linear on a bfloat16 copy of the weight computes the product."""
    all_bf16 = x.dtype == product.out_dtype == torch.bfloat16
    return all_bf16 and not product.int8_activations and not product.geglu


def _multiply_with_cublas(x: Tensor, product: Int8Product) -> list[Tensor]:
    """Multiply x [M, K] by bfloat16 copies of the weights, made one at a time."""
    copies = (
        dequantize(weight, scale, n, x.shape[1], product.group_size, x.dtype)
        for weight, scale, n in zip(product.weights, product.scales, product.sizes, strict=True)
    )
    biases = [None if bias is None else bias.to(x.dtype) for bias in product.biases]
    return [F.linear(x, copy, bias) for copy, bias in zip(copies, biases, strict=True)]


def _multiply_fp32(x: Tensor, product: Int8Product) -> list[Tensor]:
    """Multiply an fp32 x as three bfloat16 numbers, whose sum is exactly x: three products with fp32 sums."""
    limbs, rest = [], x
    for _ in range(3):
        high = (rest.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
        limbs.append(high.to(torch.bfloat16))
        rest = torch.where(high.isfinite(), rest - high, 0.0)
    of_limbs = replace(product, biases=[None] * len(product.sizes), out_dtype=torch.float32, geglu=False)
    products = multiply(torch.cat(limbs), of_limbs)
    # Add the smallest limb first.
    outputs = [y.view(3, *x.shape[:1], y.shape[1]).flip(0).sum(0) for y in products]
    outputs = [y if bias is None else y + bias.float() for y, bias in zip(outputs, product.biases, strict=True)]
    return [F.gelu(outputs[0], approximate="tanh") * outputs[1]] if product.geglu else outputs


def _aligned(x: Tensor) -> Tensor:
    """Return x [M, K] so that every row begins at a multiple of 16 bytes, padded with columns of zeros if needed."""
    if x.shape[1] % 8:
        return F.pad(x, (0, -x.shape[1] % 8))
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the rows of x: int8 [M, K up to a multiple of 32], columns in the weights' order, and fp32 scales [M]."""
    x = x.contiguous()
    qx = x.new_empty(x.shape[0], -(-x.shape[1] // _CHUNK) * _CHUNK, dtype=torch.int8)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    extension._cuda.quantize_rows(
        x=x.data_ptr(),
        type=FLOAT_CODES[x.dtype],
        m=x.shape[0],
        k=x.shape[1],
        q=qx.data_ptr(),
        scale=scale.data_ptr(),
        **_device_and_stream(x),
    )
    return qx, scale


def _device_and_stream(tensor: Tensor) -> dict[str, int]:
    """Return the arguments that tell the extension where to launch: the tensor's GPU and its current stream."""
    return {"device": tensor.device.index, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}
