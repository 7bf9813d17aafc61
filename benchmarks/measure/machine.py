"""This machine: its name, its versions, and its measured ceilings of bandwidth and matrix rates."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

from pg_kernels.benchmarks.measure.timing import seconds
from pg_kernels.benchmarks.report.results import Ceilings

PACKAGES = (
    "pg_kernels",
    "torch",
    "triton",
    "transformers",
    "liger_kernel",
    "torchao",
    "bitsandbytes",
    "llama_cpp_python",
    "pytest-benchmark",
)
"""The packages whose versions a run stores."""

_MATRIX_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
_SIDES = {"cpu": 2048, "cuda": 8192}
"""The side of the square matrices whose product is a device's ceiling."""


def device_name(device: torch.device) -> str:
    """Return a readable name: the GPU's, or the CPU's with its number of threads and instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name} CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """Return the versions of Python, CUDA and the installed packages that take part."""
    found = {"python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def free_bytes(device: torch.device) -> int:
    """Return the memory that can be allocated on the device without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    info = Path("/proc/meminfo")
    if info.is_file():
        fields = dict(line.split(":") for line in info.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory: a GPU's L2, a CPU's L3."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.strip().rstrip("K")) * 1024 for size in sizes), default=32 << 20)


def ceilings(device: torch.device) -> Ceilings:
    """Measure bandwidth on tensors of eight times the cache, and the rate of a large square matrix product by dtype."""
    size = max(8 * cache_bytes(device), 1 << 28)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copy = _fastest(lambda: target.copy_(source), device)
    read = _fastest(lambda: source.sum(), device)
    return Ceilings(2 * size / copy, size / read, {name: _matrix_rate(name, device) for name in _MATRIX_DTYPES})


def _matrix_rate(name: str, device: torch.device) -> float:
    """Return FLOP/s of a matrix product (a multiply-add counts 2); 0 if torch has no such product on the device."""
    side, dtype = _SIDES[device.type], _MATRIX_DTYPES[name]
    # Do not multiply zeros: a GPU would draw less power and clock higher.
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    left, right = ((64 * t).clamp(-127, 127).to(dtype) if dtype == torch.int8 else t.to(dtype) for t in (left, right))
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    try:
        return 2 * side**3 / _fastest(lambda: product(left, right.T), device)
    except (RuntimeError, NotImplementedError):
        return 0.0


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Return the median of the three smallest times: the undisturbed speed, but not a single lucky reading."""
    times: list[float] = []
    while len(times) < 4 or (len(times) < 12 and sum(times) < 0.5):
        times.append(seconds(call, device))
    return median(sorted(times)[:3])
