"""Launch configurations of rms_norm's kernels. layer_norm takes them, too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pg_kernels.ops._common.devices import MAX_BLOCK_M, Device, tuned

MAX_COLS = 32_768
"""The longest row, in elements, that the forward kernel keeps in registers without spilling, with 1,024 threads."""
MAX_BWD_BLOCK_N = 8_192
"""The longest row, in elements, that the backward kernel keeps in registers with its gradients."""


@dataclass(frozen=True)
class Tiles:
    block_m: int
    """Rows of one program."""
    block_n: int
    """Columns of one step, a power of two."""
    num_warps: int


def choose_forward(num_cols: int, itemsize: int, device: Device, op: str = "rms_norm") -> Tiles:
    """Return the forward kernel's tiles for rows of `num_cols` elements of `itemsize` bytes.

    One program takes a whole row, or several short ones, so that each thread has two loads of 16 bytes in flight.
    """
    block_n = _next_power_of_two(num_cols)
    block_m = min(max(1, 2048 // block_n), MAX_BLOCK_M)
    default = Tiles(block_m, block_n, _num_warps(block_m * block_n, elements_per_thread=32 // itemsize))
    return _tuned(op, key("forward", num_cols, itemsize), device) or default


def choose_backward(num_cols: int, itemsize: int, device: Device, op: str = "rms_norm") -> Tiles:
    """Return the backward kernel's tiles for rows of `num_cols` elements of `itemsize` bytes.

    One step takes a whole row, or 8 KiB of a row longer than MAX_BWD_BLOCK_N. Each thread loads 16 bytes.
    """
    block_n = _next_power_of_two(num_cols) if num_cols <= MAX_BWD_BLOCK_N else 8192 // itemsize
    default = Tiles(1, block_n, _num_warps(block_n, elements_per_thread=16 // itemsize))
    return _tuned(op, key("backward", num_cols, itemsize), device) or default


def num_programs(num_rows: int, device: Device) -> int:
    """Return how many programs share the rows in backward.

    There are only as many as fill the device, because each writes a partial weight gradient.
    """
    return min(num_rows, 4 * device.multiprocessors)


def candidates(kernel: str, num_cols: int, itemsize: int, device: Device) -> list[Tiles]:
    """Return the tiles that `pg-kernels tune` tries for the "forward" or the "backward" kernel."""
    default = (choose_forward if kernel == "forward" else choose_backward)(num_cols, itemsize, device)
    if itemsize > 2:  # fp32 is not tuned, and its default tiles fit into registers
        return [default]
    num_warps = {default.num_warps, default.num_warps // 2, default.num_warps * 2} & {4, 8, 16, 32}
    return [replace(default, num_warps=count) for count in sorted(num_warps)]


def key(kernel: str, num_cols: int, itemsize: int) -> str:
    """Return the name under which tuned tiles are stored."""
    return f"{kernel}, {num_cols} columns of {itemsize} bytes"


def _tuned(op: str, key: str, device: Device) -> Tiles | None:
    found = tuned(device, op, key)
    return Tiles(**found) if found else None


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _num_warps(elements: int, elements_per_thread: int) -> int:
    return min(max(elements // (32 * elements_per_thread), 4), 32)
