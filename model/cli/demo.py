"""`pg-kernels demo`: the built-in model at every task."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from .. import EMBEDDED_CHECKPOINT
from .common import check_drawing, note


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="let the built-in model do every task, and draw the answers",
        description="Ask the small model that comes with the package about its sample pictures, one for each task: captions, "
        "questions, counting, reading, charts, boxes, masks, and comparing two pictures.",
    )
    parser.add_argument("--draw", type=Path, metavar="FILE", help="write a sheet of pictures with the answers")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from ..embedded.demo import answers, samples, sheet
    from ..files import temporary_sibling
    from ..paligemma import PaliGemma
    from ..processor import Processor

    if options.draw is not None:
        check_drawing(options.draw, 1)
    examples = samples()
    processor = Processor.from_pretrained(EMBEDDED_CHECKPOINT)
    started = time.perf_counter()
    texts = answers(PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT), processor, examples)
    for example, text in zip(examples, texts, strict=True):
        print(f"{' + '.join(path.name for path in example.images)}, {example.prefix!r}: {text!r}")
    note(f"{len(examples)} answers in {time.perf_counter() - started:.1f} s")
    if options.draw is not None:
        with temporary_sibling(options.draw) as temporary:
            sheet(processor, examples, texts).save(temporary)
            os.replace(temporary, options.draw)
        note(f"wrote {options.draw}")
