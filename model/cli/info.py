"""`pg-kernels info`: versions, devices, backends."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pg_kernels


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("info", help="versions, devices, and the backend each op uses and why")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    import torch

    from pg_kernels.backends import explain
    from pg_kernels.ops._common.extension import instruction_sets, unavailable_reason

    print(f"pg_kernels  {pg_kernels.__version__}  {Path(pg_kernels.__file__).parent}")
    print(f"Python      {platform.python_version()} on {platform.platform()}")
    print(f"torch       {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    for package in ("triton", "transformers"):
        print(f"{package:11} {metadata.version(package) if util.find_spec(package) else 'not installed'}")
    print(f"CPU         {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    used, available = instruction_sets()
    choice = "any of them by PG_KERNELS_ISA: " + ", ".join(available)
    print(f"extension   {f'{used} ({choice})' if used else unavailable_reason('cpu')}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}      {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("cuda        none found")
    for device_type in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(f"\nBackend of each op on {device_type}, and why no other:")
        for op, (backend, reasons) in explain(device_type).items():
            print(f"  {op:22} {backend:10} {'; '.join(reasons.values())}")
