"""The extensions' layouts of int8 weights: ops that pack, unpack and read rows, and checks of packed buffers.

The extensions take addresses. Each op checks the sizes of its buffers, so that a direct call of the op is safe, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pg_kernels.ops._common import checks
from pg_kernels.ops._common.registration import define_opaque
from pg_kernels.ops.int8_linear import cpu, cuda


def native_backend(device: torch.device) -> Any:
    """Return the module whose layout and kernels tensors on this device take: `cpu` or `cuda`."""
    return cuda if device.type == "cuda" else cpu


def check_layout(data: Tensor, packed_scale: Tensor, n: int, k: int, group_size: int) -> None:
    """Raise unless the buffers hold a packed weight [n, k] in groups of this size."""
    checks.check_tensor(data=data, scale=packed_scale)
    _check_sizes(n, k, group_size)
    data_size, scale_size = native_backend(data.device).packed_sizes(n, k, group_size)
    for name, tensor, dtype, size in (
        ("data", data, torch.uint8, data_size),
        ("scale", packed_scale, torch.float32, scale_size),
    ):
        on_device = tensor.device.type in ("cpu", "cuda") and tensor.device == data.device
        if tensor.dtype != dtype or tensor.shape != (size,) or not tensor.is_contiguous() or not on_device:
            raise ValueError(
                f"{name}: expected {size} contiguous {dtype} for a weight [{n}, {k}] in groups of {group_size}, "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def check_indices(indices: Tensor, n: int) -> None:
    """Raise ValueError unless all indices lie in [0, n). Waits for the device: call it for CPU tensors only."""
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise ValueError(f"indices: expected numbers in [0, {n}), got {int(indices.min())} to {int(indices.max())}")


def _check_sizes(n: int, k: int, group_size: int) -> None:
    if n < 0 or not 1 <= group_size <= k:
        raise ValueError(f"group_size: expected N >= 0 and groups of 1 to K columns, got {n}, {group_size} and K = {k}")


def _pack(qweight: Tensor, scale: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    checks.check_shape("qweight", qweight, ["N", "K"])
    n, k = qweight.shape
    _check_sizes(n, k, group_size)
    checks.check_shape("scale", scale, [n, -(-k // group_size)], " (qweight's N and its groups)")
    for name, tensor, dtype in (("qweight", qweight, torch.int8), ("scale", scale, torch.float32)):
        if tensor.dtype != dtype or tensor.device.type not in ("cpu", "cuda"):
            raise TypeError(f"{name}: expected {dtype} on a CPU or GPU, got {tensor.dtype} on {tensor.device}")
    checks.check_device(qweight=qweight, scale=scale)
    return native_backend(qweight.device).pack(qweight, scale, group_size)


def _fake_pack(qweight: Tensor, scale: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    data_size, scale_size = native_backend(qweight.device).packed_sizes(*qweight.shape, group_size)
    return qweight.new_empty(data_size, dtype=torch.uint8), scale.new_empty(scale_size)


def unpack(data: Tensor, packed_scale: Tensor, n: int, k: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return int8 [n, k] and its scales [n, groups] from packed buffers, which it checks."""
    check_layout(data, packed_scale, n, k, group_size)
    return native_backend(data.device).unpack(data, packed_scale, n, k, group_size)


def _fake_unpack(data: Tensor, packed_scale: Tensor, n: int, k: int, group_size: int) -> tuple[Tensor, Tensor]:
    return data.new_empty(n, k, dtype=torch.int8), packed_scale.new_empty(n, -(-k // group_size))


def _dequantize_rows(data: Tensor, packed_scale: Tensor, indices: Tensor, n: int, k: int, group_size: int) -> Tensor:
    check_layout(data, packed_scale, n, k, group_size)
    checks.check_shape("indices", indices, ["R"])
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected int64, got {indices.dtype}")
    checks.check_device(data=data, indices=indices)
    if checks.values_are_free(indices):
        check_indices(indices, n)
    return native_backend(data.device).dequantize_rows(data, packed_scale, indices, n, k, group_size)


def _fake_dequantize_rows(data: Tensor, packed_scale: Tensor, indices: Tensor, n: int, k: int, *rest: Any) -> Tensor:
    return packed_scale.new_empty(len(indices), k)


define_opaque("pack_int8(Tensor qweight, Tensor scale, SymInt group_size) -> (Tensor, Tensor)", _pack, _fake_pack)
define_opaque(
    "unpack_int8(Tensor data, Tensor scale, SymInt n, SymInt k, SymInt group_size) -> (Tensor, Tensor)",
    unpack,
    _fake_unpack,
)
define_opaque(
    "int8_rows(Tensor data, Tensor scale, Tensor indices, SymInt n, SymInt k, SymInt group_size) -> Tensor",
    _dequantize_rows,
    _fake_dequantize_rows,
)
