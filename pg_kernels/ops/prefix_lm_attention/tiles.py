"""Launch configuration of the Triton kernels: a pure function of shapes, dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pg_kernels.ops._common.devices import INTERPRETER, Device, tuned


@dataclass(frozen=True)
class Tiles:
    block_m: int
    """Query rows per tile: queries of all the heads of a KV head."""
    block_n: int
    """Keys per tile."""
    num_warps: int
    """Warps of 32 threads per program."""
    num_stages: int
    """Tiles that a loop has in flight, as Triton's pipeliner counts them."""
    use_tma: bool = False
    """Load keys and values by tensor descriptors (TMA) if their layout allows it: no expanded and no unaligned tensors."""


def head_dim_blocks(head_dim: int, itemsize: int) -> tuple[int, int]:
    """Split a head dimension into two powers of two, (block_d, block_d_tail); the tail may be 0.

    72 is (64, 16): dot products round it up to 80, not to 128. fp32 products have no tensor cores and keep whole rows in
    registers, so their blocks are at most 128.
    """
    max_block = 128 if itemsize == 4 else 256
    block_d = min(max(16, 1 << (head_dim.bit_length() - 1)), max_block)
    if block_d >= head_dim:
        return block_d, 0
    tail = max(16, 1 << (head_dim - block_d - 1).bit_length())
    return (block_d, tail) if tail < block_d or block_d == max_block else (2 * block_d, 0)


MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
"""Head dimensions that the kernels support. Tensor cores multiply at least 16 columns."""
_MANY_ROWS: dict[str, dict[str, Sequence[tuple[Any, ...]]]] = {
    # Fields of Tiles for head dimensions up to 96, 128 and 256: the largest tiles without spilled registers.
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
    # Fields of Tiles for head dimensions up to 96, and up to 256.
    "forward": ((32, 16, 8, 1), (32, 16, 8, 1)),
    "backward_dq": ((16, 16, 4, 1), (16, 16, 8, 1)),
    "backward_dkv": ((32, 32, 8, 1), (16, 16, 8, 1)),
}


def choose(kernel: str, head_dim: int, itemsize: int, num_rows: int, device: Device) -> Tiles:
    """Choose tiles of "forward", "backward_dq" or "backward_dkv" for `num_rows` query rows per KV head and `itemsize` bytes."""
    found = tuned(device, "prefix_lm_attention", key(kernel, head_dim, itemsize, num_rows))
    if found:
        return Tiles(**found)
    return _default(kernel, sum(head_dim_blocks(head_dim, itemsize)), itemsize, num_rows, device)


def num_splits(num_programs: int, kv_len: int, block_n: int, device: Device) -> int:
    """Return how many programs share the keys of one block of rows: enough to fill the device, with at least two tiles each."""
    return max(1, min(2 * device.multiprocessors // max(num_programs, 1), kv_len // (2 * block_n)))


def key(kernel: str, head_dim: int, itemsize: int, num_rows: int) -> str:
    """Return the name under which tuned tiles for these shapes are stored."""
    return f"{kernel}, {head_dim} columns of {itemsize} bytes, {'up to 64' if num_rows <= 64 else 'many'} rows"


def candidates(kernel: str, head_dim: int, itemsize: int, num_rows: int, device: Device) -> list[Tiles]:
    """Return the tiles that `pg-kernels tune` tries. Each fits the device's registers and shared memory."""
    default = choose(kernel, head_dim, itemsize, num_rows, device)
    if kernel == "forward" and num_rows > 64 and itemsize == 2 and device.capability >= (9, 0):
        return [default, replace(default, use_tma=False), Tiles(64, 64, 8, 2)]
    return [default]


def _default(kernel: str, padded_dim: int, itemsize: int, num_rows: int, device: Device) -> Tiles:
    if device == INTERPRETER:  # fewer tiles: the interpreter's time grows with their number
        return Tiles(64, 32, 4, 1)
    if itemsize == 4:  # fp32 has no tensor cores: what registers hold
        return Tiles(*_FP32[kernel][0 if padded_dim <= 96 else 1])
    if kernel == "forward" and num_rows <= 64:  # decoding, which waits for keys and values from memory
        return Tiles(_decode_block_m(num_rows), 32 if padded_dim > 96 else 64, 4, 3)
    architecture = "sm_80" if device.capability < (9, 0) else "sm_90" if device.capability < (10, 0) else "sm_100"
    return Tiles(*_MANY_ROWS[architecture][kernel][0 if padded_dim <= 96 else 1 if padded_dim <= 128 else 2])


def _decode_block_m(num_rows: int) -> int:
    return max(16, 1 << max(num_rows - 1, 0).bit_length())
