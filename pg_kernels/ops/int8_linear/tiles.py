"""Tile sizes of the Triton kernels, and which products the CUDA extension leaves to cuBLAS.

m = tokens, n = output features, k = inner size: x [m, k], int8 weight [n, k]. All sizes are in elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pg_kernels.ops._common.devices import Device, tuned

MEMORY_BOUND_M = 16
"""Rows of x up to which a product takes as long as loading the weight from memory."""


@dataclass(frozen=True)
class Tiles:
    """Launch configuration of `int8_gemm_kernel` and of `int8_input_grad_kernel`."""

    block_m: int
    """Rows of x of one program."""
    block_n: int
    """Rows of the weight: of one program in the product, of one step in the input's gradient."""
    block_k: int
    """Columns of the weight: of one step in the product, of one program in the input's gradient."""
    group_m: int
    """Blocks of rows of x that run side by side to share the weight in the L2 cache."""
    num_warps: int
    num_stages: int


def choose(m: int, k: int, n: int, dtype: torch.dtype, device: Device, gated: bool = False) -> Tiles:
    """Return the tiles of x [m, k] times an int8 weight [n, k]; `gated` for GeGLU's two weights.

    `dtype` is x's dtype in the product: int8 for int8 activations.
    """
    if dtype == torch.float32:  # no tensor cores: as much as registers hold
        return Tiles(min(32, _block_m(m)), 32, 32, 8, 8 if gated else 4, 2)
    found = tuned(device, "int8_linear", key(m, k, n, dtype, gated))
    if found:
        return Tiles(**found)
    if m <= 64:
        return Tiles(_block_m(m), 64, 128, 1, 8 if gated and m > 32 else 4, 4)
    if dtype == torch.int8:
        return Tiles(64 if gated else 128, 128, 128, 8, 8, 3)
    return Tiles(64 if gated else 128, 128, 64, 8, 8, 3)


def choose_input_grad(m: int, dtype: torch.dtype) -> Tiles:
    """Return the tiles of a gradient [m, n] of this dtype times the weight [n, k]."""
    if dtype == torch.float32:
        return Tiles(min(32, _block_m(m)), 32, 32, 8, 4, 2)
    return Tiles(min(64, _block_m(m)), 32, 128, 8, 4, 3)


def num_splits(m: int, blocks: int, steps: int, device: Device) -> int:
    """Return how many programs share the sum over k of one tile, which takes `steps` steps.

    With few rows of x there are fewer `blocks` (tiles of y) than the device can run: aim at two programs for each multiprocessor.
    """
    if m > MEMORY_BOUND_M:
        return 1
    return min(max(1, 2 * device.multiprocessors // blocks), max(1, steps // 2))


def prefers_cublas(m: int, device: Device) -> bool:
    """Return whether cuBLAS on a bfloat16 copy of the weight, made for the call, beats the CUDA kernels on the int8 weight.

    An estimate, not a measurement: cuBLAS must make up for three passes over the weight, and gains less over the Hopper kernel.
    """
    return m >= (8192 if device.capability == (9, 0) else 2048)


def key(m: int, k: int, n: int, dtype: torch.dtype, gated: bool) -> str:
    """Return the key of a tuned choice: the weight's shape, and m rounded up to a power of two."""
    kind = ("int8 by int8, " if dtype == torch.int8 else "") + ("gated, " if gated else "")
    return f"{kind}up to {1 << max(m - 1, 0).bit_length()} rows, {k} to {n}"


def candidates(m: int, gated: bool, device: Device) -> list[Tiles]:
    """Return the tiles that `pg-kernels tune` tries. Each fits the device's registers and shared memory."""
    if m <= 64:
        return [
            Tiles(_block_m(m), 64, 128, 1, 8, 4) if gated else Tiles(_block_m(m), 64, 256, 1, 4, 3),
            Tiles(_block_m(m), 128, 64, 1, 4, 4),
        ]
    return [Tiles(128, 64, 64, 8, 4 if not gated else 8, 3), Tiles(64, 128, 128, 8, 8, 3)]


def _block_m(m: int) -> int:
    return max(16, 1 << max(m - 1, 0).bit_length())
