from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import offer, select
from pg_kernels.ops import checks
from pg_kernels.ops.int8_linear import reference
from pg_kernels.ops.library import define_opaque, refuse_second_derivative

try:
    from pg_kernels import _C
except ImportError as error:  # no compiler when the package was installed, or a build for another Python
    _C = None  # type: ignore[assignment]
    _WHY_NOT = f"the C++ extension pg_kernels._C is not there ({error})"

_FLOAT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True, eq=False, repr=False)
class PackedInt8Weight:
    """An int8 weight [N, K] in the layout that this machine's kernels read; made by `pack_int8`, kept as long as one likes.

    Besides what is listed here its contents are private: they depend on the machine and the version.
    """

    _qweight: Tensor
    _scale: Tensor
    group_size: int
    """Columns that share a scale; K for one scale per row."""

    @property
    def shape(self) -> torch.Size:
        """[N, K]"""
        return self._qweight.shape

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._qweight.device

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Give back exactly what was packed: int8 [N, K] and its fp32 scales."""
        return self._qweight, self._scale

    def __repr__(self) -> str:
        return f"PackedInt8Weight({list(self.shape)}, group_size={self.group_size}, device={str(self.device)!r})"


def _native_obstacle(device_type: str) -> str | None:
    if _C is None:
        return _WHY_NOT
    return None if device_type == "cpu" else "the C++ extension has no kernels for it"


def _forward(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    int8_activations: bool,
    backend: str,
) -> Tensor:
    if backend == "reference":
        return reference.int8_linear(x, qweight, scale, bias, group_size, int8_activations)
    x, qweight, scale = x.contiguous(), qweight.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = x.new_empty(x.shape[0], qweight.shape[0])
    _C.int8_linear(
        x=x.data_ptr(),
        q=qweight.data_ptr(),
        scale=scale.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        m=x.shape[0],
        n=qweight.shape[0],
        k=qweight.shape[1],
        group=group_size,
        type=_FLOAT_CODES[x.dtype],
        int8_activations=int8_activations,
    )
    return y


def _fake(x: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], qweight.shape[0])


def _fake_backward(grad: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], qweight.shape[1])


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(qweight, scale)
        ctx.group_size = options[0]
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.pg_kernels.int8_linear(x, qweight, scale, bias, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("int8_linear")
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.pg_kernels.int8_linear_backward(grad, *ctx.saved_tensors, ctx.group_size)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None, None, None


offer("int8_linear", "native", _native_obstacle)
define_opaque(
    "int8_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? bias, int group_size, bool int8_activations, str backend) "
    "-> Tensor",
    _forward,
    _fake,
    _Int8Linear.apply,
)
# Opaque, although plain PyTorch: where the last group is shorter, Inductor's code for CPUs (torch 2.13) reads beyond the scales.
define_opaque(
    "int8_linear_backward(Tensor grad, Tensor qweight, Tensor scale, int group_size) -> Tensor",
    reference.input_gradient,
    _fake_backward,
)


def pack_int8(qweight: Tensor, scale: Tensor) -> PackedInt8Weight:
    """Lay out an int8 weight for this machine's kernels, once, so that the originals can be released.

    Args:
        qweight: int8 [N, K].
        scale: fp32 [N], or [N, groups] as `quantize_int8` gives them: groups of the power of two of columns that makes so many.

    Returns:
        An opaque weight for `int8_linear`, whose `unpack()` gives the originals back.

    Raises:
        TypeError: dtypes other than int8 and fp32.
        ValueError: shapes or devices that do not fit.
    """
    return _pack("qweight", qweight, scale)


def _pack(name: str, qweight: Tensor, scale: Tensor) -> PackedInt8Weight:
    """Check and pack a weight, which errors call `name`."""
    checks.check_tensor(**{name: qweight, "scale": scale})
    for argument, tensor, dtype in ((name, qweight, torch.int8), ("scale", scale, torch.float32)):
        if tensor.dtype != dtype:
            raise TypeError(f"{argument}: expected {dtype}, got {tensor.dtype}")
    checks.check_shape(name, qweight, ["N", "K"])
    checks.check_row(name, qweight)
    checks.check_device(**{name: qweight, "scale": scale})
    rows, columns = qweight.shape
    if scale.dim() == 1:
        checks.check_shape("scale", scale, [rows], f" ({name}'s N) or [N, groups]")
        return PackedInt8Weight(qweight, scale, columns)
    checks.check_shape("scale", scale, [rows, "groups"], f" (N is {name}'s) or [N]")
    return PackedInt8Weight(qweight, scale, _group_size(columns, scale.shape[1]))


def _group_size(columns: int, groups: int) -> int:
    """The power of two g with ceil(columns / g) == groups: for two groups or more there is at most one."""
    if groups == 1:
        return columns
    size = 1
    while groups and size * groups < columns:
        size *= 2
    if -(-columns // size) != groups:
        raise ValueError(f"scale: {groups} groups cannot share {columns} columns in powers of two")
    return size


def int8_linear(
    x: Tensor,
    weight: PackedInt8Weight | Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activations: str = "keep",
) -> Tensor:
    """Multiply by the transpose of an int8 weight: x · (weight · scale)ᵀ + bias.

    Args:
        x: [..., K], fp32, fp16 or bf16. Under autocast x is cast.
        weight: packed, or int8 [N, K] with its `scale`.
        scale: fp32 [N] or [N, groups]; only with an unpacked weight.
        bias: [N], fp32, fp16 or bf16.
        activations: "keep" multiplies x as it is (W8A16); "int8" first rounds every row of x to 255 levels (W8A8).

    Returns:
        [..., N] in x's dtype; products and sums are fp32 or exact integers. Differentiable in x and bias; with "int8" as if x
        had not been rounded.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or devices that do not fit, a scale given twice or missing, unknown `activations`.
    """
    if activations not in ("keep", "int8"):
        raise ValueError(f"activations: got {activations!r}, expected 'keep' or 'int8'")
    if isinstance(weight, PackedInt8Weight):
        if scale is not None:
            raise ValueError("scale: a packed weight has its own")
    elif scale is None:
        raise ValueError("scale: needed with a weight that is not packed")
    else:
        weight = _pack("weight", weight, scale)
    checks.check_tensor(x=x)
    checks.check_float(x=x, bias=bias)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected shape [..., {weight.shape[1]}] (the weight's K), got {list(x.shape)}")
    if bias is not None:
        checks.check_shape("bias", bias, [weight.shape[0]], " (the weight's N)")
    qweight, scale = weight.unpack()
    checks.check_device(x=x, weight=qweight, bias=bias)
    (x,) = checks.autocast(x)
    backend = select("int8_linear", x.device.type)
    if x.dtype not in _FLOAT_CODES:
        backend = "reference"
    y = torch.ops.pg_kernels.int8_linear(
        x.reshape(-1, x.shape[-1]),
        qweight,
        scale if scale.dim() == 2 else scale[:, None],
        bias,
        weight.group_size,
        activations == "int8",
        backend,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])
