from __future__ import annotations

from dataclasses import dataclass, replace

from pg_kernels.ops._common.devices import Device, tuned

KEY = "rows of any length"


@dataclass(frozen=True)
class Tiles:
    block: int
    """Elements of a row at once."""
    warps: int


def choose(columns: int, device: Device) -> Tiles:
    """16 elements a thread: two vector loads of bf16 from each input under way."""
    block = min(max(1 << (columns - 1).bit_length(), 128), 2048)
    found = tuned(device, "geglu", KEY)
    return Tiles(**found) if found else Tiles(block, max(block // 512, 1))


def candidates(columns: int, device: Device) -> list[Tiles]:
    """What `pg-kernels tune` tries."""
    usual = choose(columns, device)
    return [usual, replace(usual, warps=2 * usual.warps), replace(usual, block=usual.block // 2)]
