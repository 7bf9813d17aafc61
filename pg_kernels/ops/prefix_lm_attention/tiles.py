from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pg_kernels.ops._common.devices import INTERPRETER, Device, tuned


@dataclass(frozen=True)
class Tiles:
    rows: int
    """Queries of a KV head's heads at once."""
    keys: int
    warps: int
    stages: int
    descriptors: bool = False
    """Load keys and values by tensor descriptors (TMA) where they can describe them: expanded or unaligned ones they cannot."""


def blocks(dim: int, itemsize: int) -> tuple[int, int]:
    """A head dimension as two powers of two, (64, 16) for 72: dot products round it up to 80, not 128. The second may be 0.

    Products of fp32, which have no tensor cores, keep whole rows in registers: theirs are no longer than 128.
    """
    longest = 128 if itemsize == 4 else 256
    low = min(max(16, 1 << (dim.bit_length() - 1)), longest)
    if low >= dim:
        return low, 0
    high = max(16, 1 << (dim - low - 1).bit_length())
    return (low, high) if high < low or low == longest else (2 * low, 0)


MIN_DIM, MAX_DIM = 16, 256
"""Head dimensions of the kernels: tensor cores multiply 16 columns at least."""
_MANY_ROWS: dict[str, dict[str, Sequence[tuple[Any, ...]]]] = {
    # Rows, keys, warps, stages, descriptors for head dimensions up to 96, 128 and 256: the largest without spilled registers.
    "sm_80": {
        "forward": ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
        "backward_q": ((64, 32, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        "backward_kv": ((32, 64, 8, 1), (32, 64, 8, 2), (64, 32, 8, 2)),
    },
    "sm_90": {
        "forward": ((128, 128, 8, 2, True), (128, 64, 8, 3, True), (128, 32, 8, 3, True)),
        "backward_q": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        "backward_kv": ((32, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
    },
    "sm_100": {
        "forward": ((128, 64, 8, 3, True), (128, 64, 8, 3, True), (64, 64, 8, 2, True)),
        "backward_q": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        "backward_kv": ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    },
}

_FP32 = {
    # Up to 96, and to 256.
    "forward": ((32, 16, 8, 1), (32, 16, 8, 1)),
    "backward_q": ((16, 16, 4, 1), (16, 16, 8, 1)),
    "backward_kv": ((32, 32, 8, 1), (16, 16, 8, 1)),
}


def choose(kernel: str, dim: int, itemsize: int, rows: int, device: Device) -> Tiles:
    """Tiles for "forward", "backward_q" or "backward_kv", for this many rows."""
    found = tuned(device, "prefix_lm_attention", key(kernel, dim, itemsize, rows))
    return Tiles(**found) if found else _usual(kernel, sum(blocks(dim, itemsize)), itemsize, rows, device)


def splits(programs: int, kv_len: int, keys: int, device: Device) -> int:
    """How many programs share the keys of the same rows: enough to fill the device, with a few tiles for each."""
    return max(1, min(2 * device.multiprocessors // max(programs, 1), kv_len // (2 * keys)))


def key(kernel: str, dim: int, itemsize: int, rows: int) -> str:
    """What a tuned choice holds for."""
    return f"{kernel}, {dim} columns of {itemsize} bytes, {'up to 64' if rows <= 64 else 'many'} rows"


def candidates(kernel: str, dim: int, itemsize: int, rows: int, device: Device) -> list[Tiles]:
    """What `pg-kernels tune` tries; each holds in the device's registers and shared memory."""
    usual = choose(kernel, dim, itemsize, rows, device)
    if kernel == "forward" and rows > 64 and itemsize == 2 and device.capability >= (9, 0):
        return [usual, replace(usual, descriptors=False), Tiles(64, 64, 8, 2)]
    return [usual]


def _usual(kernel: str, dim: int, itemsize: int, rows: int, device: Device) -> Tiles:
    if device == INTERPRETER:  # which takes its time for each tile
        return Tiles(64, 32, 4, 1)
    if itemsize == 4:  # without tensor cores: what registers hold
        return Tiles(*_FP32[kernel][0 if dim <= 96 else 1])
    if kernel == "forward" and rows <= 64:  # decoding, which waits for keys and values to come from memory
        return Tiles(_block(rows), 32 if dim > 96 else 64, 4, 3)
    architecture = "sm_80" if device.capability < (9, 0) else "sm_90" if device.capability < (10, 0) else "sm_100"
    return Tiles(*_MANY_ROWS[architecture][kernel][0 if dim <= 96 else 1 if dim <= 128 else 2])


def _block(rows: int) -> int:
    return max(16, 1 << max(rows - 1, 0).bit_length())
