"""Launch configuration of geglu_mlp's kernel, and whether it runs.

m = tokens, n = hidden units of the MLP, k = inner size: x [m, k], both weights [n, k]. Blocks are in elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pg_kernels.ops._common.devices import Device, tuned


@dataclass(frozen=True)
class Tiles:
    block_m: int
    """Rows of x of one program."""
    block_n: int
    """Columns of the result of one program: as many rows of the gate weight as of the up weight."""
    block_k: int
    """Columns of x and of both weights in one step."""
    group_m: int
    """Blocks of rows that run side by side to share the weights in the L2 cache."""
    num_warps: int
    num_stages: int


def choose(m: int, k: int, n: int, dtype: torch.dtype, device: Device) -> Tiles | None:
    """Return the tiles of the kernel that multiplies by both weights, or None if two products and geglu are as fast.

    The fused kernel saves writing and reading two [m, n] tensors, and its products are slower than cuBLAS's. It runs only where
    `pg-kernels tune` has measured a gain on this GPU.
    """
    if dtype == torch.float32:
        return None
    found = tuned(device, "geglu_mlp", key(m, k, n))
    return Tiles(**found) if found else None


def key(m: int, k: int, n: int) -> str:
    """Return the name under which tuned tiles are stored: the weights' shape, and m rounded up to a power of two."""
    return f"up to {1 << max(m - 1, 0).bit_length()} rows, {k} to {n}"


def candidates(m: int, device: Device) -> list[Tiles]:
    """Return the tiles that `pg-kernels tune` tries. All fit into the device's registers and shared memory."""
    if m <= 64:
        block_m = max(16, 1 << (m - 1).bit_length())
        return [Tiles(block_m, 64, 128, 1, 4, 3), Tiles(block_m, 32, 128, 1, 4, 5), Tiles(block_m, 128, 64, 1, 8, 3)]
    if device.capability >= (9, 0):
        return [Tiles(128, 128, 64, 8, 8, 3), Tiles(128, 64, 64, 8, 8, 3), Tiles(64, 128, 64, 8, 8, 3)]
    # wgmma reads operands from shared memory. Without it registers hold the operands beside both accumulators.
    return [Tiles(128, 64, 32, 8, 8, 4), Tiles(64, 128, 64, 8, 8, 3)]
