"""Backend "triton": launches of `kernels` on int8 weights [N, K], which keep their layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_kernels.ops._common import devices
from pg_kernels.ops.int8_linear import tiles
from pg_kernels.ops.int8_linear.product import Int8Product

_ALIGNMENT = 16
"""Strides in elements and addresses in bytes that are multiples of it let Triton load several elements at once."""
_REDUCE_BLOCK_N = 256
"""Output features of one program of `reduce_split_k_kernel`."""
_ONE_GROUP = 1 << 30
"""GROUP_SIZE of a weight with one scale for each row: every column is in group 0."""


@dataclass(frozen=True)
class _Weight:
    data: Tensor
    """int8 [N, K], aligned."""
    scale: Tensor
    """fp32 [N, groups]."""
    bias: Tensor | None
    """[N]"""


def multiply(x: Tensor, product: Int8Product) -> list[Tensor]:
    """Multiply x [M, K] by the product's weights: [M, N] for each of them, or one output with `geglu`."""
    out_dtype = product.out_dtype
    if devices.upcasts_dot_operands(x) and out_dtype == x.dtype:  # the interpreter stores bf16 without rounding
        return [y.to(out_dtype) for y in multiply(x, replace(product, out_dtype=torch.float32))]
    outputs = product.empty_outputs(x)
    if not len(x) or not any(product.sizes):
        return outputs
    x, row_scale = _quantize_rows(_aligned(x)) if product.int8_activations else (_aligned(x), None)
    weights = [
        _Weight(_aligned(weight), scale.contiguous(), None if bias is None else bias.contiguous())
        for weight, scale, bias in zip(product.weights, product.scales, product.biases, strict=True)
    ]
    if product.geglu:
        _launch_gemm(x, row_scale, weights[0], weights[1], product.group_size, outputs[0])
    else:
        for weight, y in zip(weights, outputs, strict=True):
            _launch_gemm(x, row_scale, weight, None, product.group_size, y)
    return outputs


