"""`pg-kernels convert`: convert a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..choices import DTYPES
from .common import dtype_named, note


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("convert", help="convert a checkpoint between Hugging Face and big_vision")
    parser.add_argument(
        "source", type=Path, metavar="IN", help="Hugging Face folder, name on the hub, or big_vision .npz"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a checkpoint on the hub")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to write, or a file ending in .npz")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: the source's)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model to put into the folder")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from ..checkpoints.conversion import convert
    from ..checkpoints.hub import local_path
    from ..processor import Processor
    from ..tokenizer import Tokenizer

    if options.tokenizer is not None:
        Tokenizer.from_file(options.tokenizer)  # fail before anything is written
    source = local_path(options.source, weights=True, revision=options.revision)
    convert(source, options.target, dtype=dtype_named(options.dtype), tokenizer=options.tokenizer)
    images = [
        name for name in ("preprocessor_config.json", "processor_config.json") if (options.target / name).is_file()
    ]
    # Copy the files of a source folder unchanged: a processor would only write its own fields.
    if (options.target / "tokenizer.model").is_file() and (options.tokenizer is not None or not images):
        Processor.from_pretrained(options.target).save_pretrained(options.target)
    note(f"wrote {options.target}")
