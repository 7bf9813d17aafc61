"""The command line `pg-kernels`, a module for each command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import pg_kernels

from ..training.interruption import Interrupted
from . import bench, compare, convert, demo, evaluate, finetune, info, run, tune

COMMANDS = (run, demo, finetune, evaluate, compare, bench, tune, info, convert)
"""The commands in the order of the help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return its exit code: 0 done, 1 failed (with a message on stderr), 130 interrupted, 143 terminated.

    Usage errors exit with 2.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser().parse_args(words, argparse.Namespace(words=words))
        options.command(options)
        sys.stdout.flush()  # flush here, so that a closed pipe raises inside the try block
    except Interrupted as interruption:
        return 128 + interruption.signum
    except KeyboardInterrupt:
        print("pg-kernels: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe. Point stdout elsewhere, or the interpreter fails again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        print(f"pg-kernels: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pg-kernels", description="Run PaliGemma on fast kernels.")
    parser.add_argument("--version", action="version", version=f"pg_kernels {pg_kernels.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
