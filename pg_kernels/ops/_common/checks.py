"""Argument checks that every op shares: each raises before anything runs and names the argument."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""float64 is for gradcheck: the plain definitions take it, kernels do not."""
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_tensor(**values: object) -> None:
    """Every value must be a dense tensor: neither None nor a list of numbers, nor sparse or nested."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_nested:
            raise TypeError(
                f"{name}: expected a dense tensor, got {'a nested one' if value.is_nested else value.layout}"
            )


def check_float(**tensors: Tensor | None) -> None:
    """Every tensor given must be a floating-point one; None is passed over."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(**{name: tensor})
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")


def check_integer(**tensors: Tensor) -> None:
    """Every tensor must hold int32 or int64."""
    for name, tensor in tensors.items():
        check_tensor(**{name: tensor})
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {tensor.dtype}")


def check_same(**tensors: Tensor | None) -> None:
    """All tensors given must have the first one's device and dtype."""
    check_device(**tensors)
    (first_name, first), *others = [(name, t) for name, t in tensors.items() if t is not None]
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: has dtype {tensor.dtype}, but {first_name} has {first.dtype}")


def check_device(**tensors: Tensor | None) -> None:
    """All tensors given must be on the first one's device."""
    (first_name, first), *others = [(name, t) for name, t in tensors.items() if t is not None]
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{name}: is on {tensor.device}, but {first_name} is on {first.device}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str], why: str = "") -> None:
    """Sizes must match where `expected` has a number; a string there is a name for any size."""
    check_tensor(**{name: tensor})
    matches = tensor.dim() == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(tensor.shape, expected, strict=True)
    )
    if not matches:
        shape = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected shape [{shape}]{why}, got {list(tensor.shape)}")


def check_row(name: str, tensor: Tensor) -> None:
    """The tensor needs at least one dimension, and its last one must not be empty."""
    check_tensor(**{name: tensor})
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [..., N] with N >= 1, got {list(tensor.shape)}")


def check_number(**numbers: object) -> None:
    """Every value must be one real number: no bool, no tensor, no text."""
    for name, number in numbers.items():
        if not isinstance(number, Real | torch.SymInt | torch.SymFloat) or isinstance(number, bool):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")


def check_int(**numbers: object) -> None:
    """Every value given must be one integer that int64 can hold; None is passed over."""
    for name, number in numbers.items():
        if number is None:
            continue
        if not isinstance(number, Integral | torch.SymInt) or isinstance(number, bool):
            raise TypeError(f"{name}: expected an int, got {type(number).__name__}")
        if not -(2**63) <= int(number) < 2**63:
            raise ValueError(f"{name}: expected a number that int64 can hold, got {number}")


def check_bool(**flags: object) -> None:
    """Every value must be True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")


def check_positive(**numbers: float | None) -> None:
    """Every number given must be above zero and finite, as fp32, too; None is passed over."""
    for name, number in numbers.items():
        if number is None:
            continue
        check_number(**{name: number})
        if not number > 0:
            raise ValueError(f"{name}: expected a positive number, got {number}")
        if not _SMALLEST <= number <= _LARGEST:
            raise ValueError(f"{name}: expected a number that fp32 can hold, got {number}")


def values_are_free(tensor: Tensor) -> bool:
    """Tell whether values can be looked at without waiting for a device or breaking a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where autocast is on, as it does for torch's own matrix products."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)
