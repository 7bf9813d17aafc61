"""Backend "triton": int8 weights [N, K] as they are, and launches of `kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_kernels.ops._common import devices
from pg_kernels.ops.int8_linear import tiles

_ALIGNED = 16
_FINISHED = 256
"""Features of a program that adds the parts of sums."""


@dataclass(frozen=True)
class _Weight:
    data: Tensor
    """int8 [N, K], aligned."""
    scale: Tensor
    """fp32 [N, groups]."""
    bias: Tensor | None


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
    """x [M, K] times each of some weights [N, K], `sizes` their rows; `geglu` makes one of two."""
    if devices.upcasts_dot_operands(x) and out_dtype == x.dtype:  # the interpreter stores bf16 without rounding
        options = (group_size, int8_activations, torch.float32, geglu)
        return [y.to(out_dtype) for y in multiply(x, data, scales, biases, sizes, *options)]
    outputs = [x.new_empty(len(x), n, dtype=out_dtype) for n in (sizes[:1] if geglu else sizes)]
    if not len(x) or not any(sizes):
        return outputs
    x, row_scale = _quantize(_aligned(x)) if int8_activations else (_aligned(x), None)
    weights = [
        _Weight(_aligned(weight), scale.contiguous(), None if bias is None else bias.contiguous())
        for weight, scale, bias in zip(data, scales, biases, strict=True)
    ]
    if geglu:
        _multiply(x, row_scale, weights[0], weights[1], group_size, outputs[0])
    else:
        for weight, y in zip(weights, outputs, strict=True):
            _multiply(x, row_scale, weight, None, group_size, y)
    return outputs


def input_gradient(grad: Tensor, qweight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """grad [M, N] times qweight · scale: [M, K]."""
    if devices.upcasts_dot_operands(grad):
        return input_gradient(grad.float(), qweight, scale, group_size).to(grad.dtype)
    from pg_kernels.ops.int8_linear import kernels

    grad, qweight, scale = _contiguous_rows(grad), _contiguous_rows(qweight), scale.contiguous()
    (rows, features), inner, groups = grad.shape, qweight.shape[1], scale.shape[1]
    y = grad.new_empty(rows, inner)
    many = groups > 1 and group_size < 16
    chosen = tiles.gradient(rows, torch.float32 if many else grad.dtype)
    columns = chosen.features if groups == 1 or many else min(chosen.features, group_size)
    if y.numel():
        with devices.on_device_of(grad):
            kernels.input_gradient[(-(-rows // chosen.tokens) * -(-inner // columns),)](
                grad_ptr=grad,
                weight_ptr=qweight,
                scale_ptr=scale,
                y_ptr=y,
                tokens=rows,
                features=features,
                inner=inner,
                groups=groups,
                grad_stride=grad.stride(0),
                weight_stride=qweight.stride(0),
                TOKENS=chosen.tokens,
                COLUMNS=columns,
                BLOCK=chosen.inner,
                GROUP=chosen.group,
                GROUP_SIZE=group_size if groups > 1 else 1 << 30,
                MANY=many,
                # The kernel multiplies bf16 whatever the gradient's dtype is.
                WIDEN=devices.upcasts_dot_operands(grad.new_empty(0, dtype=torch.bfloat16)),
                num_warps=chosen.warps,
                num_stages=chosen.stages,
                enable_fp_fusion=True,
            )
    return y


def _multiply(
    x: Tensor, row_scale: Tensor | None, weight: _Weight, up: _Weight | None, group_size: int, y: Tensor
) -> None:
    from pg_kernels.ops.int8_linear import kernels

    (rows, inner), features, groups = x.shape, len(weight.data), weight.scale.shape[1]
    exact, gated = row_scale is not None, up is not None
    if not features:
        return
    device = devices.device_of(x)
    # Shorter groups than the tensor cores multiply at once.
    many = groups > 1 and group_size < (32 if exact else 16)
    chosen = tiles.choose(rows, inner, features, torch.float32 if many else x.dtype, device, gated)
    block = chosen.inner if groups == 1 or many else min(chosen.inner, group_size)
    blocks, steps = -(-rows // chosen.tokens) * -(-features // chosen.features), -(-inner // block)
    span = -(-steps // tiles.splits(rows, blocks, steps, device))
    splits = -(-steps // span)
    one = "one" if groups == 1 else "many" if many else "some"
    sums = torch.int32 if exact and groups == 1 else torch.float32
    parts = x.new_empty(splits, 2 if gated else 1, rows, features, dtype=sums) if splits > 1 else None
    operands = {
        "row_scale_ptr": row_scale,
        "scale_ptr": weight.scale,
        "bias_ptr": weight.bias,
        "up_scale_ptr": None if up is None else up.scale,
        "up_bias_ptr": None if up is None else up.bias,
        "y_ptr": y,
        "parts_ptr": parts,
        "tokens": rows,
        "features": features,
    }
    with devices.on_device_of(x):
        kernels.product[(blocks, splits)](
            x_ptr=x,
            weight_ptr=weight.data,
            up_ptr=None if up is None else up.data,
            **operands,
            inner=inner,
            groups=groups,
            x_stride=x.stride(0),
            weight_stride=weight.data.stride(0),
            up_stride=0 if up is None else up.data.stride(0),
            span=span * block,
            FEATURES=chosen.features,
            TOKENS=chosen.tokens,
            BLOCK=block,
            GROUP=chosen.group,
            GROUP_SIZE=group_size if groups > 1 else 1 << 30,
            GROUPS=one,
            EXACT=exact,
            EVEN=inner % block == 0,
            WIDEN=devices.upcasts_dot_operands(x),
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=True,
        )
        if parts is not None:
            kernels.add_parts[(rows, -(-features // _FINISHED))](
                **operands,
                splits=splits,
                GATED=gated,
                GROUPS=one,
                BLOCK=_FINISHED,
                num_warps=4,
                enable_fp_fusion=True,
            )


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and the rows' scales, for x with contiguous rows."""
    from pg_kernels.ops.int8_linear import kernels

    levels = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(len(x), dtype=torch.float32)
    with devices.on_device_of(x):
        kernels.quantize_rows[(len(x),)](
            x_ptr=x,
            level_ptr=levels,
            scale_ptr=scale,
            inner=x.shape[1],
            x_stride=x.stride(0),
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return levels, scale


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _aligned(x: Tensor) -> Tensor:
    """x [.., K] with columns of zeros up to a multiple of 16 and rows at multiples of 16: others are loaded one by one."""
    if x.shape[1] % _ALIGNED:
        return F.pad(x, (0, -x.shape[1] % _ALIGNED))
    fits = x.stride(1) == 1 and x.stride(0) % _ALIGNED == 0 and x.data_ptr() % _ALIGNED == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)
