"""`int8_linear`: its registration, gradients, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import BACKENDS, register_backend
from pg_kernels.ops._common import checks, devices, extension
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_opaque
from pg_kernels.ops.int8_linear import launch, reference
from pg_kernels.ops.int8_linear.dispatch import multiply, prepare
from pg_kernels.ops.int8_linear.layout import unpack
from pg_kernels.ops.int8_linear.packed import PackedInt8Weight, without_layout
from pg_kernels.ops.int8_linear.product import Int8Product


def int8_linear(
    x: Tensor,
    weight: PackedInt8Weight | Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activations: str = "keep",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply by the transpose of an int8 weight: x · (weight · scale)ᵀ + bias.

    Args:
        x: [..., K], fp32, fp16 or bf16. Under autocast x is cast.
        weight: packed, or int8 [N, K] with its `scale`, which every call packs anew.
        scale: fp32 [N] or [N, groups]; only with an unpacked weight.
        bias: [N], fp32, fp16 or bf16.
        activations: "keep" multiplies x itself (W8A16). On CPUs the C++ kernel rounds x to 16 bits, with one scale for every 512
            columns of a row. "int8" first rounds every row of x to 255 levels (W8A8).
        out_dtype: dtype of the result: x's, the default, or torch.float32, which leaves the sums unrounded.

    Returns:
        [..., N] in x's dtype or `out_dtype`. Products and sums are fp32 or exact integers. Differentiable in x and bias; with
        "int8" as if x had not been rounded.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or devices that do not fit, a scale given twice or missing or not finite, unknown `activations`,
            another `out_dtype`.
    """
    if isinstance(weight, PackedInt8Weight):
        if scale is not None:
            raise ValueError("scale: a packed weight has its own")
    elif scale is None:
        raise ValueError("scale: needed with a weight that is not packed")
    else:
        weight = without_layout("weight", weight, scale)
    x, backend = prepare(x, [weight], [bias], activations)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if out_dtype not in (x.dtype, torch.float32):
        raise ValueError(f"out_dtype: expected {x.dtype} (x's) or torch.float32, got {out_dtype}")
    y = torch.ops.pg_kernels.int8_linear(
        x.reshape(-1, x.shape[-1]),
        *weight._operands(backend),
        bias,
        weight.shape[0],
        weight.group_size,
        activations == "int8",
        backend,
        out_dtype,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y = torch.ops.pg_kernels.int8_linear(x, weight, scale, bias, *options)
        ctx.save_for_backward(weight, scale)
        _, group_size, _, backend, _ = options
        ctx.options = (x.shape[1], group_size, backend)
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("int8_linear")
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.pg_kernels.int8_linear_backward(grad, *ctx.saved_tensors, *ctx.options).to(ctx.x_dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias, *[None] * 5


def _forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    n: int,
    group_size: int,
    int8_activations: bool,
    backend: str,
    out_dtype: torch.dtype,
) -> Tensor:
    if backend == "reference":
        return reference.int8_linear(x.to(out_dtype), weight, scale, bias, group_size, int8_activations)
    product = Int8Product([weight], [scale], [bias], [n], group_size, int8_activations, out_dtype)
    return multiply(x, product, backend)[0]


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], n, dtype=rest[-1])


def _backward(grad: Tensor, weight: Tensor, scale: Tensor, columns: int, group_size: int, backend: str) -> Tensor:
    checks.check_shape("grad", grad, ["M", "N"])
    checks.check_float(grad=grad)
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    checks.check_device(grad=grad, weight=weight)
    if backend == "native":
        weight, scale = unpack(weight, scale, grad.shape[1], columns, group_size)
    triton_runs = (
        grad.device.type == "cuda"
        and devices.unavailable_reason("cuda") is None
        and devices.unsupported_reason(grad) is None
    )
    # The extension has no kernel for the gradient.
    if backend == "triton" or (backend == "native" and triton_runs):
        return launch.input_grad(grad, weight, scale, group_size)
    return reference.input_grad(grad, weight, scale, group_size)


def _fake_backward(grad: Tensor, weight: Tensor, scale: Tensor, columns: int, *rest: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], columns)


register_backend("int8_linear", "native", extension.unavailable_reason_cpu_or_cuda)
register_backend("int8_linear", "triton", devices.unavailable_reason)
# weight and scale are in the extension's layout with backend "native", else int8 [N, K] and [N, groups].
define_opaque(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, SymInt n, SymInt group_size, bool int8_activations, "
    "str backend, ScalarType out_dtype) -> Tensor",
    _forward,
    _fake,
    _Int8Linear.apply,
)
# Opaque although it is plain PyTorch: with a shorter last group, Inductor's code for CPUs (torch 2.13) reads past the scales.
define_opaque(
    "int8_linear_backward(Tensor grad, Tensor weight, Tensor scale, SymInt columns, SymInt group_size, str backend) -> Tensor",
    _backward,
    _fake_backward,
)
