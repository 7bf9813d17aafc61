from __future__ import annotations

from dataclasses import dataclass, replace

from pg_kernels.ops._common.devices import MAX_ROWS_AT_ONCE, Device, tuned

MAX_COLUMNS = 32_768
"""The longest row that the forward kernel keeps in registers without spilling, with 1,024 threads."""
MAX_WHOLE_COLUMNS = 8_192
"""The longest row that the backward kernel keeps in registers with its gradients."""


@dataclass(frozen=True)
class Tiles:
    block: int
    """Columns at once: a power of two."""
    rows: int
    """Rows at once."""
    warps: int


def forward(columns: int, itemsize: int, device: Device, op: str = "rms_norm") -> Tiles:
    """Whole rows, and of short ones several, so that each thread has two loads of 16 bytes under way."""
    block = _power_of_two(columns)
    rows = min(max(1, 2048 // block), MAX_ROWS_AT_ONCE)
    usual = Tiles(block, rows, _warps(block * rows, each=32 // itemsize))
    return _tuned(op, key("forward", columns, itemsize), device) or usual


def backward(columns: int, itemsize: int, device: Device, op: str = "rms_norm") -> Tiles:
    """Whole rows one at a time, or blocks of 16 KiB where a row and its sums would not fit; each thread loads 16 bytes."""
    block = _power_of_two(columns) if columns <= MAX_WHOLE_COLUMNS else 8192 // itemsize
    usual = Tiles(block, 1, _warps(block, each=16 // itemsize))
    return _tuned(op, key("backward", columns, itemsize), device) or usual


def programs(rows: int, device: Device) -> int:
    """How many programs share the rows in backward: each writes a partial weight gradient, so no more than fill the device."""
    return min(rows, 4 * device.multiprocessors)


def candidates(kernel: str, columns: int, itemsize: int, device: Device) -> list[Tiles]:
    """What `pg-kernels tune` tries for "forward" or "backward"."""
    usual = (forward if kernel == "forward" else backward)(columns, itemsize, device)
    if itemsize > 2:  # what `pg-kernels tune` does not time, and registers hold as it is
        return [usual]
    warps = {usual.warps, usual.warps // 2, usual.warps * 2} & {4, 8, 16, 32}
    return [replace(usual, warps=count) for count in sorted(warps)]


def key(kernel: str, columns: int, itemsize: int) -> str:
    """What a tuned choice holds for."""
    return f"{kernel}, {columns} columns of {itemsize} bytes"


def _tuned(op: str, key: str, device: Device) -> Tiles | None:
    found = tuned(device, op, key)
    return Tiles(**found) if found else None


def _power_of_two(columns: int) -> int:
    return 1 << (columns - 1).bit_length()


def _warps(elements: int, each: int) -> int:
    """So many that each thread has `each` elements."""
    return min(max(elements // (32 * each), 4), 32)
