"""The GPUs that Triton kernels run on: what they can hold, what may run there, and tiles that were tuned for them."""

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
TUNED = Path(__file__).parents[2] / "tuned"
"""One JSON for each GPU that `pg-kernels tune` has run on."""

_HAS_TRITON = util.find_spec("triton") is not None
_compile_target: Device | None = None
_overridden_tiles: Mapping[tuple[str, str], Mapping[str, Any]] | None = None


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


def unavailable_reason(device_type: str) -> str | None:
    """Why Triton kernels cannot run on tensors of a device type here, or None when they can."""
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


# As torch.compiler.assume_constant_result does, which imports all of torch.compile for it: 1.2 s and 150 MB at every start.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Why kernels, which compute in fp32 and count rows in int32, cannot take these tensors [..., N], or None when they can."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.dtype == torch.float64 for tensor in given):
        return "float64 runs on backend 'reference' only"
    if any(tensor.numel() // max(tensor.shape[-1:].numel(), 1) >= 2**31 - MAX_BLOCK_M for tensor in given):
        return "2^31 rows or more run on backend 'reference' only"
    return None


def device_of(tensor: Tensor) -> Device:
    """The device that a kernel on this tensor will run on."""
    if _compile_target is not None:
        return _compile_target
    return INTERPRETER if tensor.device.type == "cpu" else _cuda_device(tensor.device.index)


@contextmanager
def compile_for(device: Device) -> Iterator[None]:
    """Take CPU tensors as if they were on this device: with launches that only compile, to compile what would run there."""
    global _compile_target
    previous, _compile_target = _compile_target, device
    try:
        yield
    finally:
        _compile_target = previous


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch inside this: Triton takes the current CUDA device, whatever the tensors' is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def upcasts_dot_operands(tensor: Tensor) -> bool:
    """Tell whether `tl.dot` must be given fp32: the interpreter multiplies bf16 as if its bits were integers."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and _compile_target is None


def tuned(device: Device, op: str, key: str) -> Mapping[str, Any] | None:
    """The tiles that `pg-kernels tune` found fastest for an op and its shape's key on this GPU, if it ever ran on one."""
    if _overridden_tiles is not None:
        return _overridden_tiles.get((op, key))
    return _tuned_file(device.name).get(op, {}).get(key)


@contextmanager
def override_tiles(tiles: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[None]:
    """Run ops with these tiles, by op and key, as if they and no others had been tuned."""
    global _overridden_tiles
    previous, _overridden_tiles = _overridden_tiles, tiles
    try:
        yield
    finally:
        _overridden_tiles = previous


def tuned_path(name: str) -> Path:
    """Where the tiles of a GPU are kept."""
    return TUNED / f"{name.replace(' ', '_')}.json"


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
