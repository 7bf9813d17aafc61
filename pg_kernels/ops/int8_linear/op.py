from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import BACKENDS, register_backend, select
from pg_kernels.ops._common import checks, devices, extension
from pg_kernels.ops._common.autograd import needs_autograd, refuse_second_derivative
from pg_kernels.ops._common.registration import define_opaque
from pg_kernels.ops.geglu import geglu
from pg_kernels.ops.int8_linear import cpu, cuda, reference, triton
from pg_kernels.ops.quantize_int8.reference import dequantize_int8

_SHORT = 2**16
"""Columns whose products of int8 surely have a sum of 32 bits: GPUs' kernels add longer ones in fp32."""
_LAST = 2**32 - 1
_LISTED = 256
"""The most products that `int8_topk` lists as they come."""


@dataclass(eq=False, repr=False)
class PackedInt8Weight:
    """An int8 weight [N, K] in the layout that this machine's kernels read; made by `pack_int8`, kept as long as one likes.

    Besides what is listed here its contents are private: they depend on the machine and the version.
    """

    shape: torch.Size
    """[N, K]"""
    group_size: int
    """Columns that share a scale; K for one scale per row."""
    _data: Tensor
    """The extension's layout, uint8 and flat, or int8 [N, K]."""
    _scale: Tensor
    """fp32: flat beside the extension's layout, else [N, groups]."""
    _one_scale: bool
    """Whether `pack_int8` was given scales [N]."""
    dtype: torch.dtype = torch.float32
    """What the layer that has it gives, for who asks its weight as if it were a tensor of floats; nothing here does."""

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._data.device

    def data_ptrs(self) -> tuple[int, int]:
        """Addresses of what it holds: other ones after it was moved or replaced."""
        return self._data.data_ptr(), self._scale.data_ptr()

    def data_ptr(self) -> int:
        """Address of the weight, by which PEFT sees, as of tensors, whether two layers share one."""
        return self._data.data_ptr()

    def __getitem__(self, index: object) -> Tensor:
        raise TypeError("an int8 weight cannot be indexed, as PEFT's trainable tokens would; load the model in floats")

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the scales that `unpack` gives."""
        rows, columns = self.shape
        return (rows,) if self._one_scale else (rows, -(-columns // self.group_size))

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Give back exactly what was packed: int8 [N, K] and its fp32 scales."""
        qweight, scale = self._canonical()
        return qweight, scale[:, 0] if self._one_scale else scale

    def move_(self, device: torch.device | str) -> None:
        """Move to another device, in the layout for it; whoever holds this weight finds it there."""
        if torch.device(device) == self.device:
            return
        # What is on the meta device has no numbers yet.
        self.replace_(*(torch.zeros_like(t, device=device) if t.is_meta else t.to(device) for t in self.unpack()))

    def replace_(self, qweight: Tensor, scale: Tensor) -> None:
        """Pack another weight in this one's place; whoever holds it finds that. Raises what `pack_int8` raises."""
        vars(self).update(vars(pack_int8(qweight, scale)) | {"dtype": self.dtype})

    def rows(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantise some rows: int32 or int64 [...], each in [0, N), to [..., K] in `dtype`, rounded once from fp32.

        Raises TypeError for other indices or dtypes, ValueError for a row that is not there (looked at on the CPU only).
        """
        checks.check_integer(indices=indices)
        if not isinstance(dtype, torch.dtype) or dtype not in checks.FLOATS:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
        checks.check_device(weight=self._data, indices=indices)
        chosen, (n, k) = indices.flatten(), self.shape
        if self._is_native:
            rows = torch.ops.pg_kernels.int8_rows(self._data, self._scale, chosen.long(), n, k, self.group_size)
        else:
            if checks.values_are_free(chosen):
                _check_rows(chosen, n)
            rows = dequantize_int8(self._data[chosen], self._scale[chosen], self.group_size)
        return rows.to(dtype).view(*indices.shape, k)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All rows, [N, K]."""
        whole = torch.empty(self.shape, dtype=dtype, device=self.device)
        # In parts, as rows come in fp32 first.
        for start in range(0, self.shape[0], 4096):
            part = whole[start : start + 4096]
            part.copy_(self.rows(torch.arange(start, start + len(part), device=self.device), dtype))
        return whole

    @property
    def _is_native(self) -> bool:
        return self._data.dtype == torch.uint8

    def _canonical(self) -> tuple[Tensor, Tensor]:
        """int8 [N, K] and scales [N, groups]."""
        if not self._is_native:
            return self._data, self._scale
        return torch.ops.pg_kernels.unpack_int8(self._data, self._scale, *self.shape, self.group_size)

    def _operands(self, backend: str) -> tuple[Tensor, Tensor]:
        """What the op of a backend takes."""
        if backend != "native":
            return self._canonical()
        if self._is_native:
            return self._data, self._scale
        return torch.ops.pg_kernels.pack_int8(self._data, self._scale, self.group_size)

    def __repr__(self) -> str:
        return f"PackedInt8Weight({list(self.shape)}, group_size={self.group_size}, device={str(self.device)!r})"


def _native(device: torch.device) -> Any:
    """The module whose kernels and layout a device's tensors take."""
    return cuda if device.type == "cuda" else cpu


def _pack(qweight: Tensor, scale: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    # It takes addresses: the sizes must fit, whoever calls.
    checks.check_shape("qweight", qweight, ["N", "K"])
    n, k = qweight.shape
    _check_sizes(n, k, group_size)
    checks.check_shape("scale", scale, [n, -(-k // group_size)], " (qweight's N and its groups)")
    for name, tensor, dtype in (("qweight", qweight, torch.int8), ("scale", scale, torch.float32)):
        if tensor.dtype != dtype or tensor.device.type not in ("cpu", "cuda"):
            raise TypeError(f"{name}: expected {dtype} on a CPU or GPU, got {tensor.dtype} on {tensor.device}")
    checks.check_device(qweight=qweight, scale=scale)
    return _native(qweight.device).pack(qweight, scale, group_size)


def _fake_pack(qweight: Tensor, scale: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    data, scales = _native(qweight.device).packed_sizes(*qweight.shape, group_size)
    return qweight.new_empty(data, dtype=torch.uint8), scale.new_empty(scales)


def _check_layout(data: Tensor, packed_scale: Tensor, n: int, k: int, group_size: int) -> None:
    """The extensions take addresses: what is there must be a weight of these sizes, whoever calls."""
    checks.check_tensor(data=data, scale=packed_scale)
    _check_sizes(n, k, group_size)
    sizes = _native(data.device).packed_sizes(n, k, group_size)
    wanted = [("data", data, torch.uint8, sizes[0]), ("scale", packed_scale, torch.float32, sizes[1])]
    for name, tensor, dtype, size in wanted:
        there = tensor.device.type in ("cpu", "cuda") and tensor.device == data.device
        if tensor.dtype != dtype or tensor.shape != (size,) or not tensor.is_contiguous() or not there:
            raise ValueError(
                f"{name}: expected {size} contiguous {dtype} for a weight [{n}, {k}] in groups of {group_size}, "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def _check_sizes(n: int, k: int, group_size: int) -> None:
    if n < 0 or not 1 <= group_size <= k:
        raise ValueError(f"group_size: expected N >= 0 and groups of 1 to K columns, got {n}, {group_size} and K = {k}")


def _unpack(data: Tensor, packed_scale: Tensor, n: int, k: int, group_size: int) -> tuple[Tensor, Tensor]:
    _check_layout(data, packed_scale, n, k, group_size)
    return _native(data.device).unpack(data, packed_scale, n, k, group_size)


def _fake_unpack(data: Tensor, packed_scale: Tensor, n: int, k: int, group_size: int) -> tuple[Tensor, Tensor]:
    return data.new_empty(n, k, dtype=torch.int8), packed_scale.new_empty(n, -(-k // group_size))


def _rows(data: Tensor, packed_scale: Tensor, indices: Tensor, n: int, k: int, group_size: int) -> Tensor:
    _check_layout(data, packed_scale, n, k, group_size)
    checks.check_shape("indices", indices, ["R"])
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected int64, got {indices.dtype}")
    checks.check_device(data=data, indices=indices)
    if checks.values_are_free(indices):
        _check_rows(indices, n)
    return _native(data.device).rows_of(data, packed_scale, indices, n, k, group_size)


def _fake_rows(data: Tensor, packed_scale: Tensor, indices: Tensor, n: int, k: int, *rest: Any) -> Tensor:
    return packed_scale.new_empty(len(indices), k)


def _check_rows(indices: Tensor, n: int) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise ValueError(f"indices: expected numbers in [0, {n}), got {int(indices.min())} to {int(indices.max())}")


def _multiply(
    x: Tensor,
    data: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int],
    group_size: int,
    int8_activations: bool,
    backend: str,
    out_dtype: torch.dtype,
    geglu: bool = False,
) -> list[Tensor]:
    """x [M, K] times each of some weights in a backend's layout, `sizes` their rows; `geglu` makes one of two."""
    checks.check_shape("x", x, ["M", "K"])
    if backend not in ("native", "triton"):
        raise ValueError(f"backend: got {backend!r}, expected 'native' or 'triton'")
    module: Any = triton
    if backend == "native":
        module = _native(x.device)
        _check_dtypes("x", x.dtype, out_dtype)
        if not len(sizes) == len(data) == len(scales) == len(biases):
            raise ValueError(
                f"weights: got {len(data)}, expected as many scales, biases and sizes, not {len(scales)}, {len(biases)} and "
                f"{len(sizes)}"
            )
        for n, weight, scale, bias in zip(sizes, data, scales, biases, strict=True):
            _check_layout(weight, scale, n, x.shape[1], group_size)
            checks.check_device(x=x, weight=weight, bias=bias)
            checks.check_float(bias=bias)
            if bias is not None:
                checks.check_shape("bias", bias, [n])
        if geglu and len(set(sizes)) != 1:
            raise ValueError(f"sizes: expected gate and up of as many rows, got {list(sizes)}")
    if int8_activations and module is not cpu and min(group_size, x.shape[1]) > _SHORT:
        group = torch.arange(0, x.shape[1], _SHORT, device=x.device) // group_size
        scales = [scale.view(n, -1)[:, group] for n, scale in zip(sizes, scales, strict=True)]
        group_size = _SHORT
    return module.multiply(x, data, scales, biases, sizes, group_size, int8_activations, out_dtype, geglu)


def _check_dtypes(name: str, *dtypes: torch.dtype) -> None:
    """What is multiplied by a weight in the extension's layout, and the result, are floats that it knows."""
    for dtype in dtypes:
        if dtype not in extension.FLOAT_CODES:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16 for it and the result, got {dtype}")


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
    return _multiply(x, [weight], [scale], [bias], [n], group_size, int8_activations, backend, out_dtype)[0]


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], n, dtype=rest[-1])


def _backward(grad: Tensor, weight: Tensor, scale: Tensor, columns: int, group_size: int, backend: str) -> Tensor:
    checks.check_shape("grad", grad, ["M", "N"])
    checks.check_float(grad=grad)
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    checks.check_device(grad=grad, weight=weight)
    if backend == "native":
        weight, scale = _unpack(weight, scale, grad.shape[1], columns, group_size)
    on_gpu = (
        grad.device.type == "cuda"
        and devices.unavailable_reason("cuda") is None
        and devices.unsupported_reason(grad) is None
    )
    if backend == "triton" or (backend == "native" and on_gpu):
        return triton.input_gradient(grad, weight, scale, group_size)
    return reference.input_gradient(grad, weight, scale, group_size)


def _fake_backward(grad: Tensor, weight: Tensor, scale: Tensor, columns: int, *rest: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], columns)


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


def _projections(
    x: Tensor,
    data: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int],
    group_size: int,
    int8_activations: bool,
) -> list[Tensor]:
    checks.check_tensor(x=x)
    return _multiply(x, data, scales, biases, sizes, group_size, int8_activations, "native", x.dtype)


def _fake_projections(
    x: Tensor, data: Sequence[Tensor], scales: Sequence[Tensor], biases: Any, sizes: Sequence[int], *rest: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], n) for n in sizes]


def _geglu(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    n: int,
    group_size: int,
    int8_activations: bool,
    backend: str,
) -> Tensor:
    checks.check_tensor(x=x)
    weights, scales, biases = [gate, up], [gate_scale, up_scale], [None, None]
    return _multiply(x, weights, scales, biases, [n, n], group_size, int8_activations, backend, x.dtype, geglu=True)[0]


def _fake_geglu(
    x: Tensor, gate: Tensor, gate_scale: Tensor, up: Tensor, up_scale: Tensor, n: int, *rest: Any
) -> Tensor:
    return x.new_empty(x.shape[0], n)


def _topk(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    n: int,
    group_size: int,
    int8_activations: bool,
    k: int,
    softcap: float | None,
    log_probs: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    checks.check_shape("x", x, ["M", "K"])
    if not 1 <= k <= n:
        raise ValueError(f"k: expected a number in [1, {n}], got {k}")
    if backend == "reference":
        return reference.int8_topk(x, weight, scale, group_size, int8_activations, k, softcap, log_probs)
    if backend == "native" and x.device.type == "cpu" and k <= _LISTED:
        _check_dtypes("x", x.dtype)
        _check_layout(weight, scale, n, x.shape[1], group_size)
        checks.check_device(x=x, weight=weight)
        return cpu.topk(x, weight, scale, n, group_size, int8_activations, k, softcap, log_probs)
    y = _multiply(x, [weight], [scale], [None], [n], group_size, int8_activations, backend, torch.float32)[0]
    return _largest(y, k, softcap, log_probs)


def _largest(y: Tensor, k: int, softcap: float | None, log_probs: bool) -> tuple[Tensor, Tensor]:
    """`reference.largest` of fp32 y [M, N] without sorting all of it."""
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    if k == 1:
        values, indices = y.max(-1, keepdim=True)
    else:
        # By integers that are ordered as (value, −index) are.
        bits = (y + 0.0).view(torch.int32)  # −0 becomes 0
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(y.isnan(), 0x7FFFFFFF)
        keys = (ordered.long() << 32) + torch.arange(_LAST, _LAST - y.shape[1], -1, device=y.device)
        indices = _LAST - (keys.topk(k).values & _LAST)
        values = y.gather(1, indices)
    return values - y.logsumexp(-1, keepdim=True) if log_probs else values, indices


def _fake_topk(
    x: Tensor, weight: Tensor, scale: Tensor, n: int, group_size: int, int8_activations: bool, k: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k, dtype=torch.float32), x.new_empty(len(x), k, dtype=torch.int64)


register_backend("int8_linear", "native", extension.unavailable_reason_cpu_or_cuda)
register_backend("int8_linear", "triton", devices.unavailable_reason)
# With backend "native" weight and scale are in the extension's layout, else int8 [N, K] and [N, groups].
define_opaque(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, SymInt n, SymInt group_size, bool int8_activations, "
    "str backend, ScalarType out_dtype) -> Tensor",
    _forward,
    _fake,
    _Int8Linear.apply,
)
# Opaque, although plain PyTorch: where the last group is shorter, Inductor's code for CPUs (torch 2.13) reads beyond the scales.
define_opaque(
    "int8_linear_backward(Tensor grad, Tensor weight, Tensor scale, SymInt columns, SymInt group_size, str backend) -> Tensor",
    _backward,
    _fake_backward,
)
define_opaque("pack_int8(Tensor qweight, Tensor scale, SymInt group_size) -> (Tensor, Tensor)", _pack, _fake_pack)
define_opaque(
    "unpack_int8(Tensor data, Tensor scale, SymInt n, SymInt k, SymInt group_size) -> (Tensor, Tensor)",
    _unpack,
    _fake_unpack,
)
define_opaque(
    "int8_rows(Tensor data, Tensor scale, Tensor indices, SymInt n, SymInt k, SymInt group_size) -> Tensor",
    _rows,
    _fake_rows,
)
# Without gradients, for weights in the extension's layout; the second one takes other backends' too.
define_opaque(
    "int8_projections(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] biases, SymInt[] sizes, SymInt group_size, "
    "bool int8_activations) -> Tensor[]",
    _projections,
    _fake_projections,
)
define_opaque(
    "int8_geglu(Tensor x, Tensor gate, Tensor gate_scale, Tensor up, Tensor up_scale, SymInt n, SymInt group_size, "
    "bool int8_activations, str backend) -> Tensor",
    _geglu,
    _fake_geglu,
)
define_opaque(
    "int8_topk(Tensor x, Tensor weight, Tensor scale, SymInt n, SymInt group_size, bool int8_activations, int k, "
    "float? softcap, bool log_probs, str backend) -> (Tensor, Tensor)",
    _topk,
    _fake_topk,
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
        ValueError: shapes or devices that do not fit, scales that are not finite (looked at on the CPU only).
    """
    weight = _checked("qweight", qweight, scale)
    fits = _native(weight.device).groups_fit(qweight.shape[1], weight.group_size)
    if extension.unavailable_reason_cpu_or_cuda(weight.device.type) is not None or not fits:
        return weight
    data, packed_scale = torch.ops.pg_kernels.pack_int8(weight._data, weight._scale, weight.group_size)
    return PackedInt8Weight(weight.shape, weight.group_size, data, packed_scale, weight._one_scale)


def _checked(name: str, qweight: Tensor, scale: Tensor) -> PackedInt8Weight:
    """Check a weight, which errors call `name`; as it is, in no layout."""
    checks.check_tensor(**{name: qweight, "scale": scale})
    for argument, tensor, dtype in ((name, qweight, torch.int8), ("scale", scale, torch.float32)):
        if tensor.dtype != dtype:
            raise TypeError(f"{argument}: expected {dtype}, got {tensor.dtype}")
    checks.check_shape(name, qweight, ["N", "K"])
    checks.check_row(name, qweight)
    checks.check_device(**{name: qweight, "scale": scale})
    rows, columns = qweight.shape
    one_scale = scale.dim() == 1
    if one_scale:
        checks.check_shape("scale", scale, [rows], f" ({name}'s N) or [N, groups]")
        scale = scale[:, None]
    else:
        checks.check_shape("scale", scale, [rows, "groups"], f" (N is {name}'s) or [N]")
    group_size = _group_size(columns, scale.shape[1])
    if checks.values_are_free(scale) and not bool(scale.isfinite().all()):
        raise ValueError("scale: holds NaN or infinity")
    return PackedInt8Weight(qweight.shape, group_size, qweight, scale, one_scale)


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
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply by the transpose of an int8 weight: x · (weight · scale)ᵀ + bias.

    Args:
        x: [..., K], fp32, fp16 or bf16. Under autocast x is cast.
        weight: packed, or int8 [N, K] with its `scale`, which is packed for every call anew.
        scale: fp32 [N] or [N, groups]; only with an unpacked weight.
        bias: [N], fp32, fp16 or bf16.
        activations: "keep" multiplies x (W8A16: the C++ kernel sees 16 bits of it, scaled for every 512 columns of a row);
            "int8" first rounds every row of x to 255 levels (W8A8).
        out_dtype: of the result: x's, the default, or torch.float32, which leaves the sums unrounded.

    Returns:
        [..., N] in x's dtype or `out_dtype`; products and sums are fp32 or exact integers. Differentiable in x and bias; with
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
        weight = _checked("weight", weight, scale)
    x, backend = _prepared(x, [weight], [bias], activations)
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


def int8_projections(
    x: Tensor,
    weights: Sequence[PackedInt8Weight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activations: str = "keep",
) -> tuple[Tensor, ...]:
    """Multiply one input by several weights, as `int8_linear` does by each; without gradients in one call.

    Args:
        x: [..., K], fp32, fp16 or bf16. Under autocast x is cast.
        weights: packed, with the same number of columns K.
        biases: as many, each [N] of its weight or None; default: none.
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
    x, backend = _prepared(x, weights, biases, activations)
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


def int8_geglu(x: Tensor, gate: PackedInt8Weight, up: PackedInt8Weight, *, activations: str = "keep") -> Tensor:
    """gelu_tanh(x · gateᵀ) · (x · upᵀ); without gradients in one call, which rounds to x's dtype only at its end.

    Args:
        x: [..., K], fp32, fp16 or bf16. Under autocast x is cast.
        gate, up: packed, [N, K] both.
        activations: as for `int8_linear`.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: as `int8_linear`; ValueError for weights of different shapes.
    """
    _check_packed(gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"up: expected shape {list(gate.shape)} (gate's), got {list(up.shape)}")
    x, backend = _prepared(x, [gate, up], [None, None], activations)
    fused = backend == "triton" or (backend == "native" and gate._is_native and up._is_native)
    if not fused or gate.group_size != up.group_size or needs_autograd(x):
        return geglu(*int8_projections(x, [gate, up], activations=activations))
    y = torch.ops.pg_kernels.int8_geglu(
        x.reshape(-1, x.shape[-1]),
        *gate._operands(backend),
        *up._operands(backend),
        gate.shape[0],
        gate.group_size,
        activations == "int8",
        backend,
    )
    return y.reshape(*x.shape[:-1], gate.shape[0])


def int8_topk(
    x: Tensor,
    weight: PackedInt8Weight,
    k: int = 1,
    *,
    softcap: float | None = None,
    log_probs: bool = False,
    activations: str = "keep",
) -> tuple[Tensor, Tensor]:
    """The k largest of x · (weight · scale)ᵀ and where they are: an output head that does not write its logits.

    Args:
        x: [..., K], fp32, fp16 or bf16. Under autocast x is cast.
        weight: packed, [N, K].
        k: in [1, N].
        softcap: a positive c turns every product y into c · tanh(y / c).
        log_probs: give log-probabilities over all N instead of the products.
        activations: as for `int8_linear`.

    Returns:
        fp32 [..., k], the largest first, and int64 [..., k] in [0, N); of equal ones the lower index comes first, and NaN counts
        as the largest. Without gradients.

    Raises:
        TypeError, ValueError: as `int8_linear`; ValueError for a k out of range or a softcap that is not positive.
    """
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    checks.check_bool(log_probs=log_probs)
    checks.check_positive(softcap=softcap)
    x, backend = _prepared(x.detach() if isinstance(x, Tensor) else x, [weight], [None], activations)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k: expected a number in [1, {weight.shape[0]}] (the weight's N), got {k}")
    values, indices = torch.ops.pg_kernels.int8_topk(
        x.reshape(-1, x.shape[-1]),
        *weight._operands(backend),
        weight.shape[0],
        weight.group_size,
        activations == "int8",
        k,
        softcap,
        log_probs,
        backend,
    )
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def _check_packed(**weights: object) -> None:
    for name, weight in weights.items():
        if not isinstance(weight, PackedInt8Weight):
            raise TypeError(f"{name}: expected one that pack_int8 has packed, got {type(weight).__name__}")


def _prepared(
    x: Tensor, weights: Sequence[PackedInt8Weight], biases: Sequence[Tensor | None], activations: str
) -> tuple[Tensor, str]:
    """Check what goes into a product; x as autocast has it, and the backend."""
    if activations not in ("keep", "int8"):
        raise ValueError(f"activations: got {activations!r}, expected 'keep' or 'int8'")
    checks.check_tensor(x=x)
    for weight, bias in zip(weights, biases, strict=True):
        _check_packed(weight=weight)
        checks.check_float(x=x, bias=bias)
        if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(f"x: expected shape [..., {weight.shape[1]}] (the weight's K), got {list(x.shape)}")
        if bias is not None:
            checks.check_shape("bias", bias, [weight.shape[0]], " (the weight's N)")
        checks.check_device(x=x, weight=weight._data, bias=bias)
    (x,) = checks.autocast(x)
    unsupported = [_native(x.device).unsupported_reason(x, weight.group_size, weight.shape[1]) for weight in weights]
    native = next((reason for reason in unsupported if reason is not None), None)
    # Where there are both, the extension's kernels are the faster ones.
    avoid = ("triton",) if native is None and extension.unavailable_reason_cpu_or_cuda(x.device.type) is None else ()
    return x, select("int8_linear", x.device.type, {"native": native, "triton": devices.unsupported_reason(x)}, avoid)
