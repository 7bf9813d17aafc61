"""Where Triton kernels run, and how tensors reach them: what every op's `op.py` and `tiles.py` share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MINIMUM_CAPABILITY = (8, 0)
MAX_ROWS_AT_ONCE = 128
TUNED = Path(__file__).parent.parent / "tuned"
"""One JSON for each GPU that `pg-kernels tune` has run on."""

_HAS_TRITON = util.find_spec("triton") is not None
_pretended: Device | None = None
_tried: Mapping[tuple[str, str], Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Device:
    """What the choice of tiles may depend on."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int

    @property
    def shared_memory(self) -> int:
        """Bytes that one program may use."""
        return {(8, 0): 166_912, (8, 7): 166_912}.get(self.capability, 101_376 if self.capability < (9, 0) else 232_448)


INTERPRETER = Device("Triton's interpreter", (8, 0), 2)


def obstacle(device_type: str) -> str | None:
    """Why Triton kernels cannot run on tensors of a device type here, or None when they can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if device_type == "cpu":
        if _interpreting() or _pretended is not None:
            return None
        return "needs a CUDA GPU, or TRITON_INTERPRET=1 for Triton's interpreter"
    if device_type != "cuda" or not torch.cuda.is_available():
        return "needs a CUDA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < MINIMUM_CAPABILITY:
        return f"needs compute capability {MINIMUM_CAPABILITY}, this GPU has {capability}"
    return None


# As torch.compiler.assume_constant_result does, which imports all of torch.compile for it: 1.2 s and 150 MB at every start.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unfit(*tensors: Tensor | None) -> str | None:
    """Why kernels, which compute in fp32 and count rows in int32, cannot take these tensors [..., N], or None when they can."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.dtype == torch.float64 for tensor in given):
        return "float64 runs on backend 'reference' only"
    if any(tensor.numel() // max(tensor.shape[-1:].numel(), 1) >= 2**31 - MAX_ROWS_AT_ONCE for tensor in given):
        return "2^31 rows or more run on backend 'reference' only"
    return None


def device_of(tensor: Tensor) -> Device:
    """The device that a kernel on this tensor will run on."""
    if _pretended is not None:
        return _pretended
    return INTERPRETER if tensor.device.type == "cpu" else _cuda_device(tensor.device.index)


@contextmanager
def pretend(device: Device) -> Iterator[None]:
    """Take CPU tensors as if they were on this device: with launches that only compile, to compile what would run there."""
    global _pretended
    previous, _pretended = _pretended, device
    try:
        yield
    finally:
        _pretended = previous


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch inside this: Triton takes the current CUDA device, whatever the tensors' is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def widens_products(tensor: Tensor) -> bool:
    """Tell whether `tl.dot` must be given fp32: the interpreter multiplies bf16 as if its bits were integers."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and _pretended is None


def tuned(device: Device, op: str, key: str) -> Mapping[str, Any] | None:
    """The tiles that `pg-kernels tune` found fastest for an op and its shape's key on this GPU, if it ever ran on one."""
    if _tried is not None:
        return _tried.get((op, key))
    return _tuned_file(device.name).get(op, {}).get(key)


@contextmanager
def trying(tiles: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[None]:
    """Run ops with these tiles, by op and key, as if they and no others had been tuned."""
    global _tried
    previous, _tried = _tried, tiles
    try:
        yield
    finally:
        _tried = previous


def tuned_path(name: str) -> Path:
    """Where the tiles of a GPU are kept."""
    return TUNED / f"{name.replace(' ', '_')}.json"


@dataclass(frozen=True)
class Rows:
    """A tensor [..., N] as rows that kernels find: row r starts at (r // inner) · outer_stride + (r % inner) · inner_stride."""

    tensor: Tensor
    count: int
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def strides(self) -> tuple[int, int, int]:
        """As kernels take them."""
        return self.inner, self.outer_stride, self.inner_stride


def rows_of(x: Tensor) -> Rows:
    """View x as rows of adjacent elements; a copy only where its layout needs more than two strides."""
    count = math.prod(x.shape[:-1])
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        levels = _merged(
            [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
        )
        if len(levels) <= 2:
            (_, outer_stride), (inner, inner_stride) = levels + [(1, 0)] * (2 - len(levels))
            return Rows(x, count, inner, outer_stride, inner_stride)
    return Rows(x.contiguous(), count, 1, x.shape[-1], 0)


def _merged(levels: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join neighbouring dimensions (size, stride) that one stride describes."""
    merged: list[tuple[int, int]] = []
    for size, stride in levels:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


@cache
def _tuned_file(name: str) -> dict[str, dict[str, dict[str, int]]]:
    path = tuned_path(name)
    return json.loads(path.read_text())["tiles"] if path.exists() else {}
