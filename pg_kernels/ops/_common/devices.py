"""The devices that Triton kernels run on: requirements, shared memory, and the tiles tuned for each GPU."""

from __future__ import annotations

import json
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
MAX_BLOCK_M = 128
"""The most rows that one program of a row-wise kernel takes."""
TUNED_DIR = Path(__file__).parents[2] / "tuned"
"""One JSON file for each GPU that `pg-kernels tune` has run on."""

_HAS_TRITON = util.find_spec("triton") is not None
_compile_target: Device | None = None
"""The device of the innermost `compile_for` block."""
_overridden_tiles: Mapping[tuple[str, str], Mapping[str, Any]] | None = None
"""The tiles of the innermost `override_tiles` block."""


@dataclass(frozen=True)
class Device:
    """The properties of a device that the choice of tiles may depend on."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one program may use."""
        return {(8, 0): 166_912, (8, 7): 166_912}.get(self.capability, 101_376 if self.capability < (9, 0) else 232_448)


INTERPRETER = Device("Triton's interpreter", (8, 0), 2)
"""The device of CPU tensors."""


def unavailable_reason(device_type: str) -> str | None:
    """Return why Triton kernels cannot run on tensors of a device type on this machine, or None if they can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if device_type == "cpu":
        if _interpreting() or _compile_target is not None:
            return None
        return "needs a CUDA GPU, or TRITON_INTERPRET=1 for Triton's interpreter"
    if device_type != "cuda" or not torch.cuda.is_available():
        return "needs a CUDA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < MINIMUM_CAPABILITY:
        return f"needs compute capability {MINIMUM_CAPABILITY}, this GPU has {capability}"
    return None


# torch.compiler.assume_constant_result would set this attribute, but it imports all of torch.compile: 1.2 s and 150 MB at start.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Return why the Triton kernels do not support these tensors [..., N], or None if they do.

    The kernels compute in fp32 and count rows in int32.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.dtype == torch.float64 for tensor in given):
        return "float64 runs on backend 'reference' only"
    if any(tensor.numel() // max(tensor.shape[-1:].numel(), 1) >= 2**31 - MAX_BLOCK_M for tensor in given):
        return "2^31 rows or more run on backend 'reference' only"
    return None


def device_of(tensor: Tensor) -> Device:
    """Return the device that tiles for this tensor are chosen for."""
    if _compile_target is not None:
        return _compile_target
    return INTERPRETER if tensor.device.type == "cpu" else _cuda_device(tensor.device.index)


@contextmanager
def compile_for(device: Device) -> Iterator[None]:
    """Choose tiles for `device` although the tensors are on the CPU. Used to compile kernels ahead of time."""
    global _compile_target
    previous, _compile_target = _compile_target, device
    try:
        yield
    finally:
        _compile_target = previous


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU current for a launch. Triton launches on the current device."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def upcasts_dot_operands(tensor: Tensor) -> bool:
    """Return whether `tl.dot` needs fp32 operands: the interpreter multiplies bf16 as if its bits were integers."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and _compile_target is None


def tuned(device: Device, op: str, key: str) -> Mapping[str, Any] | None:
    """Return the tiles that `pg-kernels tune` stored for an op and the key of its shape on this GPU, or None."""
    if _overridden_tiles is not None:
        return _overridden_tiles.get((op, key))
    return _tuned_file(device.name).get(op, {}).get(key)


@contextmanager
def override_tiles(tiles: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[None]:
    """Replace all tuned tiles in the `with` block by `tiles`, whose keys are (op, key of the shape)."""
    global _overridden_tiles
    previous, _overridden_tiles = _overridden_tiles, tiles
    try:
        yield
    finally:
        _overridden_tiles = previous


def tuned_path(name: str) -> Path:
    """Return the file with the tuned tiles of the GPU of this name."""
    return TUNED_DIR / f"{name.replace(' ', '_')}.json"


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
