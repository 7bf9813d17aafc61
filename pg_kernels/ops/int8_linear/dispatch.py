"""What the products with int8 weights share: argument checks, the choice of a backend, and the call of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import select
from pg_kernels.ops._common import checks, devices, extension
from pg_kernels.ops.int8_linear import cpu, launch
from pg_kernels.ops.int8_linear.layout import check_layout, native_backend
from pg_kernels.ops.int8_linear.packed import PackedInt8Weight
from pg_kernels.ops.int8_linear.product import Int8Product

_MAX_INT32_COLUMNS = 2**16
"""Columns whose int8 · int8 products have a sum that int32 holds. GPU kernels add longer sums in fp32."""


def prepare(
    x: Tensor, weights: Sequence[PackedInt8Weight], biases: Sequence[Tensor | None], activations: str
) -> tuple[Tensor, str]:
    """Validate the operands of a product. Return x, cast if autocast is on, and the backend."""
    if activations not in ("keep", "int8"):
        raise ValueError(f"activations: got {activations!r}, expected 'keep' or 'int8'")
    checks.check_tensor(x=x)
    for weight, bias in zip(weights, biases, strict=True):
        check_packed(weight=weight)
        checks.check_float(x=x, bias=bias)
        if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(f"x: expected shape [..., {weight.shape[1]}] (the weight's K), got {list(x.shape)}")
        if bias is not None:
            checks.check_shape("bias", bias, [weight.shape[0]], " (the weight's N)")
        checks.check_device(x=x, weight=weight._data, bias=bias)
    (x,) = checks.autocast(x)
    reasons = [native_backend(x.device).unsupported_reason(x, weight.group_size, weight.shape[1]) for weight in weights]
    native = next((reason for reason in reasons if reason is not None), None)
    # Prefer the extension to Triton where both can run: its kernels are faster.
    avoid = ("triton",) if native is None and extension.unavailable_reason_cpu_or_cuda(x.device.type) is None else ()
    return x, select("int8_linear", x.device.type, {"native": native, "triton": devices.unsupported_reason(x)}, avoid)


def check_packed(**weights: object) -> None:
    """Raise TypeError unless every value is a PackedInt8Weight."""
    for name, weight in weights.items():
        if not isinstance(weight, PackedInt8Weight):
            raise TypeError(f"{name}: expected one that pack_int8 has packed, got {type(weight).__name__}")


def multiply(x: Tensor, product: Int8Product, backend: str) -> list[Tensor]:
    """Multiply x [M, K] on backend "native" or "triton": [M, N] for each weight, or one output with `geglu`.

    The registered ops call it. For "native" it checks everything whose address the extension takes.
    """
    checks.check_shape("x", x, ["M", "K"])
    if backend not in ("native", "triton"):
        raise ValueError(f"backend: got {backend!r}, expected 'native' or 'triton'")
    module: Any = launch
    if backend == "native":
        module = native_backend(x.device)
        check_native(x, product)
    k = x.shape[1]
    if product.int8_activations and module is not cpu and min(product.group_size, k) > _MAX_INT32_COLUMNS:
        product = _in_short_groups(product, k, x.device)
    return module.multiply(x, product)


def check_native(x: Tensor, product: Int8Product) -> None:
    """Raise unless the extension can multiply x [M, K]: dtypes that it knows, and buffers of the right sizes."""
    for dtype in (x.dtype, product.out_dtype):
        if dtype not in extension.FLOAT_CODES:
            raise TypeError(f"x: expected float32, float16 or bfloat16 for it and the result, got {dtype}")
    weights, scales, biases, sizes = product.weights, product.scales, product.biases, product.sizes
    if not len(sizes) == len(weights) == len(scales) == len(biases):
        raise ValueError(
            f"weights: got {len(weights)}, expected as many scales, biases and sizes, not {len(scales)}, {len(biases)} and "
            f"{len(sizes)}"
        )
    for n, weight, scale, bias in zip(sizes, weights, scales, biases, strict=True):
        check_layout(weight, scale, n, x.shape[1], product.group_size)
        checks.check_device(x=x, weight=weight, bias=bias)
        checks.check_float(bias=bias)
        if bias is not None:
            checks.check_shape("bias", bias, [n])
    if product.geglu and len(set(sizes)) != 1:
        raise ValueError(f"sizes: expected gate and up of as many rows, got {list(sizes)}")


def _in_short_groups(product: Int8Product, k: int, device: torch.device) -> Int8Product:
    """Repeat the scales so that no group is longer than `_MAX_INT32_COLUMNS`."""
    group = torch.arange(0, k, _MAX_INT32_COLUMNS, device=device) // product.group_size
    scales = [scale.view(n, -1)[:, group] for n, scale in zip(product.sizes, product.scales, strict=True)]
    return replace(product, scales=scales, group_size=_MAX_INT32_COLUMNS)
