"""`pg-kernels bench`: time the ops."""

from __future__ import annotations

import argparse
from typing import Any

from .common import choose_device, default_device


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="time the ops beside plain PyTorch and what else is installed",
        description="Time ops on this machine, beside plain PyTorch, torch.compile and the other packages that are installed. "
        "Results whose values are wrong are said to be wrong. Nothing is stored.",
    )
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help="e.g. rms_norm, or a whole model's decode_step (default: all but those)"
    )
    parser.add_argument("--full", action="store_true", help="all shapes instead of the model's usual ones; takes long")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from pg_kernels.benchmarks.bench import bench  # only this command needs the suite

    bench(options.ops, choose_device(options.device or default_device()), full=options.full)
