from __future__ import annotations

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, extension
from pg_kernels.ops._common.extension import _C, FLOAT_CODES
from pg_kernels.ops._common.registration import define_opaque
from pg_kernels.ops.quantize_int8 import reference


def _native(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    # The extension takes addresses. Check the sizes here, so that a direct call of the op is safe, too.
    extension.check(weight=weight)
    checks.check_shape("weight", weight, ["N", "K"])
    checks.check_row("weight", weight)
    if not 1 <= group_size <= weight.shape[1]:
        raise ValueError(f"group_size: expected a number in [1, {weight.shape[1]}], got {group_size}")
    weight = weight.contiguous()
    qweight, scale = _fake(weight, group_size)
    _C.quantize_int8(
        n=weight.shape[0],
        k=weight.shape[1],
        group=group_size,
        type=FLOAT_CODES[weight.dtype],
        weight=weight.data_ptr(),
        q=qweight.data_ptr(),
        scale=scale.data_ptr(),
    )
    return qweight, scale


def _fake(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    return weight.new_empty(n, k, dtype=torch.int8), weight.new_empty(n, -(-k // group_size), dtype=torch.float32)


# Opaque although it is plain PyTorch: with a shorter last group, Inductor's code for CPUs (torch 2.13) reads past the scales.
define_opaque("quantize_int8(Tensor weight, int group_size) -> (Tensor, Tensor)", reference.quantize_int8, _fake)
define_opaque("quantize_int8_native(Tensor weight, int group_size) -> (Tensor, Tensor)", _native, _fake)
register_backend("quantize_int8", "native", extension.unavailable_reason)


def check_group_size(group_size: int | None) -> None:
    """Raise TypeError or ValueError unless `group_size` is a power of two or None."""
    if group_size is None:
        return
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"group_size: expected an int, got {type(group_size).__name__}")
    if group_size < 1 or group_size & (group_size - 1):
        raise ValueError(f"group_size: expected a power of two, got {group_size}")


def quantize_int8(weight: Tensor, *, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a weight to int8, symmetrically, with one scale per row or per group of a row's columns.

    The largest magnitude of a group becomes ±127, every other number the nearest level. Scales are computed in fp32. A group of
    zeros has scale 0.

    Args:
        weight: [N, K], fp32, fp16 or bf16, finite.
        group_size: columns that share a scale: a power of two, so that the number of groups determines it. The last group may
            be shorter. Default: the whole row.

    Returns:
        int8 [N, K], and fp32 scales [N], or [N, ceil(K / group_size)] with a group size: weight ≈ int8 · scale.

    Raises:
        TypeError: a weight that is not floating-point, a group size that is not an int.
        ValueError: a weight that is not two-dimensional or has empty rows, a group size that is not a power of two, NaN or
            infinity in the weight (checked on the CPU only; on other devices the scale of such a group is not finite).
    """
    checks.check_float(weight=weight)
    checks.check_shape("weight", weight, ["N", "K"])
    checks.check_row("weight", weight)
    check_group_size(group_size)
    native = select("quantize_int8", weight.device.type, {"native": extension.unsupported_reason(weight)}) == "native"
    quantize = torch.ops.pg_kernels.quantize_int8_native if native else torch.ops.pg_kernels.quantize_int8
    k = weight.shape[1]
    qweight, scale = quantize(weight.detach(), min(group_size or k, k))
    # A number that is not finite makes its scale not finite, and scales are fewer than weights.
    if checks.values_are_free(scale) and not bool(scale.isfinite().all()):
        raise ValueError("weight: holds NaN or infinity, which int8 cannot")
    return qweight, scale if group_size is not None else scale[:, 0]
