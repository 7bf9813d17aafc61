from __future__ import annotations

from dataclasses import dataclass

import torch

from pg_kernels.ops._common.devices import Device, tuned


@dataclass(frozen=True)
class Tiles:
    rows: int
    """Rows of x at once."""
    features: int
    """Columns of the product at once: as many of the gate as of the up projection."""
    inner: int
    """Of the sum over K, at once."""
    group: int
    """Blocks of rows that run side by side, so that they find the weights in the L2 cache."""
    warps: int
    stages: int


def choose(rows: int, inner: int, features: int, dtype: torch.dtype, device: Device) -> Tiles | None:
    """Tiles of the kernel that multiplies by both weights at once; None where cuBLAS and an elementwise kernel are as fast.

    The fused kernel saves a round trip of two [rows, features] tensors, and must not lose more than that to cuBLAS: it runs where
    `pg-kernels tune` has seen it win on this GPU, and nowhere else.
    """
    if dtype == torch.float32:
        return None
    found = tuned(device, "geglu_mlp", key(rows, inner, features))
    return Tiles(**found) if found else None


def key(rows: int, inner: int, features: int) -> str:
    """What a tuned choice holds for: the weights' shape, and the rows up to a power of two."""
    return f"up to {1 << max(rows - 1, 0).bit_length()} rows, {inner} to {features}"


def candidates(rows: int, device: Device) -> list[Tiles]:
    """What `pg-kernels tune` tries; each holds in the device's registers and shared memory."""
    if rows <= 64:
        block = max(16, 1 << (rows - 1).bit_length())
        return [Tiles(block, 64, 128, 1, 4, 3), Tiles(block, 32, 128, 1, 4, 5), Tiles(block, 128, 64, 1, 8, 3)]
    if device.capability >= (9, 0):
        return [Tiles(128, 128, 64, 8, 8, 3), Tiles(128, 64, 64, 8, 8, 3), Tiles(64, 128, 64, 8, 8, 3)]
    # Without wgmma, whose operands stay in shared memory, registers hold them beside both accumulators.
    return [Tiles(128, 64, 32, 8, 8, 4), Tiles(64, 128, 64, 8, 8, 3)]
