"""A processor's output: tensors by name, which move to a device together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Inputs(dict[str, Tensor]):
    """A model's arguments by name, for `model(**inputs)`; each is an attribute, too."""

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Inputs:
        """Move all tensors to a device, cast floating-point tensors to a dtype, and return self.

        Either may be the first argument, as in transformers' BatchFeature.

        Raises:
            TypeError: `dtype` is not a floating-point dtype.
            RuntimeError: the device does not exist.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype!r}")
        for name, tensor in self.items():
            kind = dtype if tensor.is_floating_point() else None
            self[name] = tensor.to(device=device, dtype=kind, non_blocking=non_blocking)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"there is no {name!r} among {', '.join(self)}") from error
