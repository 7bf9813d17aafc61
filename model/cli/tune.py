"""`pg-kernels tune`: find this GPU's fastest tile sizes."""

from __future__ import annotations

import argparse
from typing import Any

from .common import choose_device, note


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "tune",
        help="find this GPU's fastest tile sizes",
        description="Time the tile sizes that each Triton kernel may use, at the models' shapes, on this GPU, and keep those "
        "that beat the usual ones: every later process uses them. Run it on an otherwise idle GPU.",
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="e.g. geglu_mlp (default: all that have a choice)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, … (default: %(default)s)")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from pg_kernels.benchmarks.kernels.tuning import tune

    command = " ".join(["pg-kernels tune", *options.ops])
    note(f"wrote {tune(options.ops, choose_device(options.device), command)}")
