from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pg_kernels.ops._common.devices import INTERPRETER, Device, tuned


@dataclass(frozen=True)
class Tiles:
    block_m: int
    """Rows at once: queries of one KV head's heads."""
    block_n: int
    """Keys at once."""
    num_warps: int
    num_stages: int
    use_descriptors: bool = False
    """Load keys and values through tensor descriptors (TMA), unless the tensors are expanded or unaligned."""


def head_blocks(dim: int, itemsize: int) -> tuple[int, int]:
    """Split a head dimension into two powers of two, (64, 16) for 72, so that dot products take 80 columns, not 128.

    The second may be 0. In fp32, products without tensor cores keep whole rows in registers, and a block has at most 128 columns.
    """
    longest = 128 if itemsize == 4 else 256
    low = min(max(16, 1 << (dim.bit_length() - 1)), longest)
    if low >= dim:
        return low, 0
    high = max(16, 1 << (dim - low - 1).bit_length())
    return (low, high) if high < low or low == longest else (2 * low, 0)


MIN_DIM, MAX_DIM = 16, 256
"""Head dimensions that the kernels support: tensor cores multiply at least 16 columns."""
_MANY_ROWS: dict[str, dict[str, Sequence[tuple[Any, ...]]]] = {
    # block_m, block_n, num_warps, num_stages, use_descriptors for head dimensions up to 96, 128 and 256: the largest tiles
    # without spilled registers.
    "sm_80": {
        "forward": ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
        "backward_dq": ((64, 32, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        "backward_dkv": ((32, 64, 8, 1), (32, 64, 8, 2), (64, 32, 8, 2)),
    },
    "sm_90": {
        "forward": ((128, 128, 8, 2, True), (128, 64, 8, 3, True), (128, 32, 8, 3, True)),
        "backward_dq": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        "backward_dkv": ((32, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
    },
    "sm_100": {
        "forward": ((128, 64, 8, 3, True), (128, 64, 8, 3, True), (64, 64, 8, 2, True)),
        "backward_dq": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        "backward_dkv": ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    },
}

_FP32 = {
    # For head dimensions up to 96, and up to 256.
    "forward": ((32, 16, 8, 1), (32, 16, 8, 1)),
    "backward_dq": ((16, 16, 4, 1), (16, 16, 8, 1)),
    "backward_dkv": ((32, 32, 8, 1), (16, 16, 8, 1)),
}


def choose(kernel: str, dim: int, itemsize: int, num_rows: int, device: Device) -> Tiles:
    """Return the tiles of "forward", "backward_dq" or "backward_dkv" for `num_rows` rows."""
    found = tuned(device, "prefix_lm_attention", key(kernel, dim, itemsize, num_rows))
    return Tiles(**found) if found else _usual(kernel, sum(head_blocks(dim, itemsize)), itemsize, num_rows, device)


def num_splits(programs: int, kv_len: int, block_n: int, device: Device) -> int:
    """Return how many programs share the keys of one block of rows: enough to fill the device, with at least two tiles each."""
    return max(1, min(2 * device.multiprocessors // max(programs, 1), kv_len // (2 * block_n)))


def key(kernel: str, dim: int, itemsize: int, num_rows: int) -> str:
    """Return the shapes that a tuned choice holds for, as text."""
    return f"{kernel}, {dim} columns of {itemsize} bytes, {'up to 64' if num_rows <= 64 else 'many'} rows"


def candidates(kernel: str, dim: int, itemsize: int, num_rows: int, device: Device) -> list[Tiles]:
    """Return the tiles that `pg-kernels tune` tries. Each fits the device's registers and shared memory."""
    usual = choose(kernel, dim, itemsize, num_rows, device)
    if kernel == "forward" and num_rows > 64 and itemsize == 2 and device.capability >= (9, 0):
        return [usual, replace(usual, use_descriptors=False), Tiles(64, 64, 8, 2)]
    return [usual]


def _usual(kernel: str, dim: int, itemsize: int, num_rows: int, device: Device) -> Tiles:
    if device == INTERPRETER:  # its time grows with the number of tiles
        return Tiles(64, 32, 4, 1)
    if itemsize == 4:  # without tensor cores, registers are the limit
        return Tiles(*_FP32[kernel][0 if dim <= 96 else 1])
    if kernel == "forward" and num_rows <= 64:  # decoding: bound by loading keys and values
        return Tiles(_block(num_rows), 32 if dim > 96 else 64, 4, 3)
    architecture = "sm_80" if device.capability < (9, 0) else "sm_90" if device.capability < (10, 0) else "sm_100"
    return Tiles(*_MANY_ROWS[architecture][kernel][0 if dim <= 96 else 1 if dim <= 128 else 2])


def _block(num_rows: int) -> int:
    return max(16, 1 << max(num_rows - 1, 0).bit_length())