def input_grad(grad: Tensor, qweight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Compute grad [M, N] · (qweight · scale): [M, K] in grad's dtype."""
    if devices.upcasts_dot_operands(grad):
        return input_grad(grad.float(), qweight, scale, group_size).to(grad.dtype)
    from pg_kernels.ops.int8_linear import kernels

    grad, qweight, scale = _contiguous_rows(grad), _contiguous_rows(qweight), scale.contiguous()
    (m, n), k, num_groups = grad.shape, qweight.shape[1], scale.shape[1]
    grad_x = grad.new_empty(m, k)
    per_column = num_groups > 1 and group_size < 16
    chosen = tiles.choose_input_grad(m, torch.float32 if per_column else grad.dtype)
    # One tile's columns share their scales: a tile is no wider than a group.
    block_k = chosen.block_k if num_groups == 1 or per_column else min(chosen.block_k, group_size)
    if grad_x.numel():
        with devices.on_device_of(grad):
            kernels.int8_input_grad_kernel[(-(-m // chosen.block_m) * -(-k // block_k),)](
                grad_ptr=grad,
                weight_ptr=qweight,
                scale_ptr=scale,
                grad_x_ptr=grad_x,
                M=m,
                N=n,
                K=k,
                num_groups=num_groups,
                stride_gm=grad.stride(0),
                stride_wn=qweight.stride(0),
                BLOCK_M=chosen.block_m,
                BLOCK_K=block_k,
                BLOCK_N=chosen.block_n,
                GROUP_M=chosen.group_m,
                GROUP_SIZE=group_size if num_groups > 1 else _ONE_GROUP,
                SCALES="per_column" if per_column else "per_block",
                # The kernel multiplies bf16, whatever the gradient's dtype is.
                UPCAST=devices.upcasts_dot_operands(grad.new_empty(0, dtype=torch.bfloat16)),
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
                enable_fp_fusion=True,
            )
    return grad_x


def _launch_gemm(
    x: Tensor, row_scale: Tensor | None, weight: _Weight, up: _Weight | None, group_size: int, y: Tensor
) -> None:
    """Write x times one weight to y [M, N], or GeGLU's output of `weight` and `up`."""
    from pg_kernels.ops.int8_linear import kernels

    (m, k), n, num_groups = x.shape, len(weight.data), weight.scale.shape[1]
    w8a8, gated = row_scale is not None, up is not None
    if not n:
        return
    device = devices.device_of(x)
    # Groups shorter than what tensor cores multiply at once: 32 columns of int8, 16 of floats.
    per_column = num_groups > 1 and group_size < (32 if w8a8 else 16)
    scales = "per_row" if num_groups == 1 else "per_column" if per_column else "per_block"
    chosen = tiles.choose(m, k, n, torch.float32 if per_column else x.dtype, device, gated)
    block_k = min(chosen.block_k, group_size) if scales == "per_block" else chosen.block_k
    blocks, steps = -(-m // chosen.block_m) * -(-n // chosen.block_n), -(-k // block_k)
    steps_per_split = -(-steps // tiles.num_splits(m, blocks, steps, device))
    num_splits = -(-steps // steps_per_split)
    partial = None
    if num_splits > 1:
        acc_dtype = torch.int32 if w8a8 and num_groups == 1 else torch.float32
        partial = x.new_empty(num_splits, 2 if gated else 1, m, n, dtype=acc_dtype)
    operands: dict[str, Any] = {
        "row_scale_ptr": row_scale,
        "scale_ptr": weight.scale,
        "bias_ptr": weight.bias,
        "up_scale_ptr": None if up is None else up.scale,
        "up_bias_ptr": None if up is None else up.bias,
        "y_ptr": y,
        "partial_ptr": partial,
        "M": m,
        "N": n,
    }
    with devices.on_device_of(x):
        kernels.int8_gemm_kernel[(blocks, num_splits)](
            x_ptr=x,
            weight_ptr=weight.data,
            up_ptr=None if up is None else up.data,
            **operands,
            K=k,
            num_groups=num_groups,
            stride_xm=x.stride(0),
            stride_wn=weight.data.stride(0),
            stride_un=0 if up is None else up.data.stride(0),
            k_per_split=steps_per_split * block_k,
            BLOCK_N=chosen.block_n,
            BLOCK_M=chosen.block_m,
            BLOCK_K=block_k,
            GROUP_M=chosen.group_m,
            GROUP_SIZE=group_size if num_groups > 1 else _ONE_GROUP,
            SCALES=scales,
            W8A8=w8a8,
            EVEN_K=k % block_k == 0,
            UPCAST=devices.upcasts_dot_operands(x),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            enable_fp_fusion=True,
        )
        if partial is not None:
            kernels.reduce_split_k_kernel[(m, -(-n // _REDUCE_BLOCK_N))](
                **operands,
                num_splits=num_splits,
                GATED=gated,
                SCALES=scales,
                BLOCK_N=_REDUCE_BLOCK_N,
                num_warps=4,
                enable_fp_fusion=True,
            )


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the rows of x [M, K], which are contiguous: int8 [M, K] and fp32 scales [M]."""
    from pg_kernels.ops.int8_linear import kernels

    qx = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(len(x), dtype=torch.float32)
    with devices.on_device_of(x):
        kernels.quantize_rows_kernel[(len(x),)](
            x_ptr=x,
            qx_ptr=qx,
            scale_ptr=scale,
            K=x.shape[1],
            stride_xm=x.stride(0),
            BLOCK_K=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return qx, scale


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _aligned(x: Tensor) -> Tensor:
    """Return x [..., K] with zeros up to a multiple of 16 columns, and rows whose addresses are multiples of 16.

    Triton loads other rows one element at a time.
    """
    if x.shape[1] % _ALIGNMENT:
        return F.pad(x, (0, -x.shape[1] % _ALIGNMENT))
    fits = x.stride(1) == 1 and x.stride(0) % _ALIGNMENT == 0 and x.data_ptr() % _ALIGNMENT == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)
