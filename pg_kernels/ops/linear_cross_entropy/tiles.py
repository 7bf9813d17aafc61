from __future__ import annotations

from dataclasses import dataclass

import torch

from pg_kernels.ops._common.devices import Device, tuned

CHUNK_BYTES = 1 << 29
"""Gradients of logits held at once, in the inputs' dtype: with 8,192 tokens of bf16 32,768 columns, for efficient products."""


@dataclass(frozen=True)
class Tiles:
    tokens: int
    words: int
    """Rows of the vocabulary at once."""
    inner: int
    """Of the sum over the hidden dimension, at once."""
    warps: int
    stages: int


def choose(tokens: int, dtype: torch.dtype, device: Device) -> Tiles:
    """Square tiles for many tokens; for few, which only wait for the weight to come from memory, narrow ones with deep loads."""
    if dtype == torch.float32:  # without tensor cores: what registers hold
        return Tiles(min(64, _block(tokens)), 32, 32, 4, 2)
    found = tuned(device, "linear_cross_entropy", key(tokens))
    if found:
        return Tiles(**found)
    if tokens <= 64:
        return Tiles(_block(tokens), 128, 64, 4, 4)
    # On sm_100 the accumulator is copied out of tensor memory: with smoothing and softcap 64 elements a thread spill.
    return Tiles(128, 128 if device.capability < (10, 0) else 64, 64, 8, 3)


def splits(token_blocks: int, word_blocks: int, device: Device) -> int:
    """How many programs share the vocabulary for the same tokens: twice as many in all as there are multiprocessors."""
    return min(max(1, -(-2 * device.multiprocessors // token_blocks)), word_blocks)


def words_per_chunk(tokens: int, itemsize: int) -> int:
    """Columns of the logits' gradient that CHUNK_BYTES hold, in whole tiles."""
    return max(CHUNK_BYTES // (max(tokens, 1) * itemsize) // 128, 1) * 128


def key(tokens: int) -> str:
    """What a tuned choice holds for: the tokens up to a power of two."""
    return f"up to {_block(tokens)} tokens"


def candidates(tokens: int, dtype: torch.dtype, device: Device) -> list[Tiles]:
    """What `pg-kernels tune` tries; each holds in the device's registers and shared memory."""
    usual = choose(tokens, dtype, device)
    if dtype == torch.float32:
        return [usual]
    if tokens <= 64:
        return [usual, Tiles(usual.tokens, 64, 128, 4, 4)]
    return [usual, Tiles(64, 256, 64, 8, 3), Tiles(64, 128, 64, 4, 4)]


def _block(tokens: int) -> int:
    return max(16, 1 << max(tokens - 1, 0).bit_length())
