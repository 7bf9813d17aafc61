"""Argument checks that ops share. Each raises TypeError or ValueError that names the argument, before any kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""float64 is for gradcheck: only the reference backend takes it."""
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_tensor(**values: object) -> None:
    """Require every value to be a dense tensor: not None, a list of numbers, or a sparse or nested tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_nested:
            raise TypeError(
                f"{name}: expected a dense tensor, got {'a nested one' if value.is_nested else value.layout}"
            )


def check_float(**tensors: Tensor | None) -> None:
    """Require floating-point tensors. None is skipped."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(**{name: tensor})
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")


def check_integer(**tensors: Tensor) -> None:
    """Require int32 or int64 tensors."""
    for name, tensor in tensors.items():
        check_tensor(**{name: tensor})
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {tensor.dtype}")


def check_same(**tensors: Tensor | None) -> None:
    """Require the first tensor's device and dtype of all others. None is skipped."""
    check_device(**tensors)
    (first_name, first), *others = [(name, t) for name, t in tensors.items() if t is not None]
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: has dtype {tensor.dtype}, but {first_name} has {first.dtype}")


def check_device(**tensors: Tensor | None) -> None:
    """Require the first tensor's device of all others. None is skipped."""
    (first_name, first), *others = [(name, t) for name, t in tensors.items() if t is not None]
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{name}: is on {tensor.device}, but {first_name} is on {first.device}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str], why: str = "") -> None:
    """Require a shape. In `expected` a number is a size, and a string is the name of a dimension of any size."""
    check_tensor(**{name: tensor})
    matches = tensor.dim() == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(tensor.shape, expected, strict=True)
    )
    if not matches:
        shape = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected shape [{shape}]{why}, got {list(tensor.shape)}")


def check_row(name: str, tensor: Tensor) -> None:
    """Require at least one dimension, and a last one that is not empty."""
    check_tensor(**{name: tensor})
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [..., N] with N >= 1, got {list(tensor.shape)}")


def check_number(**numbers: object) -> None:
    """Require real numbers: no bool, tensor or string."""
    for name, number in numbers.items():
        if not isinstance(number, Real | torch.SymInt | torch.SymFloat) or isinstance(number, bool):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")


def check_int(**numbers: object) -> None:
    """Require integers that int64 can hold. None is skipped."""
    for name, number in numbers.items():
        if number is None:
            continue
        if not isinstance(number, Integral | torch.SymInt) or isinstance(number, bool):
            raise TypeError(f"{name}: expected an int, got {type(number).__name__}")
        if not -(2**63) <= int(number) < 2**63:
            raise ValueError(f"{name}: expected a number that int64 can hold, got {number}")


def check_bool(**flags: object) -> None:
    """Require True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")


def check_positive(**numbers: float | None) -> None:
    """Require positive numbers that are normal in fp32: neither denormal nor infinite. None is skipped."""
    for name, number in numbers.items():
        if number is None:
            continue
        check_number(**{name: number})
        if not number > 0:
            raise ValueError(f"{name}: expected a positive number, got {number}")
        if not _SMALLEST <= number <= _LARGEST:
            raise ValueError(f"{name}: expected a number that fp32 can hold, got {number}")


def values_are_free(tensor: Tensor) -> bool:
    """Return whether values can be read without synchronising with a device or breaking a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype if autocast is on, as autocast does for PyTorch's matrix products."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)
