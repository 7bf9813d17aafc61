from __future__ import annotations

from dataclasses import dataclass, replace

from pg_kernels.ops._common.devices import Device, tuned


@dataclass(frozen=True)
class Tiles:
    half: int
    """Half the head dimension, up to a power of two."""
    tokens: int
    """Positions at once."""
    warps: int


def choose(dim: int, device: Device) -> Tiles:
    """About 1,024 pairs at once: 8 a thread, which with their sines and cosines take 32 registers."""
    half = 1 << (dim // 2 - 1).bit_length()
    found = tuned(device, "apply_rotary", key(dim))
    return Tiles(**found) if found else Tiles(half, max(1, 1024 // half), 4)


def key(dim: int) -> str:
    """What a tuned choice holds for."""
    return f"head dimension {dim}"


def heads_per_program(blocks: int, heads: int, device: Device) -> int:
    """As many as share one computation of the angles while the device has four programs for each multiprocessor."""
    chunks = min(max(1, -(-4 * device.multiprocessors // blocks)), heads)
    return -(-heads // chunks)


def candidates(dim: int, device: Device) -> list[Tiles]:
    """What `pg-kernels tune` tries."""
    usual = choose(dim, device)
    return [replace(usual, tokens=max(1, usual.tokens * factor // 2)) for factor in (1, 2, 4)]
