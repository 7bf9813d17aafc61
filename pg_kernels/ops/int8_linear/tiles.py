from __future__ import annotations

from dataclasses import dataclass

import torch

from pg_kernels.ops._common.devices import Device, tuned

FEW = 16
"""Rows of x up to which the weight's way from memory is all that takes time."""


@dataclass(frozen=True)
class Tiles:
    features: int
    """Rows of the weight at once."""
    tokens: int
    """Rows of x at once."""
    inner: int
    """Of the sum over K, at once."""
    group: int
    """Blocks of tokens that run side by side, so that they find the weight in the L2 cache."""
    warps: int
    stages: int


def choose(rows: int, inner: int, features: int, dtype: torch.dtype, device: Device, gated: bool = False) -> Tiles:
    """Tiles of the product of x [rows, inner] and int8 [features, inner]; dtype is what x is multiplied in, int8 included."""
    if dtype == torch.float32:  # without tensor cores: what registers hold
        return Tiles(32, min(32, _block(rows)), 32, 8, 8 if gated else 4, 2)
    found = tuned(device, "int8_linear", key(rows, inner, features, dtype, gated))
    if found:
        return Tiles(**found)
    if rows <= 64:
        return Tiles(64, _block(rows), 128, 1, 8 if gated and rows > 32 else 4, 4)
    if dtype == torch.int8:
        return Tiles(128, 64 if gated else 128, 128, 8, 8, 3)
    return Tiles(128, 64 if gated else 128, 64, 8, 8, 3)


def dequantizes(rows: int, device: Device) -> bool:
    """Whether cuBLAS on a bfloat16 copy of the weight, made for the call, is faster than the CUDA kernels on the weight itself.

    Reckoned, not measured: cuBLAS must make up for three passes over the weight, and has less to make up against the kernel for
    Hopper.
    """
    return rows >= (8192 if device.capability == (9, 0) else 2048)


def gradient(rows: int, dtype: torch.dtype) -> Tiles:
    """Of the product of a gradient [rows, N] and the weight; `features` are columns of the weight here."""
    if dtype == torch.float32:
        return Tiles(32, min(32, _block(rows)), 32, 8, 4, 2)
    return Tiles(128, min(64, _block(rows)), 32, 8, 4, 3)


def splits(rows: int, blocks: int, steps: int, device: Device) -> int:
    """How many programs share one tile's sum of so many steps: with few rows, so that every multiprocessor has two programs."""
    if rows > FEW:
        return 1
    return min(max(1, 2 * device.multiprocessors // blocks), max(1, steps // 2))


def key(rows: int, inner: int, features: int, dtype: torch.dtype, gated: bool) -> str:
    """What a tuned choice holds for: the weights' shape, and the rows up to a power of two."""
    kind = ("int8 by int8, " if dtype == torch.int8 else "") + ("gated, " if gated else "")
    return f"{kind}up to {1 << max(rows - 1, 0).bit_length()} rows, {inner} to {features}"


def candidates(rows: int, gated: bool, device: Device) -> list[Tiles]:
    """What `pg-kernels tune` tries; each holds in the device's registers and shared memory."""
    if rows <= 64:
        return [
            Tiles(64, _block(rows), 128, 1, 8, 4) if gated else Tiles(64, _block(rows), 256, 1, 4, 3),
            Tiles(128, _block(rows), 64, 1, 4, 4),
        ]
    return [Tiles(64, 128, 64, 8, 4 if not gated else 8, 3), Tiles(128, 64, 128, 8, 8, 3)]


def _block(rows: int) -> int:
    return max(16, 1 << max(rows - 1, 0).bit_length())
