"""Checks of arguments of several functions. Each check returns the value, or raises an error that names the argument."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def integer(name: str, value: object) -> int:
    """Return an integer of any library as an int; TypeError for anything else, booleans included."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(f"{name}: expected an integer, got {value!r:.80}")


def number(name: str, value: object) -> float:
    """Return a number as a float; TypeError for anything else, booleans included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name}: expected a number, got {value!r:.80}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: {value!r:.80} is too large") from error


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """Return one id or several as a tuple. Raises TypeError for non-integers, ValueError for no id or an id beyond 64 bits."""
    several = isinstance(value, (Sequence, Tensor, np.ndarray)) and not isinstance(value, str) and np.ndim(value) == 1
    ids = tuple(integer(name, token_id) for token_id in (value if several else [value]))  # type: ignore[attr-defined]
    if not ids or not all(-(2**63) <= token_id < 2**63 for token_id in ids):
        raise ValueError(f"{name}: expected one token id or several, got {value!r:.80}")
    return ids


def check_prompt(prompt: Mapping[str, object]) -> None:
    """Raise TypeError or ValueError if a batch of prompts, tensors by name, holds other values or no token."""
    for name, tensor in prompt.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if name in ("pixel_values", "image_features") and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected floating-point numbers, got {tensor.dtype}")
        if name == "input_ids" and tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected torch.int64, got {tensor.dtype}")
        if name == "input_ids" and (tensor.dim() != 2 or not tensor.numel()):
            raise ValueError(f"{name}: expected shape [B, S] with at least one token, got {list(tensor.shape)}")
