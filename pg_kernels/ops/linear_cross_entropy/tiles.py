"""Launch configurations of linear_cross_entropy's kernels, and how much of the logits' gradient is held at once.

m = tokens, n = vocabulary, k = hidden size: hidden [m, k], weight [n, k]. Blocks are in elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pg_kernels.ops._common.devices import Device, tuned

CHUNK_BYTES = 1 << 29
"""Bytes of the logits' gradient that are held at once, in the inputs' dtype.

For 8,192 tokens in bf16 they are 32,768 columns, enough for efficient matrix products.
"""


@dataclass(frozen=True)
class Tiles:
    block_m: int
    """Tokens of one program."""
    block_n: int
    """Rows of the vocabulary in one step."""
    block_k: int
    """Columns of hidden and weight in one step of a product."""
    num_warps: int
    num_stages: int


def choose(m: int, dtype: torch.dtype, device: Device) -> Tiles:
    """Return square tiles for many tokens. For few, which wait for the weight's loads, return narrow ones with more stages."""
    if dtype == torch.float32:  # no tensor cores: as much as registers hold
        return Tiles(min(64, _block_m(m)), 32, 32, 4, 2)
    found = tuned(device, "linear_cross_entropy", key(m))
    if found:
        return Tiles(**found)
    if m <= 64:
        return Tiles(_block_m(m), 128, 64, 4, 4)
    # On sm_100 the accumulator is copied out of tensor memory: with smoothing and softcap, 64 elements a thread spill.
    return Tiles(128, 128 if device.capability < (10, 0) else 64, 64, 8, 3)


def num_splits(num_blocks_m: int, num_blocks_n: int, device: Device) -> int:
    """Return how many programs share the vocabulary of one block of tokens.

    In all there are at least two programs for each multiprocessor, if the vocabulary has that many blocks.
    """
    return min(max(1, -(-2 * device.multiprocessors // num_blocks_m)), num_blocks_n)


def chunk_size(m: int, itemsize: int) -> int:
    """Return how many columns of the logits' gradient CHUNK_BYTES hold, in whole blocks of 128."""
    return max(CHUNK_BYTES // (max(m, 1) * itemsize) // 128, 1) * 128


def key(m: int) -> str:
    """Return the name under which tuned tiles are stored: the tokens, rounded up to a power of two."""
    return f"up to {_block_m(m)} tokens"


def candidates(m: int, dtype: torch.dtype, device: Device) -> list[Tiles]:
    """Return the tiles that `pg-kernels tune` tries. All fit into the device's registers and shared memory."""
    default = choose(m, dtype, device)
    if dtype == torch.float32:
        return [default]
    if m <= 64:
        return [default, Tiles(default.block_m, 64, 128, 4, 4)]
    return [default, Tiles(64, 256, 64, 8, 3), Tiles(64, 128, 64, 4, 4)]


def _block_m(m: int) -> int:
    return max(16, 1 << max(m - 1, 0).bit_length())
