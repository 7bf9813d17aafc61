"""Launch configuration of geglu's kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pg_kernels.ops._common.devices import Device, tuned

KEY = "rows of any length"
"""The name under which tuned tiles are stored."""


@dataclass(frozen=True)
class Tiles:
    block_n: int
    """Columns of one program, a power of two."""
    num_warps: int


def choose(num_cols: int, device: Device) -> Tiles:
    """Return tiles of 16 elements a thread: two vector loads of bf16 from each input are in flight."""
    block_n = min(max(1 << (num_cols - 1).bit_length(), 128), 2048)
    found = tuned(device, "geglu", KEY)
    return Tiles(**found) if found else Tiles(block_n, max(block_n // 512, 1))


def candidates(num_cols: int, device: Device) -> list[Tiles]:
    """Return the tiles that `pg-kernels tune` tries."""
    default = choose(num_cols, device)
    return [
        default,
        replace(default, num_warps=2 * default.num_warps),
        replace(default, block_n=default.block_n // 2),
    ]
