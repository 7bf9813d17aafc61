"""Launch configuration of the rotary kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pg_kernels.ops._common.devices import Device, tuned


@dataclass(frozen=True)
class Tiles:
    block_m: int
    """Tokens of one program."""
    block_d: int
    """Pairs of elements of a head: half the head dimension, rounded up to a power of two."""
    num_warps: int


def choose(head_dim: int, device: Device) -> Tiles:
    """Return tiles of about 1,024 pairs: 8 a thread, which with their sines and cosines take 32 registers."""
    block_d = 1 << (head_dim // 2 - 1).bit_length()
    found = tuned(device, "apply_rotary", key(head_dim))
    return Tiles(**found) if found else Tiles(max(1, 1024 // block_d), block_d, 4)


def heads_per_program(num_blocks: int, num_heads: int, device: Device) -> int:
    """Return how many heads one program rotates, of `num_heads` of q and k together, with `num_blocks` blocks of tokens.

    The heads of a program share one computation of the angles. There are as many as leave four programs for each multiprocessor.
    """
    programs_per_block = min(max(1, -(-4 * device.multiprocessors // num_blocks)), num_heads)
    return -(-num_heads // programs_per_block)


def key(head_dim: int) -> str:
    """Return the name under which tuned tiles are stored."""
    return f"head dimension {head_dim}"


def candidates(head_dim: int, device: Device) -> list[Tiles]:
    """Return the tiles that `pg-kernels tune` tries."""
    default = choose(head_dim, device)
    return [replace(default, block_m=max(1, default.block_m * factor // 2)) for factor in (1, 2, 4)]
