"""`pack_int8`, and the `PackedInt8Weight` that it makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pg_kernels.ops._common import checks, extension
from pg_kernels.ops.int8_linear.layout import check_indices, native_backend
from pg_kernels.ops.quantize_int8.dequantize import dequantize_int8


@dataclass(eq=False, repr=False)
class PackedInt8Weight:
    """An int8 weight [N, K] in the layout that this machine's kernels read, made once by `pack_int8`.

    Attributes that are not documented here are private: they depend on the machine and the version.
    """

    shape: torch.Size
    """[N, K]"""
    group_size: int
    """Columns that share a scale; K for one scale per row."""
    _data: Tensor
    """The extension's layout, uint8 and flat; or int8 [N, K]."""
    _scale: Tensor
    """fp32: flat beside the extension's layout, else [N, groups]."""
    _one_scale: bool
    """Whether `pack_int8` was given scales [N]."""
    dtype: torch.dtype = torch.float32
    """The dtype of the outputs of the layer that holds the weight, for code that reads `layer.weight.dtype`. Unused here."""

    @property
    def device(self) -> torch.device:
        """Return the device of the weight."""
        return self._data.device

    def data_ptrs(self) -> tuple[int, int]:
        """Return the addresses of the weight and its scales. They change when the weight is moved or replaced."""
        return self._data.data_ptr(), self._scale.data_ptr()

    def data_ptr(self) -> int:
        """Return the address of the weight. PEFT compares the addresses of weights to find layers that share one."""
        return self._data.data_ptr()

    def __getitem__(self, index: object) -> Tensor:
        raise TypeError("an int8 weight cannot be indexed, as PEFT's trainable tokens would; load the model in floats")

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Return the shape of the scales that `unpack` returns."""
        n, k = self.shape
        return (n,) if self._one_scale else (n, -(-k // self.group_size))

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Return exactly what was packed: int8 [N, K] and its fp32 scales."""
        qweight, scale = self._unpacked()
        return qweight, scale[:, 0] if self._one_scale else scale

    def move_(self, device: torch.device | str) -> None:
        """Move this weight to another device, into the layout for it. Every layer that shares the weight sees the move."""
        if torch.device(device) == self.device:
            return
        # The meta device has no values to copy.
        self.replace_(*(torch.zeros_like(t, device=device) if t.is_meta else t.to(device) for t in self.unpack()))

    def replace_(self, qweight: Tensor, scale: Tensor) -> None:
        """Pack another weight into this object. Every layer that shares it sees the change. Raises what `pack_int8` raises."""
        vars(self).update(vars(pack_int8(qweight, scale)) | {"dtype": self.dtype})

    def rows(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantise the rows at some indices: int32 or int64 [...] in [0, N) to [..., K] in `dtype`, rounded once from fp32.

        Raises:
            TypeError: indices or a dtype of another kind.
            ValueError: an index outside [0, N) (checked on the CPU only).
        """
        checks.check_integer(indices=indices)
        if not isinstance(dtype, torch.dtype) or dtype not in checks.FLOATS:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
        checks.check_device(weight=self._data, indices=indices)
        flat, (n, k) = indices.flatten(), self.shape
        if self._is_native:
            rows = torch.ops.pg_kernels.int8_rows(self._data, self._scale, flat.long(), n, k, self.group_size)
        else:
            if checks.values_are_free(flat):
                check_indices(flat, n)
            rows = dequantize_int8(self._data[flat], self._scale[flat], self.group_size)
        return rows.to(dtype).view(*indices.shape, k)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the whole weight, [N, K] in `dtype`, rounded once from fp32."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        # Dequantise part by part: rows are fp32 before they are cast.
        for start in range(0, self.shape[0], 4096):
            part = out[start : start + 4096]
            part.copy_(self.rows(torch.arange(start, start + len(part), device=self.device), dtype))
        return out

    @property
    def _is_native(self) -> bool:
        """Whether the weight is in the extension's layout."""
        return self._data.dtype == torch.uint8

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        """Return int8 [N, K] and scales [N, groups]."""
        if not self._is_native:
            return self._data, self._scale
        return torch.ops.pg_kernels.unpack_int8(self._data, self._scale, *self.shape, self.group_size)

    def _operands(self, backend: str) -> tuple[Tensor, Tensor]:
        """Return the weight and its scales as the ops take them for a backend."""
        if backend != "native":
            return self._unpacked()
        if self._is_native:
            return self._data, self._scale
        return torch.ops.pg_kernels.pack_int8(self._data, self._scale, self.group_size)

    def __repr__(self) -> str:
        return f"PackedInt8Weight({list(self.shape)}, group_size={self.group_size}, device={str(self.device)!r})"


def pack_int8(qweight: Tensor, scale: Tensor) -> PackedInt8Weight:
    """Lay out an int8 weight for this machine's kernels, once, so that the originals can be released.

    Args:
        qweight: int8 [N, K].
        scale: fp32 [N], or [N, groups] as `quantize_int8` returns them. The number of groups determines their size, a power of
            two of columns.

    Returns:
        An opaque weight for `int8_linear`, whose `unpack()` returns the originals.

    Raises:
        TypeError: dtypes other than int8 and fp32.
        ValueError: shapes or devices that do not fit, scales that are not finite (checked on the CPU only).
    """
    weight = without_layout("qweight", qweight, scale)
    supported = native_backend(weight.device).supports_groups(qweight.shape[1], weight.group_size)
    if extension.unavailable_reason_cpu_or_cuda(weight.device.type) is not None or not supported:
        return weight
    data, packed_scale = torch.ops.pg_kernels.pack_int8(weight._data, weight._scale, weight.group_size)
    return PackedInt8Weight(weight.shape, weight.group_size, data, packed_scale, weight._one_scale)


def without_layout(name: str, qweight: Tensor, scale: Tensor) -> PackedInt8Weight:
    """Validate an int8 weight, called `name` in errors, and its scales. Wrap them without packing."""
    checks.check_tensor(**{name: qweight, "scale": scale})
    for argument, tensor, dtype in ((name, qweight, torch.int8), ("scale", scale, torch.float32)):
        if tensor.dtype != dtype:
            raise TypeError(f"{argument}: expected {dtype}, got {tensor.dtype}")
    checks.check_shape(name, qweight, ["N", "K"])
    checks.check_row(name, qweight)
    checks.check_device(**{name: qweight, "scale": scale})
    n, k = qweight.shape
    one_scale = scale.dim() == 1
    if one_scale:
        checks.check_shape("scale", scale, [n], f" ({name}'s N) or [N, groups]")
        scale = scale[:, None]
    else:
        checks.check_shape("scale", scale, [n, "groups"], f" (N is {name}'s) or [N]")
    group_size = _group_size(k, scale.shape[1])
    if checks.values_are_free(scale) and not bool(scale.isfinite().all()):
        raise ValueError("scale: holds NaN or infinity")
    return PackedInt8Weight(qweight.shape, group_size, qweight, scale, one_scale)


def _group_size(k: int, groups: int) -> int:
    """Return the power of two g with ceil(k / g) == groups, which is unique for two groups or more; k for one group."""
    if groups == 1:
        return k
    size = 1
    while groups and size * groups < k:
        size *= 2
    if -(-k // size) != groups:
        raise ValueError(f"scale: {groups} groups cannot share {k} columns in powers of two")
    return size
